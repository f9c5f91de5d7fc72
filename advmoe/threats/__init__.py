"""Threat experiments: poisoning, model extraction and membership inference, on one shared experiment mechanism.

Evasion attacks on a trained model are in `advmoe.attacks`, their evaluation in `advmoe.evaluation`.
To add a threat, add a folder with config.py, experiment.py, report.py and adhoc.py on top of `experiment.py` and
`adhoc.py` here, a section in `advmoe.config.schema` and a stage.
"""
