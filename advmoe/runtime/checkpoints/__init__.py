"""Checkpoints of unfinished work: file format (`storage`), folders and locks (`workdir`), when to save (`manager`).

What a checkpoint of a training run contains is defined in advmoe/training/trainer_state.py, not here.
To make a loop resumable, implement `manager.Resumable` and run it inside `manager.checkpointing`.
"""
