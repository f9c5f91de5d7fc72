"""Adversarial attacks: one per module, a pure function and its settings, and the engine that runs them in batches.

Not here: training with attacks (`advmoe.training`), evaluation (`advmoe.evaluation`), poisoning (`advmoe.threats`).
To add an attack: write one module with a settings class and a function of the form in `interface.py`, and add both to
`AttackSettings` and `REGISTRY` in `registry.py`; standard settings go into `presets.py`.
"""
