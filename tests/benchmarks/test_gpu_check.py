"""`make gpu-check` in its tiny form, on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_check, networks
from benchmarks.gpu_check import TINY, Row, load_images, main, parity_rows, resume_rows, time_steps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, and the caller's environment restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVMOE_DEVICE", "auto")
    monkeypatch.setenv("ADVMOE_THREADS", "1")


class LinearClassifier(nn.Module):
    """A linear classifier; `offset` is a fault added to the logits."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(3 * 32 * 32, 10), offset
        nn.init.normal_(self.layer.weight, std=0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layer(images_BCHW.flatten(1))
        return logits + self.offset * torch.arange(10)


class FaultyCopy(LinearClassifier):
    """Adds the offset on copies only; the check copies the network to the CPU."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        return LinearClassifier(self.offset)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layer(images_BCHW.flatten(1))
        return logits


def passed(rows: list[Row]) -> dict[str, bool | None]:
    return {row.name: row.passed for row in rows}


def test_the_whole_check_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in (
        "mixture, PGD-10, ADVMOE_GRAPHS=1",
        "expert: pixels that differ",
        "joint step, checkpointing",
        "peak memory",
        "resume",
        "attacked in bfloat16",
    ):
        assert name in said
    assert "NO" not in said


def test_a_failed_check_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run_checks", lambda *_: [Row("one", "1", "1", True), Row("two", "1", "2", False)])
    assert main(["--device", "cpu"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "PyTorch finds no such device here" in capsys.readouterr().err


def test_wrong_logits_are_noticed() -> None:
    images, labels = load_images(TINY.compared)
    sound, off = (
        passed(parity_rows(model, images, labels, TINY, CPU)) for model in (FaultyCopy(0.0), FaultyCopy(50.0))
    )
    assert sound["logits compared with the CPU"] is True
    assert off["logits compared with the CPU"] is False
    assert off["decisions under PGD"] is False


def test_an_incomplete_checkpoint_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = load_images(4)
    model = networks.mixture(images, width=1, experts=2)
    assert [row.passed for row in resume_rows(model, images, labels)] == [True]
    monkeypatch.setattr("advmoe.training.trainer_state.TrainerState._load_optimizer", lambda *_: None)
    assert [row.passed for row in resume_rows(model, images, labels)] == [False]


def test_images_have_the_shape_of_cifar10() -> None:
    images, labels = load_images(7)
    assert images.shape == (7, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert labels.shape == (7,)


def test_warmup_calls_are_not_timed() -> None:
    calls: list[int] = []
    seconds, peak = time_steps(lambda: calls.append(1), CPU)
    assert len(calls) == gpu_check.TIMED_STEPS + gpu_check.WARMUP_STEPS
    assert 0 <= seconds < 0.1
    assert peak > 2**20
