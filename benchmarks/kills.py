"""Hard to kill? `python -m benchmarks.kills` kills a training stage with SIGKILL at random moments, again and again,
and compares what it leaves in the end with what a run leaves that nobody disturbed: artifact, metrics and history, byte
for byte.

The project is a small one in a folder of its own. A run that was killed goes on in the next; one that comes to its end
is compared, and the next starts anew, until there were as many kills as asked for. Moments are counted from where
training begins: most of such a short command is Python's imports, which are easily survived.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from advmoe import console, paths
from advmoe.files import write_text

ROOT = Path(__file__).parent.parent
STAGE, EXPERT = "pretrain", "pgd-1"
PROFILE = """
model: {width: 2}
pretrain: {epochs: 8, ema: 0.9, clip: 1.0, selection: best}
"""


def main() -> None:
    """Kill as often as asked for; exit code 1 when a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        differing = project.kill(arguments.kills, random.Random(arguments.seed))  # noqa: S311  (moments, no secrets)
    parser.exit(int(bool(differing)))


class Project:
    """A small project with one expert to train."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "profiles", folder / "profiles")
        write_text(folder / "profiles" / "kills.yaml", PROFILE)
        self._finish("use", "kills")
        self._finish("prepare")
        training = self._begin()
        started = time.monotonic()
        assert training.wait() == 0
        self.seconds = time.monotonic() - started
        self.expected = self._left()
        console.say(f"undisturbed: {self.seconds:.0f} s of training, {len(self.expected)} files")

    def kill(self, times: int, moments: random.Random) -> list[str]:
        """Kill training so many times; returns the names of files that came out otherwise, if any did."""
        kills, whole_runs, differing = 0, 0, set()
        self._forget()
        while kills < times or not self._is_done():
            if self._killed_after(moments.uniform(0, self.seconds / 3) if kills < times else None):
                kills += 1
                continue
            found, whole_runs = self._left(), whole_runs + 1
            differing |= {name for name in self.expected if found.get(name) != self.expected[name]}
            console.say(f"{kills} kills: run {whole_runs} came to its end, files that differ: {sorted(differing)}")
            if kills < times:
                self._forget()
        return sorted(differing)

    def _killed_after(self, seconds: float | None) -> bool:
        """Whether training had to be killed, for it was not done by then."""
        training = self._begin()
        try:
            if training.wait(seconds):
                raise SystemExit(f"`advmoe {STAGE} {EXPERT}` failed")
        except subprocess.TimeoutExpired:
            training.kill()
            training.wait()
            return True
        return False

    def _begin(self) -> subprocess.Popen[bytes]:
        """Start the command and wait until it has locked its folder, which is when it trains."""
        for lock in self.state.glob("*.lock"):  # of the run that was killed
            lock.unlink()
        training = self._start(STAGE, EXPERT)
        while training.poll() is None and not list(self.state.glob("*.lock")):
            time.sleep(0.01)
        return training

    def _finish(self, *command: str) -> None:
        if self._start(*command).wait():
            raise SystemExit(f"`advmoe {' '.join(command)}` failed")

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        own = {"PYTHONPATH": str(ROOT), "ADVMOE_STATE_DIR": str(self.state), "ADVMOE_STATE_SECONDS": "0.1"}
        arguments = [sys.executable, "-m", "advmoe", *command]
        return subprocess.Popen(arguments, cwd=self.folder, env={**os.environ, **own}, stdout=subprocess.DEVNULL)

    def _outputs(self) -> list[Path]:
        files = [paths.artifact(STAGE, EXPERT), paths.metrics(STAGE, EXPERT), paths.plots(STAGE, EXPERT)]
        return [self.folder / file for file in files]

    def _is_done(self) -> bool:
        return self._outputs()[0].exists()

    def _left(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in self._outputs()}

    def _forget(self) -> None:
        for path in self._outputs():
            path.unlink()


if __name__ == "__main__":
    main()
