"""Statistics of accuracies: intervals, paired tests, claims about one run and about a method over several seeds.

Not here: how accuracies are measured (`advmoe.evaluation`) and how results are shown (`advmoe.reporting`).
To add a test: one module with a function of counts or of bool tensors (N,), and a test against published values.
"""
