"""Findings: what the evidence lets one say, and what it does not: of these checkpoints, and of methods over seeds."""
