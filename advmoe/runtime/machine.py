"""Settings of the machine (device, threads, compilation, folders), and seeds. They change results only by rounding.

The settings are read from `ADVMOE_*` environment variables only. What changes a number belongs in params.yaml, which
DVC tracks; unknown `ADVMOE_*` variables are therefore errors.
"""

import hashlib
import os
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from platformdirs import user_cache_path
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from advmoe.core.errors import UserError
from advmoe.core.settings import format_validation_error

PREFIX = "ADVMOE_"
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # set by torchrun


class Machine(BaseSettings):
    """Settings of this machine. `threads`: 0 for all cores; `compile`: attack networks compiled by torch.compile;
    `graphs`: on a GPU, replay the steps of an attack as CUDA graphs; `cache_dir`: for downloads; `state_dir`: for
    checkpoints, saved every `state_seconds` seconds.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    compile: bool = False  # takes minutes, so it is worthwhile in long runs only
    graphs: bool = True
    cache_dir: Path = user_cache_path("advmoe")
    state_dir: Path = user_cache_path("advmoe") / "state"
    state_seconds: Annotated[float, Field(ge=0)] = 30.0


@lru_cache(maxsize=1)
def machine() -> Machine:
    """Returns the settings from the environment. Raises UserError for an unknown variable or an invalid value."""
    known = {f"{PREFIX}{name.upper()}" for name in Machine.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise UserError(f"environment: {unknown[0]} is not known; known are {', '.join(sorted(known))}")
    try:
        return Machine()
    except ValidationError as error:
        name, _, message = format_validation_error(error, {}).partition(":")
        raise UserError(f"environment: {PREFIX}{name.upper()}:{message}") from error


def device() -> torch.device:
    """Returns the device of ADVMOE_DEVICE; `auto` is CUDA, else MPS, else CPU. Raises UserError if it is missing."""
    name = machine().device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    index = torch.device(name).index or 0
    missing = (name.startswith("cuda") and index >= torch.cuda.device_count()) or (
        name == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError(f"environment: ADVMOE_DEVICE={name}, but PyTorch finds no such device here")
    return torch.device(name)


def prepare_torch() -> None:
    """Sets threads, determinism and float32 precision. Called once, at the start of a process that computes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.set_num_threads(machine().threads or usable_cores())
    # warn_only: operations without a deterministic implementation warn instead of raising
    torch.use_deterministic_algorithms(True, warn_only=True)
    # deterministic mode would also fill uninitialised memory, which takes 5 % of an attack's time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # decisions are made in float32; TF32 has only ten bits of mantissa
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def usable_cores() -> int:
    """Returns the number of cores that this process may use; on a shared node fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> list[tuple[str, str]]:
    """Returns (name, value) rows: device, threads, folders and versions."""
    current = device()
    hardware = (
        torch.cuda.get_device_name(current) if current.type == "cuda" else platform.processor() or platform.machine()
    )
    versions = [(package, version(package)) for package in ("advmoe", "torch", "torchvision", "dvc", "safetensors")]
    return [
        ("device", f"{current} ({hardware})"),
        ("threads", f"{torch.get_num_threads()} of {usable_cores()} cores"),
        ("cache folder", str(machine().cache_dir)),
        ("unfinished work", f"{machine().state_dir}, every {machine().state_seconds:g} s"),
        ("python", platform.python_version()),
        *versions,
    ]


def refuse_unknown_launchers() -> None:
    """Raises UserError under a launcher other than torchrun that starts several processes: each would train and write
    the same files.
    """
    if TORCHRUN_VARIABLE in os.environ:
        return
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):  # generic, srun, mpirun
        processes = os.environ.get(name, "1")
        if processes != "1":
            raise UserError(
                f"environment: started as {processes} processes ({name}); only torchrun may start several of a stage"
            )


def derive_seed(*parts: object) -> int:
    """Returns a 63-bit seed derived by sha256 from parts such as (0, 'fgsm-1', 'shuffle'): independent streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Returns a CPU generator seeded by `derive_seed`. Draws on the CPU are the same for every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def evaluation_seed(seed: int) -> int:
    """Returns the seed of all evaluations under a project's seed."""
    return derive_seed(seed, "evaluate")
