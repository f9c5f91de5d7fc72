"""Networks: backbones, the gate, the mixture of experts, and how classifiers are built, saved and loaded.

Not here: losses and training loops (`advmoe.training`), attacks (`advmoe.attacks`).
To add a backbone: write one module with `features` and a last layer `classify`, and add it to `BackboneKind` and
`BACKBONES` in `classifiers.py`.
"""
