"""Extraction: what an attacker gets who can only ask; surrogates, and what queries give away of the training data."""
