"""Benchmarks: agreement with other libraries, speed, GPU checks, resume after kills, comparisons.

Correctness of single functions is tested in tests/. `make bench` runs the comparisons in a virtual environment of their
own; to add a benchmark, add a module with a `main()` and a line to the Makefile.
"""
