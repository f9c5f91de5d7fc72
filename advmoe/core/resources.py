"""Memory use of the current process."""

import resource
import sys

import torch


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes: GPU memory if it has used a GPU, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux kibibytes
