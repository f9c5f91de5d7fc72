"""Classifiers for others to use: a folder for the Hugging Face Hub, an ONNX file, and where they come from."""
