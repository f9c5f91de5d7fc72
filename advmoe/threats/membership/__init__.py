"""Membership inference: which images a network was trained on, from its outputs on clean and adversarial queries.

Adversarial queries need the network's gradients; attacks by queries alone are in `advmoe.threats.extraction`.
A new attack is a score in `attacks.py` that `experiment.py` computes.
"""
