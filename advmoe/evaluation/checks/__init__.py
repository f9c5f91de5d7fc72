"""Checks of the validity of an evaluation: one file per check, each a function `CheckContext -> CheckResult`.

The order, the titles and the overall status are in `evaluation/verdict.py`; probe attacks in `probe_attacks.py`.
To add a check, write one file with such a function and add it to `verdict.CHECKS` and `verdict.TITLES`.
"""
