"""Recorded steps: the same bits, from memory that the next step writes over. The recording itself needs a GPU.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import cuda_graphs, engine
from advmoe.attacks.cuda_graphs import MAX_GRAPHS, GraphedModule, GraphRecording
from advmoe.evaluation.batch_size import in_batches
from advmoe.models import inference
from advmoe.models.cnn import SmallCnn
from advmoe.models.grouped_experts import refold_grouped
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts, UniformGate
from advmoe.runtime import machine
from benchmarks import networks

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a GPU")
STEPS = 3  # before a recording
IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Imitation(GraphRecording):
    """The same memory, written to by computing anew; so that all but the driver's part runs on a CPU."""

    def _record(self) -> None:
        self.output: Tensor | None = None
        self.logits = self.copy(self.images).detach()
        self.towards, self.gradient = torch.empty_like(self.logits), torch.empty_like(self.images)
        parts = (lambda: refold_grouped(self.copy), self._ahead, self._back)
        self.fold, self.ahead, self.back = (SimpleNamespace(replay=part) for part in parts)  # type: ignore[assignment]

    def _ahead(self) -> None:
        with torch.enable_grad():  # a replay does not ask
            self.output = self.copy(self.images)
        self.logits.copy_(self.output.detach())

    def _back(self) -> None:
        assert self.output is not None
        (found,) = torch.autograd.grad(self.output, self.images, self.towards, retain_graph=True)
        self.gradient.copy_(found)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither from another test nor for one; and recorded early."""
    monkeypatch.setattr(cuda_graphs, "MIN_STEPS", STEPS)
    monkeypatch.setattr(cuda_graphs, "MAX_TIME_RATIO", 1e9)  # whatever it gains
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cuda_graphs.release_graphs()
    yield
    cuda_graphs.release_graphs()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Imitations in place of recordings; how many images each was made for."""
    made: list[int] = []

    def imitate(*arguments: object) -> Imitation:
        made.append(len(arguments[-1]))  # type: ignore[arg-type]
        return Imitation(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_graphs, "GraphRecording", imitate)
    return made


def mixture(width: int = 4) -> MixtureOfExperts:
    """Three experts, which run side by side."""
    return networks.settled(networks.mixture(IMAGES, width=width, experts=3), IMAGES)  # type: ignore[return-value]


def lone(width: int = 4) -> nn.Module:
    return networks.settled(networks.lone_expert(IMAGES, width=width), IMAGES)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mixture": mixture, "lone": lone}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
every_precision = pytest.mark.parametrize("precision", inference.DTYPES)


def gradient(forward: Callable[[Tensor], Tensor], images: Tensor, which: int = 0) -> list[Tensor]:
    """Logits, and the gradient of one of them."""
    leaf = images.clone().requires_grad_(True)
    logits = forward(leaf)
    return [logits.detach(), torch.autograd.grad(logits[:, which].sum(), leaf)[0]]


def attack(model: nn.Module, steps: int, precision: Precision = "float32", count: int = 12) -> None:
    """Steps that must find, recorded or not, what is found without: to the last bit."""
    with engine.attack_mode(model, precision) as cheap:
        replayed = GraphedModule(model)

        def forward(images_BCHW: Tensor) -> Tensor:
            with inference.autocast(images_BCHW.device, precision, cache=False):
                return replayed(images_BCHW.contiguous(memory_format=torch.channels_last)).float()

        for step in range(steps):
            images = IMAGES[:count] * (1 - step / 100)
            assert_same(gradient(forward, images), gradient(cheap, images))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def learn(model: nn.Module) -> None:
    """Other weights and other statistics, in place, as an optimiser and BatchNorm leave them."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *(each for each in model.buffers() if each.is_floating_point())):
            tensor.mul_(1.1)


# ---- when


@every_network
@every_precision
def test_steps_are_recorded_once_they_repeat(
    recordings: list[int], make: Callable[[], nn.Module], precision: Precision
) -> None:
    model = make()
    attack(model, STEPS, precision)
    assert not recordings
    attack(model, 5, precision)
    assert recordings == [12]


@every_network
@every_precision
def test_a_recording_outlasts_an_attack_and_takes_over_the_weights(
    recordings: list[int], make: Callable[[], nn.Module], precision: Precision
) -> None:
    model = make()
    attack(model, STEPS + 2, precision)
    for _ in range(3):
        learn(model)
        attack(model, 2, precision)
    assert recordings == [12]


def test_another_shape_is_recorded_for_itself(recordings: list[int]) -> None:
    model = lone()
    for count in (12, 7, 12):
        attack(model, STEPS + 2, count=count)
    assert recordings == [12, 7]


def test_few_are_kept(recordings: list[int]) -> None:
    model = lone()
    counts = list(range(1, MAX_GRAPHS + 2))
    for count in (*counts, counts[-1], counts[0]):
        attack(model, STEPS + 1, count=count)
    assert recordings == [*counts, counts[0]]


def test_networks_in_turn_are_not_recorded_all_the_time(recordings: list[int]) -> None:
    models = [lone() for _ in range(MAX_GRAPHS + 1)]
    for _ in range(3):
        for model in models:
            attack(model, STEPS)
    assert len(recordings) <= 2 * len(models)


def test_a_network_that_has_become_another_is_recorded_anew(recordings: list[int]) -> None:
    model = mixture()
    attack(model, STEPS + 1)
    model.mixing = "logits"
    attack(model, 2)
    model.gate = UniformGate(3)
    attack(model, 2)
    assert len(recordings) == 3


def test_short_attacks_and_plain_predictions_are_not_recorded(recordings: list[int]) -> None:
    model = lone()
    with inference.eval_mode(model):
        replayed = GraphedModule(model)
        for _ in range(2 * STEPS):
            replayed(IMAGES)
            with torch.no_grad():
                replayed(IMAGES.clone().requires_grad_(True))
    assert not recordings


class Moody(nn.Module):
    """Somebody's own network, which answers otherwise every time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, 2)."""
        self.calls += 1
        return self.calls * images_BCHW.flatten(1)[:, :2]


def test_only_networks_that_are_known_are_recorded(recordings: list[int]) -> None:
    moody, heard = Moody(), lone()
    handle = heard.register_forward_hook(lambda *_: None)
    for model in (moody, heard):
        replayed = GraphedModule(model)
        for _ in range(STEPS + 3):
            gradient(replayed, IMAGES)
    assert not recordings
    assert moody.calls == STEPS + 3
    handle.remove()


def test_what_cannot_be_recorded_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(*_: object) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda_graphs, "GraphRecording", fails)
    attack(lone(), STEPS + 4)
    assert len(tries) == 1


def test_what_is_not_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch, recordings: list[int]) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_TIME_RATIO", 0.0)
    attack(lone(), STEPS + 4)
    assert recordings == [12]
    assert not cuda_graphs._kept


def test_nothing_is_held_that_is_no_longer_there(recordings: list[int]) -> None:
    model = lone()
    attack(model, STEPS + 1)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert recordings


def test_memory_goes_back_when_there_is_too_little(recordings: list[int]) -> None:
    model = lone()
    attack(model, STEPS + 1)

    def work(rows: Tensor) -> int:
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return len(rows)

    assert [done for _, done in in_batches(work, torch.arange(4), 4)] == [2, 2]
    attack(model, 1)
    assert recordings == [12, 12]


# ---- memory that is written over


@pytest.fixture
def recording() -> Iterator[tuple[Imitation, nn.Module]]:
    """Of a small network, and the network."""
    torch.manual_seed(0)
    model = SmallCnn(channels=3, classes=3, width=4, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    with engine.attack_mode(model, "float32"):
        yield Imitation(model, cuda_graphs.signature(model), (IMAGES.shape, torch.float32), IMAGES), model


def test_what_came_out_stays(recording: tuple[Imitation, nn.Module]) -> None:
    replayed, model = recording
    first, second = gradient(replayed, IMAGES), gradient(replayed, IMAGES / 2)
    assert_same(first, gradient(model, IMAGES))
    assert_same(second, gradient(model, IMAGES / 2))


def test_a_gradient_may_be_asked_for_after_another_pass(recording: tuple[Imitation, nn.Module]) -> None:
    replayed, model = recording
    leaf, other = (images.clone().requires_grad_(True) for images in (IMAGES, IMAGES / 2))
    logits, later = replayed(leaf), replayed(other)
    for tensor, out, images in ((leaf, logits, IMAGES), (other, later, IMAGES / 2), (leaf, logits, IMAGES)):
        (found,) = torch.autograd.grad(out[:, 0].sum(), tensor, retain_graph=True)
        assert torch.equal(found, gradient(model, images)[1])


def test_several_gradients_of_one_pass(recording: tuple[Imitation, nn.Module]) -> None:
    replayed, model = recording
    leaf = IMAGES.clone().requires_grad_(True)
    logits = replayed(leaf)
    for which in (1, 0, 1):
        (found,) = torch.autograd.grad(logits[:, which].sum(), leaf, retain_graph=True)
        assert torch.equal(found, gradient(model, IMAGES, which)[1])


# ---- on a GPU


@GPU
@every_precision
@pytest.mark.parametrize("width", [4, 16])
@every_network
def test_a_gpu_finds_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, width: int, make: Callable[[int], nn.Module]
) -> None:
    """The engine's own way, with weights that change in between."""
    place, found = torch.device("cuda"), {}
    for setting in ("0", "1"):
        monkeypatch.setenv("ADVMOE_GRAPHS", setting)
        machine.machine.cache_clear()
        torch.manual_seed(0)
        model, each = make(width).to(place), []
        for steps in (STEPS + 2, 3, 3):
            with engine.attack_mode(model, precision) as cheap:
                each += [gradient(cheap, IMAGES.to(place) * share) for share in torch.linspace(0.5, 1, steps)]
            learn(model)
        assert len(cuda_graphs._kept) == int(setting)
        found[setting] = each
    for one, other in zip(found["0"], found["1"], strict=True):
        assert_same(one, other)


@GPU
def test_a_gpu_short_of_memory_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = lone().to("cuda"), IMAGES.to("cuda")
    forward = type(model).forward

    def hungry(self: nn.Module, images_BCHW: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 45, device="cuda")
        logits: Tensor = forward(self, images_BCHW)
        return logits

    monkeypatch.setattr(type(model), "forward", hungry)
    with engine.attack_mode(model, "float32") as cheap:
        expected = gradient(cheap, images)
        for _ in range(STEPS + 2):
            assert_same(gradient(cheap, images), expected)
    assert cuda_graphs._refused[model]
