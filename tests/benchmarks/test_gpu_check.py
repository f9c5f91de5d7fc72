"""`make gpu-check` in its tiny form, on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_check, networks
from benchmarks.gpu_check import TINY, Row, main, parity, pictures, resume, timed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing prepared lies about, and the caller's environment is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVMOE_DEVICE", "auto")
    monkeypatch.setenv("ADVMOE_THREADS", "1")


class Reads(nn.Module):
    """Tells the digit's class from one pixel after another, with an offset as a fault."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(3 * 32 * 32, 10), offset
        nn.init.normal_(self.layer.weight, std=0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layer(images_BCHW.flatten(1))
        return logits + self.offset * torch.arange(10)


class Drifts(Reads):
    """On copies, which are what the CPU is given, the offset counts."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        return Reads(self.offset)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layer(images_BCHW.flatten(1))
        return logits


def found(rows: list[Row]) -> dict[str, bool | None]:
    return {row.what: row.ok for row in rows}


def test_the_whole_check_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for what in (
        "mixture, PGD-10, ADVMOE_GRAPHS=1",
        "expert: pixels that differ",
        "joint step, checkpointing",
        "peak memory",
        "resume",
        "crafted in bfloat16",
    ):
        assert what in said
    assert "NO" not in said


def test_a_row_that_says_no_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "check", lambda *_: [Row("one", "1", "1", True), Row("two", "1", "2", False)])
    assert main(["--device", "cpu"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "PyTorch finds no such device here" in capsys.readouterr().err


def test_a_device_that_computes_something_else_is_found_out() -> None:
    images, labels = pictures(TINY.compared)
    sound, off = (found(parity(model, images, labels, TINY, CPU)) for model in (Drifts(0.0), Drifts(50.0)))
    assert sound["logits beside the CPU's"] is True
    assert off["logits beside the CPU's"] is False
    assert off["decisions under PGD"] is False


def test_a_state_that_forgets_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(4)
    model = networks.mixture(images, width=1, experts=2)
    assert [row.ok for row in resume(model, images, labels)] == [True]
    monkeypatch.setattr("advmoe.training.trainer_state._restore_optimizer", lambda *_: None)
    assert [row.ok for row in resume(model, images, labels)] == [False]


def test_pictures_have_the_shape_of_cifar10() -> None:
    images, labels = pictures(7)
    assert images.shape == (7, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert labels.shape == (7,)


def test_the_first_calls_are_off_the_clock() -> None:
    calls: list[int] = []
    seconds, peak = timed(lambda: calls.append(1), CPU)
    assert len(calls) == gpu_check.TIMED + gpu_check.WARM
    assert 0 <= seconds < 0.1
    assert peak > 2**20
