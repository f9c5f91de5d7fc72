"""Measurements against others, outside the tests: `make bench` runs them in a virtual environment of their own."""
