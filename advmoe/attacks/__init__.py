"""Attacks: one a file, a pure function and its frozen settings; `catalogue.py` is the union of them."""
