"""What may differ between machines and must not change a result but by rounding: device, threads, compiling, folders.

Read from `ADVMOE_*` environment variables and nowhere else. Anything that changes a number belongs in params.yaml,
where DVC sees it; an unknown `ADVMOE_*` variable is an error because it was probably meant to do that.
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
from advmoe.core.settings import explain

PREFIX = "ADVMOE_"
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # torchrun sets it for the processes that it starts


class Machine(BaseSettings):
    """Settings of this machine. `compile`: attack networks that torch.compile has rewritten; `graphs`: on a GPU, record
    the steps of an attack as CUDA graphs; `cache_dir`: for downloads; `state_dir`: for unfinished work, written there
    every `state_seconds`.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    compile: bool = False  # minutes, before anything is faster: pays on long runs only
    graphs: bool = True
    cache_dir: Path = user_cache_path("advmoe")
    state_dir: Path = user_cache_path("advmoe") / "state"
    state_seconds: Annotated[float, Field(ge=0)] = 30.0


@lru_cache(maxsize=1)
def machine() -> Machine:
    """The settings from the environment. Raises UserError for an unknown variable or a bad value."""
    known = {f"{PREFIX}{name.upper()}" for name in Machine.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise UserError(f"environment: {unknown[0]} is not known; known are {', '.join(sorted(known))}")
    try:
        return Machine()
    except ValidationError as error:
        name, _, sentence = explain(error, {}).partition(":")
        raise UserError(f"environment: {PREFIX}{name.upper()}:{sentence}") from error


def device() -> torch.device:
    """The device to compute on: the one asked for, or the best there is. Raises UserError if it is not there."""
    wanted = machine().device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    index = torch.device(wanted).index or 0
    missing = (wanted.startswith("cuda") and index >= torch.cuda.device_count()) or (
        wanted == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError(f"environment: ADVMOE_DEVICE={wanted}, but PyTorch finds no such device here")
    return torch.device(wanted)


def prepare_torch() -> None:
    """Set threads and determinism once, at the start of a process that computes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.set_num_threads(machine().threads or usable_cores())
    # warn_only: a GPU operation without a deterministic form should cost a warning, not the run
    torch.use_deterministic_algorithms(True, warn_only=True)
    # that would also fill all fresh memory, for programs that read it before they write it; 5 % of an attack's time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # float32 must mean float32: decisions rest on it, and TF32 keeps ten bits
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def usable_cores() -> int:
    """Cores this process may use, which on a shared node are fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> list[tuple[str, str]]:
    """Rows of (what, value) for a person to read."""
    place = device()
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine()
    versions = [(package, version(package)) for package in ("advmoe", "torch", "torchvision", "dvc", "safetensors")]
    return [
        ("device", f"{place} ({name})"),
        ("threads", f"{torch.get_num_threads()} of {usable_cores()} cores"),
        ("cache folder", str(machine().cache_dir)),
        ("unfinished work", f"{machine().state_dir}, every {machine().state_seconds:g} s"),
        ("python", platform.python_version()),
        *versions,
    ]


def refuse_unknown_launchers() -> None:
    """Raises UserError under a launcher that starts several copies: each would train and write the same files. Those of
    torchrun know of each other.
    """
    if TORCHRUN_VARIABLE in os.environ:
        return
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):  # others, srun, mpirun
        processes = os.environ.get(name, "1")
        if processes != "1":
            raise UserError(
                f"environment: started as {processes} processes ({name}); only torchrun may start several of a stage"
            )


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from named parts, such as (0, 'fgsm-1', 'shuffle'): independent streams without arithmetic."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator of its own for each purpose. Draws are made on the CPU so that every device sees the same."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def evaluation_seed(seed: int) -> int:
    """The stream of all evaluations under a project's seed."""
    return derive_seed(seed, "evaluate")
