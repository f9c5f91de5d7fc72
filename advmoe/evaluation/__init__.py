"""Robustness evaluation: accuracy with confidence intervals, clean and under attack, and checks of its validity.

Attacks are in `attacks/`, intervals and tests in `statistics/`, the report in `reporting/`. To add a check, write one
file in `checks/` and add it to `verdict.CHECKS` and `verdict.TITLES`.
"""
