"""Hard to kill? `python -m benchmarks.kills` kills every long stage with SIGKILL at random moments, again and again,
and compares what it leaves in the end with what a run leaves that nobody disturbed: artifacts, metrics and plots, byte
for byte.

The project is a small one in a folder of its own. A run that was killed goes on in the next; one that comes to its end
is compared, and the next starts anew, until there were as many kills as asked for. Moments are counted from where work
begins: most of such a short command is Python's imports, which are easily survived.
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
TRAINED: list[tuple[str, ...]] = [("pretrain", "clean"), ("pretrain", "pgd-1")]
SHORT = [("use", "smoke"), ("use", "kills")]  # every attack of an evaluation, as short as it can be
# by name: the command, and the commands that make what it needs
STAGES: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "pretrain": (("pretrain", "pgd-1"), []),
    "train": (("train",), TRAINED),
    "baseline": (("baseline", "adversarial"), []),
    "evaluate": (("evaluate",), [*SHORT, *TRAINED, ("train",), ("baseline", "standard")]),
    "poison": (("poison", "unlearnable"), []),
    "extract": (("extract", "dfme"), [("pretrain", "pgd-1")]),
    "membership": (("membership",), [("baseline", "standard")]),
}
SIDECAR = ".run.json"  # how long it took, and when


def main() -> None:
    """Kill as often as asked for; exit code 1 when a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)  # noqa: S311  (moments, no secrets)
    differing = [name for stage in arguments.stage or STAGES for name in kill(stage, arguments.kills, moments)]
    parser.exit(int(bool(differing)))


def kill(stage: str, times: int, moments: random.Random) -> list[str]:
    """Kill one stage so many times; returns the names of files that came out otherwise, if any did."""
    with tempfile.TemporaryDirectory() as folder:
        return Project(Path(folder), stage).kill(times, moments)


class Project:
    """A small project, ready for one stage."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.state, self.stage = folder, folder / "state", stage
        self.command, needs = STAGES[stage]
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "profiles", folder / "profiles")
        write_text(folder / "profiles" / "kills.yaml", PROFILE)
        for command in (("use", "kills"), ("prepare",), *needs):
            self._finish(command)
        self.given = set(self._files())
        training = self._begin()
        started = time.monotonic()
        self._ended(training, self.command)
        self.seconds = time.monotonic() - started
        self.expected = self._left()
        console.say(f"{stage}, undisturbed: {self.seconds:.0f} s of work, {len(self.expected)} files")

    def kill(self, times: int, moments: random.Random) -> list[str]:
        """Kill the stage so many times, and compare every run that comes to its end."""
        kills, whole_runs, differing = 0, 0, set()
        self._forget()
        while True:
            if kills < times and self._killed_after(moments.uniform(0, self.seconds / 3)):
                kills += 1
                continue
            if kills == times:
                self._finish(self.command)
            found, whole_runs = self._left(), whole_runs + 1
            names = found.keys() | self.expected.keys()
            differing |= {name for name in names if found.get(name) != self.expected.get(name)}
            console.say(
                f"{self.stage}: {kills} kills, {whole_runs} runs to the end, files that differ: {sorted(differing)}"
            )
            if kills == times:
                return sorted(differing)
            self._forget()

    def _killed_after(self, seconds: float) -> bool:
        """Whether the stage had to be killed, for it was not done by then."""
        work = self._begin()
        try:
            work.wait(seconds)
        except subprocess.TimeoutExpired:
            work.kill()
            work.wait()
            return True
        self._ended(work, self.command)
        return False

    def _begin(self) -> subprocess.Popen[bytes]:
        """Start the command and wait until it has locked its folder, which is when it works."""
        for lock in self.state.glob("*.lock"):  # of the run that was killed
            lock.unlink()
        work = self._start(self.command)
        while work.poll() is None and not list(self.state.glob("*.lock")):
            time.sleep(0.01)
        return work

    def _finish(self, command: Sequence[str]) -> None:
        self._ended(self._start(command), command)

    def _ended(self, work: subprocess.Popen[bytes], command: Sequence[str]) -> None:
        if work.wait():
            raise SystemExit(f"`advmoe {' '.join(command)}` failed")

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        own = {"PYTHONPATH": str(ROOT), "ADVMOE_STATE_DIR": str(self.state), "ADVMOE_STATE_SECONDS": "0.1"}
        own |= {"ADVMOE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # so small a network gains nothing by more
        arguments = [sys.executable, "-m", "advmoe", *command]
        return subprocess.Popen(arguments, cwd=self.folder, env={**os.environ, **own}, stdout=subprocess.DEVNULL)

    def _files(self) -> list[Path]:
        roots = (self.folder / root for root in (paths.ARTIFACTS, paths.METRICS, paths.PLOTS))
        return [path for root in roots for path in root.rglob("*") if path.is_file()]

    def _made(self) -> list[Path]:
        return [path for path in self._files() if path not in self.given]

    def _left(self) -> dict[str, bytes]:
        """What the stage made."""
        made = [path for path in self._made() if not path.name.endswith(SIDECAR)]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in made}

    def _forget(self) -> None:
        for path in self._made():
            path.unlink()


if __name__ == "__main__":
    main()
