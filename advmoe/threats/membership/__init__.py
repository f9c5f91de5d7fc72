"""Membership inference: which images a network was trained on, from its answers alone.

Adversarial queries are crafted on the network that is asked, so these presuppose its gradients.
"""
