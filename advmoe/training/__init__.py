"""Adversarial training: configs, attacks on batches, the training loop, and the joint training of the mixture.

Attacks are in `advmoe.attacks`, networks in `advmoe.models`, what the stages read and write in `stages/`. A new kind of
batch attack is a settings class in `batch_attacks.py`; a new loss of the mixture is a file in `losses/`.
"""
