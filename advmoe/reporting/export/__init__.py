"""Exports of a classifier artifact: a folder for the Hugging Face Hub or an ONNX file, with its provenance.

Not here: how artifacts are saved and loaded (`advmoe.core.artifacts`, `advmoe.models`).
To add a format: one module with `export_NAME(artifact, path)`, and an option of `advmoe export`.
"""
