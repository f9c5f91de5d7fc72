"""Detectors of poisoned training images; victims are retrained without what they flag."""
