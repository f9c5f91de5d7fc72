"""The networks: mixture maths against float64, the gate, the backbone, and folding.

Shapes: B batch, C channel, H/W pixels, E experts, K classes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models import classifiers
from advmoe.models.gate import Gate
from advmoe.models.layers import ConvNorm, fold_batchnorm
from advmoe.models.mixture import Mixing, MixtureOfExperts, UniformGate, mix
from advmoe.models.resnet import ResNet18
from advmoe.runtime.machine import generator

MIXINGS: tuple[Mixing, ...] = ("probabilities", "logits")
both_mixings = pytest.mark.parametrize("mixing", MIXINGS)


def stream(*parts: object) -> torch.Generator:
    return generator("test_models", *parts)


def pixels(count: int, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=stream("pixels", count))


def make_resnet(seed: int = 0) -> ResNet18:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18(channels=1, classes=3, width=2, mean=(0.4,), std=(0.3,))


def make_gate(experts: int = 3, temperature: float = 1.0) -> Gate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gate(channels=1, experts=experts, width=2, temperature=temperature, mean=(0.4,), std=(0.3,))


def opinionated(gate: Gate) -> Gate:
    """The same gate with scores that differ: a fresh one has none."""
    with torch.no_grad():
        gate.score.weight.normal_(generator=stream("scores"))
    return gate


def make_mixture(mixing: Mixing = "probabilities") -> MixtureOfExperts:
    return MixtureOfExperts([make_resnet(seed) for seed in range(3)], opinionated(make_gate()), mixing)


def lived_in(model: nn.Module) -> nn.Module:
    """The model in eval mode, its BatchNorm statistics moved away from where they start."""
    model.train()
    with torch.no_grad():
        for step in range(3):
            model(torch.rand(16, 1, 8, 8, generator=stream("life", step)))
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": make_resnet,
    "gate": lambda: opinionated(make_gate()),
    "mixture": make_mixture,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


# ---- mixing


def mixed_in_float64(log_gate_BE: Tensor, logits_BEK: Tensor, mixing: Mixing) -> Tensor:
    """The formula written down directly: no log space, but twice the digits."""
    gate_BE1, logits = log_gate_BE.double().exp().unsqueeze(2), logits_BEK.double()
    if mixing == "probabilities":
        return (gate_BE1 * logits.softmax(2)).sum(1).log()
    return (gate_BE1 * logits).sum(1).softmax(1).log()


def random_parts(scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = stream("parts", seed)
    log_gate_BE = functional.log_softmax(scale * torch.randn(64, 5, generator=source), dim=1)
    return log_gate_BE, scale * torch.randn(64, 5, 10, generator=source)


@both_mixings
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_mix_agrees_with_the_formula_in_float64(mixing: Mixing, scale: float, seed: int) -> None:
    log_gate_BE, logits_BEK = random_parts(scale, seed)
    expected = mixed_in_float64(log_gate_BE, logits_BEK, mixing)
    torch.testing.assert_close(mix(log_gate_BE, logits_BEK, mixing).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_two_mixing_rules_are_different_models() -> None:
    parts = random_parts(3.0)
    assert (mix(*parts, "probabilities") - mix(*parts, "logits")).abs().max() > 0.1


@both_mixings
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_mix_returns_log_probabilities(mixing: Mixing, scale: float) -> None:
    log_probs_BK = mix(*random_parts(scale), mixing)
    torch.testing.assert_close(log_probs_BK.logsumexp(1), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(functional.log_softmax(log_probs_BK, 1), log_probs_BK, atol=1e-5, rtol=1e-6)


def contradicting(size: float) -> tuple[Tensor, Tensor]:
    """Experts that are certain, of different classes, under a gate that is certain too, or not."""
    logits_BEK = torch.full((2, 3, 4), -size)
    for expert in range(3):
        logits_BEK[:, expert, expert] = size
    scores_BE = torch.tensor([[size, -size, 0.0], [0.0, 0.0, 0.0]])
    return functional.log_softmax(scores_BE, 1), logits_BEK


@both_mixings
def test_mix_of_extreme_logits_stays_finite_and_right(mixing: Mixing) -> None:
    log_probs_BK = mix(*contradicting(1e4), mixing)
    assert torch.isfinite(log_probs_BK).all()
    # the first image: expert 0 has all the weight and says class 0; the second: three experts, a third each
    assert log_probs_BK[0].argmax() == 0
    torch.testing.assert_close(log_probs_BK[1, :3].exp(), torch.full((3,), 1 / 3), atol=1e-4, rtol=0)


@both_mixings
def test_gradient_survives_certainty(mixing: Mixing) -> None:
    """With every expert sure of class 0, the gradient towards class 1 must not underflow: attacks live on it."""
    logits_BEK = torch.zeros(1, 3, 4)
    logits_BEK[:, :, 0] = 1e4
    logits_BEK.requires_grad_(True)
    log_probs_BK = mix(torch.full((1, 3), 1 / 3).log(), logits_BEK, mixing)
    (gradient,) = torch.autograd.grad(functional.nll_loss(log_probs_BK, torch.tensor([1])), logits_BEK)
    assert torch.isfinite(gradient).all()
    # each expert has a third of the say, pushes class 0 up (in loss) and class 1 down
    torch.testing.assert_close(gradient[0, :, 0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(gradient[0, :, 1], torch.full((3,), -1 / 3))


# ---- the double softmax


def cross_entropy_is_nll_of_the_mixture(classify: nn.Module, mixture: MixtureOfExperts) -> bool:
    """Cross-entropy on top of the output must be -log p(y|x), p computed by hand from the parts in float64."""
    images, labels = pixels(12), torch.arange(12) % 3
    with torch.no_grad():
        parts = mixture.forward_parts(images)
        found = functional.cross_entropy(classify(images).double(), labels, reduction="none")
    expected = -mixed_in_float64(parts.log_gate_BE, parts.logits_BEK, mixture.mixing)[torch.arange(12), labels]
    return torch.allclose(found, expected, atol=1e-4)


@both_mixings
def test_output_needs_no_further_softmax(mixing: Mixing) -> None:
    mixture = make_mixture(mixing)
    lived_in(mixture)
    assert cross_entropy_is_nll_of_the_mixture(mixture, mixture)
    # what evaluation exports ends in a log_softmax, which changes nothing
    assert cross_entropy_is_nll_of_the_mixture(nn.Sequential(mixture, nn.LogSoftmax(1)), mixture)


@both_mixings
def test_a_second_softmax_is_caught(mixing: Mixing) -> None:
    mixture = make_mixture(mixing)
    lived_in(mixture)
    assert not cross_entropy_is_nll_of_the_mixture(nn.Sequential(mixture, nn.Softmax(1)), mixture)


def test_a_softmax_inside_an_expert_is_caught() -> None:
    mixture = make_mixture()
    lived_in(mixture)
    experts = [nn.Sequential(expert, nn.Softmax(1)) for expert in mixture.experts]
    planted = MixtureOfExperts(experts, mixture.gate, "probabilities").eval()
    assert not cross_entropy_is_nll_of_the_mixture(planted, mixture)


# ---- the mixture as a module


@both_mixings
def test_mixture_output_is_its_mixed_parts(mixing: Mixing) -> None:
    mixture = make_mixture(mixing)
    lived_in(mixture)
    images = pixels(5)
    with torch.no_grad():
        parts = mixture.forward_parts(images)
        assert torch.equal(mixture(images), parts.log_probs_BK)
        assert torch.equal(parts.log_gate_BE, mixture.gate(images))
        for position, expert in enumerate(mixture.experts):
            assert torch.equal(parts.logits_BEK[:, position], expert(images))


@both_mixings
def test_mixture_of_one_expert_is_that_expert(mixing: Mixing) -> None:
    expert = make_resnet()
    mixture = MixtureOfExperts([expert], make_gate(experts=1), mixing)
    lived_in(mixture)
    images = pixels(5)
    with torch.no_grad():
        torch.testing.assert_close(mixture(images), functional.log_softmax(expert(images), 1))


def test_uniform_mixture_is_the_mean_of_probabilities() -> None:
    mixture = make_mixture()
    lived_in(mixture)
    images = pixels(5)
    with torch.no_grad():
        ensemble = classifiers.uniform_mixture(mixture)(images).exp()
        mean = torch.stack([expert(images).softmax(1) for expert in mixture.experts]).mean(0)
        gated = mixture(images).exp()
    torch.testing.assert_close(ensemble, mean)
    assert not torch.allclose(gated, mean, atol=1e-3)


def test_gradient_reaches_gate_and_every_expert() -> None:
    mixture = make_mixture()
    mixture.train()
    loss = functional.nll_loss(mixture(pixels(8)), torch.arange(8) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    for part in (mixture.gate, *mixture.experts):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
        assert sum(float(gradient.norm()) for gradient in gradients if gradient is not None) > 0


# ---- the gate


@pytest.mark.parametrize("experts", [1, 2, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_fresh_gate_is_exactly_uniform(experts: int, temperature: float) -> None:
    gate = make_gate(experts, temperature)
    with torch.no_grad():
        log_gate_BE = gate(pixels(6))  # in train mode too
    assert torch.equal(log_gate_BE, log_gate_BE[:1, :1].expand(6, experts))
    torch.testing.assert_close(log_gate_BE, UniformGate(experts)(pixels(6)))


def test_uniform_gate_weighs_all_alike() -> None:
    torch.testing.assert_close(UniformGate(4)(pixels(6)).exp(), torch.full((6, 4), 0.25))


def test_gate_weights_sum_to_one_and_depend_on_the_image() -> None:
    gate = opinionated(make_gate(experts=5))
    lived_in(gate)
    with torch.no_grad():
        log_gate_BE = gate(pixels(6))
    torch.testing.assert_close(log_gate_BE.exp().sum(1), torch.ones(6))
    assert (log_gate_BE[0] - log_gate_BE[1]).abs().max() > 1e-4


def test_temperature_sharpens_below_one_and_softens_above() -> None:
    gate = opinionated(make_gate(experts=5))
    lived_in(gate)
    sharpness = []
    for temperature in (0.25, 0.5, 1.0, 2.0, 8.0):
        gate.temperature = temperature
        with torch.no_grad():
            sharpness.append(gate(pixels(6)).exp().amax(1).mean().item())
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[0] > sharpness[-1] + 0.05


# ---- the backbone


def test_resnet18_has_the_parameters_of_the_paper() -> None:
    """The customary CIFAR ResNet-18, counted by hand: 3x3 and 1x1 convolutions without bias, two numbers a BatchNorm
    channel, and a last layer with bias.
    """
    widths = (64, 128, 256, 512)
    stem = 3 * 64 * 9 + 2 * 64
    plain = sum(4 * width * width * 9 + 4 * 2 * width for width in widths)
    # the first convolution of stages 2 to 4 has half the channels coming in, and a 1x1 shortcut beside it
    narrower = sum(-(width // 2) * width * 9 + (width // 2) * width + 2 * width for width in widths[1:])
    last = 512 * 10 + 10
    with torch.device("meta"):  # counting needs no memory
        model = ResNet18(channels=3, classes=10, width=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == stem + plain + narrower + last == 11_173_962


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_resnet_takes_images_of_any_size(channels: int, side: int) -> None:
    model = ResNet18(channels=channels, classes=7, width=2, mean=(0.5,) * channels, std=(0.25,) * channels).eval()
    with torch.no_grad():
        assert model(pixels(4, channels, side)).shape == (4, 7)
        assert model.features(pixels(4, channels, side)).shape == (4, 16)


def test_resnet_shrinks_images_by_eight() -> None:
    """Stride 1 in the stem and the first stage: 32 pixels become 4, not 1 as in the ImageNet form."""
    model = ResNet18(channels=3, classes=7, width=2, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    with torch.no_grad():
        assert model.blocks(model.stem(pixels(1, 3, 32))).shape == (1, 16, 4, 4)


@pytest.mark.parametrize("network", ["resnet", "gate"])
def test_normalisation_is_inside(network: str) -> None:
    """A model that expects standardised pixels, fed standardised pixels, agrees with ours fed pixels in [0, 1]."""
    model = NETWORKS[network]()
    lived_in(model)
    assert isinstance(model, ResNet18 | Gate)
    images = pixels(6)
    with torch.no_grad():
        expected = model(images)
        model.normalize.mean.zero_()
        model.normalize.std.fill_(1.0)
        torch.testing.assert_close(model((images - 0.4) / 0.3), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(images), expected, atol=1e-3)


def test_normalisation_travels_with_the_weights() -> None:
    assert {"normalize.mean", "normalize.std"} <= make_resnet().state_dict().keys()


def test_normalisation_is_per_channel() -> None:
    model = ResNet18(channels=3, classes=2, width=2, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    normed = model.normalize(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(normed[0, :, 0, 0], torch.tensor([0.9, 0.4, 0.175]))


# ---- folding


@every_network
def test_folded_model_equals_the_plain_one(make: Callable[[], nn.Module]) -> None:
    model = lived_in(make())
    with torch.no_grad():
        plain = model(pixels(8))
        with fold_batchnorm(model):
            assert all(layer.is_folded for layer in model.modules() if isinstance(layer, ConvNorm))
            torch.testing.assert_close(model(pixels(8)), plain, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(pixels(8)), plain)


@every_network
def test_folding_in_the_statistics_matters(make: Callable[[], nn.Module]) -> None:
    """The case above is a real one: with fresh statistics the same weights give another output."""
    model = lived_in(make())
    with torch.no_grad():
        moved = model(pixels(8))
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
        assert not torch.allclose(model(pixels(8)), moved, atol=1e-3)


def test_folded_model_gives_the_same_input_gradients() -> None:
    model = lived_in(make_resnet())
    images = pixels(4).requires_grad_(True)
    (plain,) = torch.autograd.grad(model(images).square().sum(), images)
    with fold_batchnorm(model):
        (folded,) = torch.autograd.grad(model(images).square().sum(), images)
    torch.testing.assert_close(folded, plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-3)


def test_folded_model_follows_autocast() -> None:
    model = lived_in(make_resnet())
    with torch.no_grad(), fold_batchnorm(model):
        exact = model(pixels(8))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(pixels(8))
    assert rough.dtype == torch.float32  # the last layer is in full precision
    torch.testing.assert_close(rough, exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    assert not torch.equal(rough, exact)


def test_nested_folding_is_undone_once_and_at_the_end() -> None:
    model = lived_in(make_resnet())
    layers = [layer for layer in model.modules() if isinstance(layer, ConvNorm)]
    with torch.no_grad():
        plain = model(pixels(8))
        with fold_batchnorm(model):
            with fold_batchnorm(model):
                torch.testing.assert_close(model(pixels(8)), plain, atol=1e-4, rtol=1e-4)
            assert all(layer.is_folded for layer in layers)
            torch.testing.assert_close(model(pixels(8)), plain, atol=1e-4, rtol=1e-4)
    assert not any(layer.is_folded for layer in layers)


@pytest.mark.parametrize("part", ["stem", "stem.norm"])
def test_folding_leaves_layers_in_train_mode_as_they_are(part: str) -> None:
    model = lived_in(make_resnet())
    model.get_submodule(part).train()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ConvNorm)}
    with torch.no_grad():
        plain = model(pixels(8))
        with fold_batchnorm(model):
            assert [name for name, layer in layers.items() if not layer.is_folded] == ["stem"]
            torch.testing.assert_close(model(pixels(8)), plain, atol=1e-4, rtol=1e-4)


def test_folding_is_undone_after_an_error() -> None:
    model = lived_in(make_resnet())
    with pytest.raises(RuntimeError, match="planted"), fold_batchnorm(model):
        raise RuntimeError("planted")
    assert not any(layer.is_folded for layer in model.modules() if isinstance(layer, ConvNorm))


def test_folding_sees_new_weights_next_time() -> None:
    """Between two attack phases the optimiser moves the weights: nothing stale may be kept."""
    model = lived_in(make_resnet())
    with torch.no_grad():
        with fold_batchnorm(model):
            before = model(pixels(8))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        with fold_batchnorm(model):
            after = model(pixels(8))
        torch.testing.assert_close(after, model(pixels(8)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
