"""Membership inference: which images a network was trained on, from its answers alone."""
