"""Poisoning: attacks on the training data, the victims they are tried on, what is measured, and defences."""
