"""CUDA graphs: graphed steps give the same bits, from memory that the next step overwrites. Capture needs a GPU.

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
from advmoe.attacks.cuda_graphs import MAX_GRAPHS, CapturedGraph, GraphedModule
from advmoe.evaluation.batch_size import map_batches
from advmoe.models import inference
from advmoe.models.cnn import SmallCnn
from advmoe.models.grouped_experts import refold_in_place
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts, UniformGate
from advmoe.runtime import machine
from benchmarks import networks

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a GPU")
STEPS = 3  # before a capture
IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class EagerGraph(CapturedGraph):
    """Replays by computing into the same memory, so that all but the capture itself runs on a CPU."""

    def _capture(self) -> None:
        self.output: Tensor | None = None
        self.logits = self.copy(self.images).detach()
        self.grad_logits, self.gradient = torch.empty_like(self.logits), torch.empty_like(self.images)
        functions = (lambda: refold_in_place(self.copy), self._replay_forward, self._replay_backward)
        self.fold_graph, self.forward_graph, self.backward_graph = (SimpleNamespace(replay=each) for each in functions)  # type: ignore[assignment]

    def _replay_forward(self) -> None:
        with torch.enable_grad():  # a replay ignores the grad mode
            self.output = self.copy(self.images)
        self.logits.copy_(self.output.detach())

    def _replay_backward(self) -> None:
        assert self.output is not None
        (found,) = torch.autograd.grad(self.output, self.images, self.grad_logits, retain_graph=True)
        self.gradient.copy_(found)


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graphs from other tests or for them, and early capture."""
    monkeypatch.setattr(cuda_graphs, "MIN_STEPS", STEPS)
    monkeypatch.setattr(cuda_graphs, "MAX_TIME_RATIO", 1e9)  # regardless of the speed-up
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cuda_graphs.release_graphs()
    yield
    cuda_graphs.release_graphs()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces captured graphs by eager ones; lists the number of images of each."""
    batch_sizes: list[int] = []

    def capture(*arguments: object) -> EagerGraph:
        batch_sizes.append(len(arguments[-1]))  # type: ignore[arg-type]
        return EagerGraph(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", capture)
    return batch_sizes


def mixture(width: int = 4) -> MixtureOfExperts:
    """Three experts, which run as grouped convolutions."""
    return networks.set_batchnorm_statistics(networks.mixture(IMAGES, width=width, experts=3), IMAGES)  # type: ignore[return-value]


def lone(width: int = 4) -> nn.Module:
    return networks.set_batchnorm_statistics(networks.single_expert(IMAGES, width=width), IMAGES)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mixture": mixture, "lone": lone}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
every_precision = pytest.mark.parametrize("precision", inference.DTYPES)


def gradient(forward: Callable[[Tensor], Tensor], images: Tensor, which: int = 0) -> list[Tensor]:
    """Logits, and the gradient of one of them."""
    leaf = images.clone().requires_grad_(True)
    logits = forward(leaf)
    return [logits.detach(), torch.autograd.grad(logits[:, which].sum(), leaf)[0]]


def attack(model: nn.Module, steps: int, precision: Precision = "float32", count: int = 12) -> None:
    """Asserts that steps with and without graphs agree to the last bit."""
    with engine.attack_mode(model, precision) as frozen_model:
        graphed = GraphedModule(model)

        def forward(images_BCHW: Tensor) -> Tensor:
            with inference.autocast(images_BCHW.device, precision, cache=False):
                return graphed(images_BCHW.contiguous(memory_format=torch.channels_last)).float()

        for step in range(steps):
            images = IMAGES[:count] * (1 - step / 100)
            assert_same(gradient(forward, images), gradient(frozen_model, images))


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
def test_steps_are_captured_once_they_repeat(
    captures: list[int], make: Callable[[], nn.Module], precision: Precision
) -> None:
    model = make()
    attack(model, STEPS, precision)
    assert not captures
    attack(model, 5, precision)
    assert captures == [12]


@every_network
@every_precision
def test_a_graph_outlasts_an_attack_and_loads_the_weights(
    captures: list[int], make: Callable[[], nn.Module], precision: Precision
) -> None:
    model = make()
    attack(model, STEPS + 2, precision)
    for _ in range(3):
        learn(model)
        attack(model, 2, precision)
    assert captures == [12]


def test_another_shape_has_its_own_graph(captures: list[int]) -> None:
    model = lone()
    for count in (12, 7, 12):
        attack(model, STEPS + 2, count=count)
    assert captures == [12, 7]


def test_few_are_kept(captures: list[int]) -> None:
    model = lone()
    counts = list(range(1, MAX_GRAPHS + 2))
    for count in (*counts, counts[-1], counts[0]):
        attack(model, STEPS + 1, count=count)
    assert captures == [*counts, counts[0]]


def test_networks_in_turn_are_not_captured_all_the_time(captures: list[int]) -> None:
    models = [lone() for _ in range(MAX_GRAPHS + 1)]
    for _ in range(3):
        for model in models:
            attack(model, STEPS)
    assert len(captures) <= 2 * len(models)


def test_a_changed_network_is_captured_again(captures: list[int]) -> None:
    model = mixture()
    attack(model, STEPS + 1)
    model.mixing = "logits"
    attack(model, 2)
    model.gate = UniformGate(3)
    attack(model, 2)
    assert len(captures) == 3


def test_short_attacks_and_plain_predictions_are_not_captured(captures: list[int]) -> None:
    model = lone()
    with inference.eval_mode(model):
        graphed = GraphedModule(model)
        for _ in range(2 * STEPS):
            graphed(IMAGES)
            with torch.no_grad():
                graphed(IMAGES.clone().requires_grad_(True))
    assert not captures


class Stateful(nn.Module):
    """A network from elsewhere whose output changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, 2)."""
        self.calls += 1
        return self.calls * images_BCHW.flatten(1)[:, :2]


def test_only_known_modules_are_captured(captures: list[int]) -> None:
    stateful, hooked = Stateful(), lone()
    handle = hooked.register_forward_hook(lambda *_: None)
    for model in (stateful, hooked):
        graphed = GraphedModule(model)
        for _ in range(STEPS + 3):
            gradient(graphed, IMAGES)
    assert not captures
    assert stateful.calls == STEPS + 3
    handle.remove()


def test_networks_that_cannot_be_captured_run_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(*_: object) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", fails)
    attack(lone(), STEPS + 4)
    assert len(tries) == 1


def test_graphs_that_are_not_faster_are_not_kept(monkeypatch: pytest.MonkeyPatch, captures: list[int]) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_TIME_RATIO", 0.0)
    attack(lone(), STEPS + 4)
    assert captures == [12]
    assert not cuda_graphs._graphs


def test_graphs_do_not_keep_networks_alive(captures: list[int]) -> None:
    model = lone()
    attack(model, STEPS + 1)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert captures


def test_graphs_are_released_when_memory_runs_out(captures: list[int]) -> None:
    model = lone()
    attack(model, STEPS + 1)

    def work(rows: Tensor) -> int:
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return len(rows)

    assert [done for _, done in map_batches(work, torch.arange(4), 4)] == [2, 2]
    attack(model, 1)
    assert captures == [12, 12]


# ---- memory that is overwritten


@pytest.fixture
def graph_and_model() -> Iterator[tuple[EagerGraph, nn.Module]]:
    """The graph of a small network, and the network."""
    torch.manual_seed(0)
    model = SmallCnn(channels=3, classes=3, width=4, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    with engine.attack_mode(model, "float32"):
        yield EagerGraph(model, cuda_graphs.signature(model), (IMAGES.shape, torch.float32), IMAGES), model


def test_outputs_are_not_overwritten(graph_and_model: tuple[EagerGraph, nn.Module]) -> None:
    graphed, model = graph_and_model
    first, second = gradient(graphed, IMAGES), gradient(graphed, IMAGES / 2)
    assert_same(first, gradient(model, IMAGES))
    assert_same(second, gradient(model, IMAGES / 2))


def test_gradient_after_another_pass(graph_and_model: tuple[EagerGraph, nn.Module]) -> None:
    graphed, model = graph_and_model
    leaf, other = (images.clone().requires_grad_(True) for images in (IMAGES, IMAGES / 2))
    logits, later = graphed(leaf), graphed(other)
    for tensor, out, images in ((leaf, logits, IMAGES), (other, later, IMAGES / 2), (leaf, logits, IMAGES)):
        (found,) = torch.autograd.grad(out[:, 0].sum(), tensor, retain_graph=True)
        assert torch.equal(found, gradient(model, images)[1])


def test_several_gradients_of_one_pass(graph_and_model: tuple[EagerGraph, nn.Module]) -> None:
    graphed, model = graph_and_model
    leaf = IMAGES.clone().requires_grad_(True)
    logits = graphed(leaf)
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
    """Through the engine, with weights that change in between."""
    device, found = torch.device("cuda"), {}
    for setting in ("0", "1"):
        monkeypatch.setenv("ADVMOE_GRAPHS", setting)
        machine.machine.cache_clear()
        torch.manual_seed(0)
        model, each = make(width).to(device), []
        for steps in (STEPS + 2, 3, 3):
            with engine.attack_mode(model, precision) as frozen_model:
                each += [gradient(frozen_model, IMAGES.to(device) * share) for share in torch.linspace(0.5, 1, steps)]
            learn(model)
        assert len(cuda_graphs._graphs) == int(setting)
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
    with engine.attack_mode(model, "float32") as frozen_model:
        expected = gradient(frozen_model, images)
        for _ in range(STEPS + 2):
            assert_same(gradient(frozen_model, images), expected)
    assert cuda_graphs._not_graphed[model]
