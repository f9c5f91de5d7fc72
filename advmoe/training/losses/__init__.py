"""What a mixture learns from an attacked batch: one file for each `train.recipe`.

Each is a loss of the mixture's answer to a batch, a mean over its images; the experts' own losses and the balance of
the load are added to any of them (`advmoe.training.joint`).
"""
