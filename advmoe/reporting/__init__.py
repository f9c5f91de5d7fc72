"""Reports on the results of a run, and exports of its classifier.

Not here: how results are computed (`advmoe.evaluation`, `advmoe.threats`) and tested (`advmoe.statistics`).
To add a section to the report: one module in `report/` with a function `Sources -> Section`, called in `content.py`.
"""
