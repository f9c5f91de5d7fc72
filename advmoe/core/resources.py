"""Memory use of the current process."""

import resource
import sys

import torch


def peak_memory() -> int:
    """Peak memory of this process in bytes: device memory once it has used a GPU, resident memory otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, Linux kibibytes
