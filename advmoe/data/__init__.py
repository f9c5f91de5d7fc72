"""Data sets: the prepared data set with fixed splits, and training batches. Loading data never executes code from it.

Not here: poisoned sets (`advmoe.threats.poisoning`) and random streams of attacks (`advmoe.attacks.random_streams`).
Sources of images are in `advmoe.data.sources`; `registry.py` lists them.
"""
