"""Baselines that the mixture is compared with: their entries in params.yaml (`specs.py`) and their training tasks.

The training loop and plain networks are in `advmoe.training`. To add a baseline, add an entry class to `specs.py`, list
it in `Baseline`, and give it a `TrainingTask` of its own if its loss or its trained parameters differ.
"""
