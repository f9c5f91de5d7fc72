"""Losses of a mixture on an attacked batch, each a mean over its images: one file for each `train.recipe`.

The experts' own losses and the load balance are added in `advmoe.training.joint`, not here. To add a loss, write a
settings class with `kind` and `loss(batch)` in a new file, and list it in `registry.py`.
"""
