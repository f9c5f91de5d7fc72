"""Resume after kills: `python -m benchmarks.kills` kills every long stage with SIGKILL at random times, repeatedly, and
compares its artifacts, metrics and plots, byte for byte, with those of a run without interruption.

It uses a small project in a temporary folder. The run after a kill resumes; the outputs of a completed run are compared
and deleted, until the given number of kills is reached. Times are counted from the start of the work, as Python's
imports take most of such a short command.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from advmoe.core import console, paths
from advmoe.core.files import write_text

ROOT = Path(__file__).parent.parent
PROFILE = """
model: {width: 2}
pretrain: {epochs: 8, ema: 0.9, clip: 1.0, selection: best}
train: {epochs: 3, experts: [clean, pgd-1]}
evaluate:
  baselines: [standard]
  limit: 16
  batch_size: 4
  attacks:
    square: {kind: square, queries: 10, p_init: 0.8}
    rays: {kind: rays, queries: 10}
    transfer: {kind: transfer, steps: 5, step_size: 0.25, restarts: 1, sources: [baseline/standard]}
  checks: {images: 4, steps: 5, samples: 50}
  grid: {epsilons: [0.1]}
membership: {victims: {standard: 4}}
report:
  claims:
    more-robust-than-adversarial: {model: mixture, over: baseline/standard, under: worst}
    more-robust-than-equal-parameters: {model: mixture, over: baseline/standard, under: worst}
    more-robust-than-uniform: {model: mixture, over: uniform-average, under: worst}
    more-accurate-than-adversarial: {model: mixture, over: baseline/standard, under: clean}
    more-accurate-than-equal-parameters: {model: mixture, over: baseline/standard, under: clean}
poison:
  images: 60
  attacks:
    unlearnable:
      attack: {kind: unlearnable, epsilon: 0.1, steps: 10, step_size: 0.1, rounds: 10, learning_steps: 5, batch_size: 64, lr: 0.1, stop: 0.0}
      rates: [1.0]
      victims: [standard]
      seeds: [0]
      defences: []
extract:
  images: 60
  noise: 60
  surrogates: {same: {kind: resnet18, width: 2}}
  attacks:
    dfme:
      attack: {kind: dfme, batch_size: 16, latent: 16, width: 16, directions: 1, step: 4, learning: 5}
      answers: [soft]
      budgets: [6000]
      victims: [expert/pgd-1]
      surrogates: [same]
      seeds: [0]
"""  # noqa: E501  (as params.yaml has them)
TRAIN_EXPERTS: list[tuple[str, ...]] = [("pretrain", "clean"), ("pretrain", "pgd-1")]
SHORT_ATTACKS = [("use", "smoke"), ("use", "kills")]  # every attack of an evaluation, with few steps
# by name: the command, and the commands that build its inputs
STAGES: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "pretrain": (("pretrain", "pgd-1"), []),
    "train": (("train",), TRAIN_EXPERTS),
    "baseline": (("baseline", "adversarial"), []),
    "evaluate": (("evaluate", "--record"), [*SHORT_ATTACKS, *TRAIN_EXPERTS, ("train",), ("baseline", "standard")]),
    "poison": (("poison", "unlearnable", "--record"), []),
    "extract": (("extract", "dfme", "--record"), [("pretrain", "pgd-1")]),
    "membership": (("membership", "--record"), [("baseline", "standard")]),
}
SIDECAR_SUFFIX = ".run.json"  # holds times, which differ


def main() -> None:
    """Kills each stage and compares its outputs. Exit code 1 if a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills per stage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be repeated")
    arguments = parser.parse_args()
    times = random.Random(arguments.seed)  # noqa: S311  (not for cryptography)
    differing = [name for stage in arguments.stage or STAGES for name in kill_repeatedly(stage, arguments.kills, times)]
    parser.exit(int(bool(differing)))


def kill_repeatedly(stage: str, kills: int, times: random.Random) -> list[str]:
    """Kills a stage `kills` times at times drawn from `times`. Returns the names of output files that differ."""
    with tempfile.TemporaryDirectory() as folder:
        return Project(Path(folder), stage).kill(kills, times)


class Project:
    """A small project with the inputs of one stage, and the outputs of a run without interruption."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.state, self.stage = folder, folder / "state", stage
        self.command, inputs = STAGES[stage]
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "profiles", folder / "profiles")
        write_text(folder / "profiles" / "kills.yaml", PROFILE)
        for command in (("use", "kills"), ("prepare",), *inputs):
            self._run(command)
        self.input_files = set(self._files())
        process = self._start_work()
        started = time.monotonic()
        self._wait(process, self.command)
        self.seconds = time.monotonic() - started
        self.expected = self._outputs()
        console.info(f"{stage}, without interruption: {self.seconds:.0f} s of work, {len(self.expected)} files")

    def kill(self, kills: int, times: random.Random) -> list[str]:
        """Kills the stage `kills` times and compares every completed run. Returns the names of files that differ."""
        killed, completed, differing = 0, 0, set()
        self._remove_outputs()
        while True:
            if killed < kills and self._kill_after(times.uniform(0, self.seconds / 3)):
                killed += 1
                continue
            if killed == kills:
                self._run(self.command)
            outputs, completed = self._outputs(), completed + 1
            names = outputs.keys() | self.expected.keys()
            differing |= {name for name in names if outputs.get(name) != self.expected.get(name)}
            console.info(
                f"{self.stage}: {killed} kills, {completed} completed runs, files that differ: {sorted(differing)}"
            )
            if killed == kills:
                return sorted(differing)
            self._remove_outputs()

    def _kill_after(self, seconds: float) -> bool:
        """Runs the stage and kills it after `seconds`. Returns False if it completed before."""
        process = self._start_work()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
        self._wait(process, self.command)
        return False

    def _start_work(self) -> subprocess.Popen[bytes]:
        """Starts the command and waits until it has locked its folder, when the work begins."""
        for lock in self.state.glob("*.lock"):  # of the killed run
            lock.unlink()
        process = self._start(self.command)
        while process.poll() is None and not list(self.state.glob("*.lock")):
            time.sleep(0.01)
        return process

    def _run(self, command: Sequence[str]) -> None:
        self._wait(self._start(command), command)

    def _wait(self, process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
        if process.wait():
            raise SystemExit(f"`advmoe {' '.join(command)}` failed")

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {"PYTHONPATH": str(ROOT), "ADVMOE_STATE_DIR": str(self.state), "ADVMOE_STATE_SECONDS": "0.1"}
        environment |= {"ADVMOE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # more do not speed up such small networks
        arguments = [sys.executable, "-m", "advmoe", *command]
        return subprocess.Popen(
            arguments, cwd=self.folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
        )

    def _files(self) -> list[Path]:
        roots = (self.folder / root for root in (paths.ARTIFACTS, paths.METRICS, paths.PLOTS))
        return [path for root in roots for path in root.rglob("*") if path.is_file()]

    def _output_files(self) -> list[Path]:
        return [path for path in self._files() if path not in self.input_files]

    def _outputs(self) -> dict[str, bytes]:
        """Returns the content of the stage's outputs by path, without sidecar files."""
        outputs = [path for path in self._output_files() if not path.name.endswith(SIDECAR_SUFFIX)]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in outputs}

    def _remove_outputs(self) -> None:
        for path in self._output_files():
            path.unlink()


if __name__ == "__main__":
    main()
