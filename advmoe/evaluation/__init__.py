"""Measuring: accuracy under attack with intervals, for any model that maps pixels in [0, 1] to logits."""
