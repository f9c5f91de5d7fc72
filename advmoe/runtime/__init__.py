"""How a process runs: device, seeds, several processes, signals, checkpoints. None of it changes a result.

What is computed lives in the rooms above (advmoe/training, advmoe/evaluation, ...), files and settings in advmoe/core.
A setting of the machine is a field of `machine.Machine`; new kinds of work resume through `checkpoints.manager`.
"""
