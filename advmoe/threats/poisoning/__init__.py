"""Data poisoning: attacks on the training set, training of victims on it, metrics, and detectors in `detectors/`.

Training itself is in `advmoe.threats.victim_training`, attacks at test time in `advmoe.attacks`.
To add an attack, add a file with its settings and its function, an entry in `registry.py` and a study in params.yaml.
"""
