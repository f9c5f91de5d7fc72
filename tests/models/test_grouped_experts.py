"""Grouped experts: the same numbers as experts in turn, only where that is faster, and undone on exit.

Shapes: B batch, N images, C channel, H/W pixels, E experts, K classes.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import LInf
from advmoe.attacks.interface import input_gradient
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.models import grouped_experts as rules
from advmoe.models import inference
from advmoe.models.cnn import SmallCnn
from advmoe.models.gate import Gate
from advmoe.models.grouped_experts import group_experts
from advmoe.models.inference import Precision
from advmoe.models.layers import fold_batchnorm
from advmoe.models.mixture import ConfidenceHeads, ConfidentExperts, Mixing, MixtureOfExperts
from advmoe.models.resnet import ResNet18
from advmoe.models.resnet50 import ResNet50
from advmoe.runtime.machine import generator

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
MIXINGS: tuple[Mixing, ...] = ("probabilities", "logits", "top1")
CLASSES, COUNT = 3, 12
PGD = Pgd(kind="pgd", steps=5, step_size=0.25, restarts=1, loss="ce", targets=0)
# Every product is the same, and with most kernels its place in the sum too: then logits agree to the last bit. With
# others, and in the pixels' gradient, where nine sums become one, float32 rounds otherwise.
EXACT = 5e-6
NEAR: dict[Precision, float] = {"float32": 2e-5, "bfloat16": 0.1}  # of a gradient's largest number

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_mixing = pytest.mark.parametrize("mixing", MIXINGS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(count: int = COUNT, *, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=generator("test_side_by_side", "pixels"))


def labels(count: int = COUNT) -> Tensor:
    return torch.arange(count) % CLASSES


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def expert(
    seed: int = 0,
    *,
    kind: type[ResNet18] | type[ResNet50] | type[SmallCnn] = ResNet18,
    width: int = 4,
    channels: int = 1,
    classes: int = CLASSES,
    mean: float = 0.5,
) -> nn.Module:
    return seeded(
        lambda: kind(channels=channels, classes=classes, width=width, mean=(mean,) * channels, std=(0.3,) * channels),
        seed,
    )


def gate(experts: int, channels: int = 1) -> nn.Module:
    """A gate with random scores: a new gate is uniform."""
    made = seeded(
        lambda: Gate(
            channels=channels, experts=experts, width=2, temperature=1.0, mean=(0.5,) * channels, std=(0.3,) * channels
        ),
        9,
    )
    assert isinstance(made, Gate)
    made.score.weight.data.normal_(generator=generator("test_side_by_side", "gate"))
    return made


def mixture(*experts: nn.Module, mixing: Mixing = "probabilities", channels: int = 1) -> MixtureOfExperts:
    """In eval mode, its BatchNorms with statistics of a life: fresh ones would hide a fold that forgets them."""
    each = experts or tuple(expert(seed) for seed in range(3))
    return lived_in(MixtureOfExperts(each, gate(len(each), channels), mixing), channels)


def lived_in(model: MixtureOfExperts, channels: int = 1) -> MixtureOfExperts:
    model.train()
    with torch.no_grad():
        for step in range(5):
            stream = generator("test_side_by_side", "life", step)
            model(torch.rand(16, channels, 8, 8, generator=stream))
    return model.eval()


@contextmanager
def called(model: MixtureOfExperts) -> Iterator[list[nn.Module]]:
    """The experts that are called inside; grouped experts are not called."""
    calls: list[nn.Module] = []
    handles = [each.register_forward_hook(lambda layer, *_: calls.append(layer)) for each in model.experts]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def runs_grouped(model: MixtureOfExperts, images_BCHW: Tensor, precision: Precision = "float32") -> bool:
    """Whether the experts run grouped in attack mode."""
    with engine.attack_mode(model, precision) as frozen_model, torch.no_grad(), called(model) as calls:
        frozen_model(images_BCHW)
    assert len(calls) in (0, len(model.experts))
    return not calls


@contextmanager
def in_turn() -> Iterator[None]:
    """Disables grouping."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "MAX_ACTIVATIONS", {})
        yield


# ---- the same numbers


@pytest.mark.parametrize(("channels", "side", "width"), [(1, 8, 4), (1, 8, 12), (3, 8, 8), (3, 16, 4), (1, 5, 4)])
def test_logits_are_those_of_each_expert_alone(channels: int, side: int, width: int) -> None:
    model = mixture(*(expert(seed, width=width, channels=channels) for seed in range(3)), channels=channels)
    images = pixels(channels=channels, side=side)
    with engine.attack_mode(model, "float32") as frozen_model, torch.no_grad(), called(model) as calls:
        found_BEK = frozen_model.forward_parts(images).logits_BEK
        assert not calls
        alone = torch.stack([each(images) for each in model.experts], dim=1)
    torch.testing.assert_close(found_BEK, alone, atol=EXACT, rtol=EXACT)
    assert not torch.allclose(alone[:, 0], alone[:, 1], atol=0.01), "experts that agree prove nothing"


@every_mixing
def test_folded_or_not_it_is_the_mixture(mixing: Mixing) -> None:
    """Without `folded` around it, grouped experts are folded all the same: the tolerance is that of folding."""
    model = mixture(mixing=mixing)
    with torch.no_grad():
        plain = model.forward_parts(pixels())
        with group_experts(model), called(model) as calls:
            bare = model.forward_parts(pixels())
        with fold_batchnorm(model), group_experts(model), called(model) as calls_too:
            both = model.forward_parts(pixels())
    assert not calls
    assert not calls_too
    for part, expected, other in zip(bare, plain, both, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)


@every_precision
@every_mixing
def test_gradients_reach_the_pixels_alike(mixing: Mixing, precision: Precision) -> None:
    model = mixture(mixing=mixing)

    def gradient() -> Tensor:
        with engine.attack_mode(model, precision) as frozen_model:
            return input_gradient(frozen_model, pixels(), labels(), "ce")[0]

    together = gradient()
    with in_turn():
        plain = gradient()
    assert runs_grouped(model, pixels(), precision)
    assert float(plain.abs().max()) > 0
    torch.testing.assert_close(together, plain, atol=NEAR[precision] * float(plain.abs().max()), rtol=0)


@every_precision
def test_parts_and_whole_and_expert_models_agree(precision: Precision) -> None:
    model = mixture()
    with engine.attack_mode(model, precision) as frozen_model, torch.no_grad():
        parts, whole = frozen_model.forward_parts(pixels()), frozen_model(pixels())
        outputs = [expert_model(pixels()) for expert_model in frozen_model.expert_models()]
        expert_logits_BEK = torch.stack(outputs, dim=1)
    assert {part.dtype for part in parts} == {torch.float32}
    assert torch.equal(parts.log_probs_BK, whole)
    largest = float(expert_logits_BEK.abs().max())
    tolerance = EXACT if precision == "float32" else 0.05
    torch.testing.assert_close(parts.logits_BEK, expert_logits_BEK, atol=tolerance * largest, rtol=tolerance)


def test_decisions_are_those_of_the_plain_model() -> None:
    model = mixture()
    with called(model) as calls:
        found = inference.predict(model, pixels(), COUNT)
        assert not calls
    with torch.no_grad():
        torch.testing.assert_close(found, model(pixels()), atol=1e-4, rtol=1e-4)


# ---- networks that are not grouped


class Own(ResNet18):
    """Planted: a subclass whose forward pass differs."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return -super().forward(images_BCHW)


def confident() -> ConfidentExperts:
    heads = ConfidenceHeads(experts=2, features=32, temperature=1.0)
    model = lived_in(ConfidentExperts([expert(0), expert(1)], heads, "probabilities"))
    assert isinstance(model, ConfidentExperts)
    return model


OTHER_MIXTURES: dict[str, Callable[[], MixtureOfExperts]] = {
    "resnet50": lambda: mixture(expert(0, kind=ResNet50), expert(1, kind=ResNet50)),
    "cnn": lambda: mixture(expert(0, kind=SmallCnn), expert(1, kind=SmallCnn)),
    "two kinds": lambda: mixture(expert(0), expert(1, kind=SmallCnn)),
    "two widths": lambda: mixture(expert(0), expert(1, width=8)),
    "two normalisations": lambda: mixture(expert(0), expert(1, mean=0.4)),
    "subclass": lambda: mixture(expert(0), expert(1, kind=Own)),
    "one expert": lambda: mixture(expert(0)),
    "too wide": lambda: mixture(expert(0, width=24), expert(1, width=24)),
    "confident": confident,
}


@every_precision
@pytest.mark.parametrize("make", OTHER_MIXTURES.values(), ids=OTHER_MIXTURES)
def test_other_networks_run_in_turn(make: Callable[[], MixtureOfExperts], precision: Precision) -> None:
    model = make()
    with engine.attack_mode(model, precision) as frozen_model, torch.no_grad():
        found = frozen_model(pixels())
    with (
        inference.eval_mode(model),
        fold_batchnorm(model),
        torch.no_grad(),
        inference.autocast(torch.device("cpu"), precision),
    ):
        plain = model(pixels().contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, plain.float())
    with engine.attack_mode(model, precision) as frozen_model, torch.no_grad():
        assert getattr(model, "grouped_experts", None) is None or not model.grouped_experts.is_faster(pixels())  # type: ignore[union-attr]


@every_precision
def test_limit_on_a_gpu(precision: Precision) -> None:
    """Fake tensors, so that no GPU is needed."""
    model = mixture(expert(0, width=24), expert(1, width=24))
    largest = rules.MAX_ACTIVATIONS_GPU // (24 * 32 * 32)
    with group_experts(model.eval()), FakeTensorMode():
        assert model.grouped_experts is not None
        images = torch.empty(largest, 1, 32, 32, device="cuda", dtype=inference.DTYPES[precision])
        assert model.grouped_experts.is_faster(images)
        assert not model.grouped_experts.is_faster(torch.cat([images, images[:1]]))
        assert not model.grouped_experts.is_faster(images.cpu())


def test_rules_of_size() -> None:
    """By the first convolution's output: width 4 and 64 pixels make 256 numbers an image."""
    model = mixture()
    largest = {precision: rules.MAX_ACTIVATIONS[inference.DTYPES[precision]] // 256 for precision in PRECISIONS}
    for precision, count in largest.items():
        assert runs_grouped(model, pixels(count), precision)
        assert not runs_grouped(model, pixels(count + 1), precision)
    assert not runs_grouped(model, pixels(1), "float32")
    assert runs_grouped(model, pixels(1), "bfloat16")


def test_experts_in_train_mode_run_in_turn() -> None:
    model = mixture()
    model.experts[1].train()
    with torch.no_grad(), group_experts(model), called(model) as calls:
        model(pixels())
    assert len(calls) == len(model.experts)


def test_without_group_experts_nothing_is_grouped() -> None:
    model = mixture()
    with torch.no_grad(), fold_batchnorm(model), called(model) as calls:
        model(pixels())
    assert len(calls) == len(model.experts)


# ---- undone on exit


def test_grouping_is_undone() -> None:
    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with engine.attack_mode(model, "bfloat16") as frozen_model:
        input_gradient(frozen_model, pixels(), labels(), "ce")
        assert model.grouped_experts is not None
        reference = weakref.ref(model.grouped_experts)
        assert list(model.state_dict()) == list(before)
    assert model.grouped_experts is None
    gc.collect()
    assert reference() is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_grouping_is_undone_after_an_error() -> None:
    model = mixture()
    with pytest.raises(RuntimeError, match="planted"), group_experts(model):
        raise RuntimeError("planted")
    assert model.grouped_experts is None


def test_nested_grouping_is_undone_by_the_outer() -> None:
    model = mixture()
    with group_experts(model):
        outer = model.grouped_experts
        with group_experts(model):
            assert model.grouped_experts is outer
        assert model.grouped_experts is outer
    assert model.grouped_experts is None


def test_new_weights_and_statistics_are_seen() -> None:
    model = mixture()
    before = inference.predict(model, pixels(), COUNT)
    with torch.no_grad():
        for parameter in model.experts[2].parameters():
            parameter.mul_(1.3)
        moved = inference.predict(model, pixels(), COUNT)
        lived_in(model)
        later = inference.predict(model, pixels(), COUNT)
        torch.testing.assert_close(later, model(pixels()), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(moved, before, atol=1e-3)
    assert not torch.allclose(later, moved, atol=1e-5)


def learned(model: MixtureOfExperts) -> dict[str, Tensor]:
    """The state after three training steps, each on adversarial images of the current model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(3):
        draws = BatchStream(generator("test_side_by_side", "learn", step))
        with engine.attack_mode(model, "float32") as frozen_model:
            attacked = pgd(frozen_model, pixels(), labels(), ball=LInf(0.1), settings=PGD, draws=draws)
        optimizer.zero_grad()
        torch.autograd.backward(functional.nll_loss(model.train()(attacked), labels()))
        optimizer.step()
    return model.state_dict()


def test_training_goes_the_same_way() -> None:
    """Weights, running statistics and their counts; a pixel whose gradient is almost 0 may step the other way."""
    together = learned(mixture())
    with in_turn():
        plain = learned(mixture())
    assert list(together) == list(plain)
    for name, tensor in together.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, plain[name], atol=2e-3, rtol=2e-3)
        else:
            assert torch.equal(tensor, plain[name])


# ---- results must not depend on grouping


IMAGES, EPSILON = 400, 0.1
# from two starts: where an attack from one ends is a matter of the last digit for some images, whoever computes it
SETTLED = PGD.model_copy(update={"steps": 20, "restarts": 2})


def trained() -> tuple[MixtureOfExperts, Tensor, Tensor]:
    """Three experts adversarially trained on digits, and images to attack."""
    data, target = load_digits(return_X_y=True)
    images, classes = torch.from_numpy(data).float().div(16).reshape(-1, 1, 8, 8), torch.from_numpy(target)
    model = mixture(*(expert(seed, classes=10) for seed in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        rows = torch.randint(IMAGES, len(images), (64,), generator=generator("test_side_by_side", "taught", step))
        points = images[rows].requires_grad_(True)
        (gradient,) = torch.autograd.grad(functional.nll_loss(model.train()(points), classes[rows]), points)
        attacked = (images[rows] + EPSILON * gradient.sign()).clamp(0, 1).detach()
        optimizer.zero_grad()
        torch.autograd.backward(functional.nll_loss(model(attacked), classes[rows]))
        optimizer.step()
    return model.eval(), images[:IMAGES], classes[:IMAGES]


def survives(model: MixtureOfExperts, images: Tensor, classes: Tensor, precision: Precision) -> Tensor:
    """Which images (N,) are classified correctly after PGD, as evaluated."""
    attack_fn = registry.bind(SETTLED, {})
    found = engine.attack_dataset(
        model, images, classes, torch.ones_like(classes, dtype=torch.bool), attack_fn, ball=LInf(EPSILON), seed=0,
        purpose="test", precision=precision, batch_size=80,
    )  # fmt: skip
    return decided(model, found) == classes


def decided(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(images).argmax(dim=1)
    return answer


def bare(model: MixtureOfExperts, images: Tensor, classes: Tensor) -> Tensor:
    """The same by the attack alone: no folding, no bfloat16, no batches, no grouping."""
    draws = ImageStreams(0, "test", torch.arange(len(images)))

    def is_adversarial(points: Tensor, truth: Tensor) -> Tensor:
        return decided(model, points) != truth

    found = pgd(
        model, images, classes, ball=LInf(EPSILON), settings=SETTLED, draws=draws, is_adversarial=is_adversarial
    )
    return decided(model, found) == classes


def test_robust_accuracy_does_not_depend_on_grouping() -> None:
    """Robust accuracy within half a point, 98 % of the images alike, and the fast way not the weaker one."""
    model, images, classes = trained()
    plain = bare(model, images, classes)
    assert 0.2 < float(plain.double().mean()) < 0.9, "if nearly all fall or stand, agreement proves nothing"
    for precision in PRECISIONS:
        assert runs_grouped(model, images[:80], precision)
        fast = survives(model, images, classes, precision)
        assert 200 * abs(int(fast.sum()) - int(plain.sum())) <= len(plain)
        assert float((fast == plain).double().mean()) >= 0.98
        missed, gained = int((fast & ~plain).sum()), int((plain & ~fast).sum())
        assert missed - gained <= 2 * max(1, missed + gained) ** 0.5  # two standard deviations of a fair coin
