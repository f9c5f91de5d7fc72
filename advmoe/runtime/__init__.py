"""How a process runs: device, seeds, several processes, signals, checkpoints. None of it changes a result.

Not here: what is computed (advmoe/training, advmoe/evaluation, ...), and files and settings (advmoe/core).
A setting of the machine is a field of `machine.Machine`; new kinds of work resume through `checkpoints.manager`.
"""
