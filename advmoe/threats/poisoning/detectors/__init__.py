"""Detectors of poisoned training images; victims are retrained without the images that a detector flags.

The retraining is in `advmoe.threats.poisoning.experiment`, detection rates are in `advmoe.threats.poisoning.metrics`.
To add a detector, add a file with its settings and its function, an entry in `registry.py` and one in params.yaml.
"""
