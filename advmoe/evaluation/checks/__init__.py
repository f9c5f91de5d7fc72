"""Checks: may this evaluation be believed? One a file, each a pure function of a case; `verdict.py` asks them all."""
