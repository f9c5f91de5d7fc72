"""The networks others use: ResNet-50 and WideResNet-28 counted by hand, and against forward passes not written here.

Shapes: B batch, C channel, H/W pixels.
"""

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional

from advmoe.models.layers import ConvNorm, fold_batchnorm
from advmoe.models.resnet50 import ResNet50
from advmoe.models.wideresnet import WideResNet28
from advmoe.runtime.machine import generator

Network = ResNet50 | WideResNet28
NETWORKS: dict[str, type[Network]] = {"resnet50": ResNet50, "wideresnet28": WideResNet28}
every_network = pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS.keys())
every_image = pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)], ids=["digits", "cifar"])


def stream(*parts: object) -> torch.Generator:
    return generator("test_models_comparators", *parts)


def pixels(count: int, channels: int = 1, side: int = 8, purpose: str = "pixels") -> Tensor:
    return torch.rand(count, channels, side, side, generator=stream(purpose, count))


def make(kind: type[Network], channels: int = 1, width: int = 4, seed: int = 0) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(channels=channels, classes=7, width=width, mean=(0.4,) * channels, std=(0.3,) * channels)


def lived_in(model: Network) -> Network:
    """The model in eval mode, its BatchNorms moved away from where they start, scales and shifts too."""
    model.train()
    channels, draws = len(model.normalize.mean.flatten()), stream("norms")
    with torch.no_grad():
        for norm in norms(model):
            norm.weight.uniform_(0.5, 1.5, generator=draws)
            norm.bias.uniform_(-0.5, 0.5, generator=draws)
        for step in range(3):
            model(torch.rand(16, channels, 8, 8, generator=stream("life", step)))
    return model.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


# ---- size


def full_size(kind: type[Network]) -> int:
    with torch.device("meta"):  # counting needs no memory
        model = kind(channels=3, classes=10, width=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet50_has_the_parameters_of_the_paper() -> None:
    """Convolutions without bias, two numbers a BatchNorm channel, a last layer with bias."""
    total = 3 * 64 * 9 + 2 * 64
    coming_in = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        total += coming_in * 4 * inner + 2 * 4 * inner  # the 1x1 shortcut of the first block
        for _ in range(blocks):
            total += coming_in * inner + 9 * inner * inner + inner * 4 * inner + 2 * (inner + inner + 4 * inner)
            coming_in = 4 * inner
    assert full_size(ResNet50) == total + 2048 * 10 + 10 == 23_520_842


def test_wideresnet28_has_the_parameters_of_the_paper() -> None:
    total = 3 * 16 * 9
    coming_in = 16
    for wide in (160, 320, 640):
        total += coming_in * wide  # the 1x1 shortcut of the first block, without a norm of its own
        for _ in range(4):
            total += 2 * coming_in + 9 * coming_in * wide + 2 * wide + 9 * wide * wide
            coming_in = wide
    assert full_size(WideResNet28) == total + 2 * 640 + 640 * 10 + 10 == 36_479_194


def test_wideresnet28_is_28_deep() -> None:
    model = make(WideResNet28)
    weighted = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    deep = [layer for layer in weighted if isinstance(layer, nn.Linear) or layer.kernel_size == (3, 3)]
    assert (len(deep), len(weighted)) == (26, 29)  # the paper's 28 counts the three shortcuts, not the last layer


@pytest.mark.parametrize(("width", "stem", "first_group"), [(64, 16, 160), (16, 4, 40), (5, 1, 12), (1, 1, 2)])
def test_width_scales_the_whole_wideresnet(width: int, stem: int, first_group: int) -> None:
    with torch.device("meta"):
        model = make(WideResNet28, width=width)
    assert model.get_parameter("stem.weight").shape[0] == stem
    leaving = [model.get_parameter(f"blocks.{position}.second.weight").shape[0] for position in range(12)]
    assert leaving == [multiple * first_group for multiple in (1, 2, 4) for _ in range(4)]


@every_network
@every_image
def test_images_of_any_size_go_in(kind: type[Network], channels: int, side: int) -> None:
    model = make(kind, channels).eval()
    with torch.no_grad():
        assert model(pixels(3, channels, side)).shape == (3, 7)
        assert model.features(pixels(3, channels, side)).shape == (3, model.classify.in_features)


# ---- the same function as others compute


def torchvision_twin(model: ResNet50) -> torchvision.models.ResNet:
    """torchvision's ResNet-50 with our stem and our numbers: both list their layers in the same order."""
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=7)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("normalize")}
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.values(), strict=True)))
    return theirs.eval()


def test_resnet50_computes_what_torchvisions_does() -> None:
    model = make(ResNet50, channels=3, width=64)
    assert isinstance(model, ResNet50)
    lived_in(model)
    images = pixels(2, 3, 16)
    with torch.no_grad():
        expected = torchvision_twin(model)((images - 0.4) / 0.3)
        torch.testing.assert_close(model(images), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


class Written:
    """The WideResNet of the paper's table 1, shortcuts as in its authors' code, as formulas in float64."""

    def __init__(self, model: WideResNet28) -> None:
        self.tensors: dict[str, Tensor] = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def conv(self, name: str, hidden: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return functional.conv2d(hidden, weight, None, stride, weight.shape[-1] // 2)

    def active(self, name: str, hidden: Tensor) -> Tensor:
        mean, var, scale, shift = (
            self.tensors[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((hidden - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def block(self, name: str, hidden: Tensor, stride: int, *, changes: bool) -> Tensor:
        active = self.active(f"{name}.norm", hidden)
        inner = self.active(f"{name}.first.norm", self.conv(f"{name}.first.conv", active, stride))
        shortcut = self.conv(f"{name}.shortcut", active, stride) if changes else hidden
        return shortcut + self.conv(f"{name}.second", inner)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        hidden = self.conv("stem", (images_BCHW.double() - 0.4) / 0.3)
        for position in range(12):
            stride = 2 if position in {4, 8} else 1
            hidden = self.block(f"blocks.{position}", hidden, stride, changes=position in {0, 4, 8})
        pooled = self.active("norm", hidden).mean((2, 3))
        return pooled @ self.tensors["classify.weight"].T + self.tensors["classify.bias"]


def test_wideresnet28_computes_what_its_formulas_say() -> None:
    model = make(WideResNet28, channels=3)
    assert isinstance(model, WideResNet28)
    lived_in(model)
    images = pixels(4, 3, 32)
    with torch.no_grad():
        expected = Written(model)(images)
        torch.testing.assert_close(model(images).double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


# ---- what attacks and checks rely on


@every_network
@every_image
def test_gradient_flows_to_every_pixel(kind: type[Network], channels: int, side: int) -> None:
    images = pixels(4, channels, side).requires_grad_(True)
    (gradient,) = torch.autograd.grad(lived_in(make(kind, channels))(images).square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).all()


@every_network
def test_gradient_flows_to_every_parameter(kind: type[Network]) -> None:
    model = make(kind).train()
    functional.cross_entropy(model(pixels(16)), torch.arange(16) % 7).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_network
@every_image
def test_folded_network_equals_the_plain_one(kind: type[Network], channels: int, side: int) -> None:
    model = lived_in(make(kind, channels))
    with torch.no_grad():
        plain = model(pixels(8, channels, side))
        with fold_batchnorm(model):
            folded = model(pixels(8, channels, side))
    torch.testing.assert_close(folded, plain, atol=1e-5 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize(("kind", "left"), [(ResNet50, 0), (WideResNet28, 13)], ids=NETWORKS.keys())
def test_every_norm_behind_a_convolution_folds(kind: type[Network], left: int) -> None:
    """What stays in a WideResNet: the norm before each of 12 blocks, and the last."""
    model = lived_in(make(kind))
    ran: list[nn.Module] = []
    for norm in norms(model):
        norm.register_forward_hook(lambda layer, _inputs, _output: ran.append(layer))
    with torch.no_grad(), fold_batchnorm(model):
        model(pixels(2))
    assert len(ran) == left
    assert len(norms(model)) == left + sum(isinstance(layer, ConvNorm) for layer in model.modules())


@every_network
def test_output_does_not_depend_on_the_neighbours(kind: type[Network]) -> None:
    model, images, others = lived_in(make(kind)), pixels(8), pixels(8, purpose="others")
    mixed = torch.cat([images[:4], others[4:]])
    with torch.no_grad():
        assert torch.equal(model(images)[:4], model(mixed)[:4])
        model.train()  # the other way round the test would see it
        assert not torch.allclose(model(images)[:4], model(mixed)[:4], atol=1e-3)


@every_network
def test_normalisation_is_inside(kind: type[Network]) -> None:
    model, images = lived_in(make(kind)), pixels(4)
    with torch.no_grad():
        expected = model(images)
        model.normalize.mean.zero_()
        model.normalize.std.fill_(1.0)
        size = float(expected.abs().max())
        torch.testing.assert_close(model((images - 0.4) / 0.3), expected, atol=1e-5 * size, rtol=0)
        assert not torch.allclose(model(images), expected, atol=1e-3 * size)


@every_network
@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
def test_bfloat16_is_near_and_ends_in_float32(kind: type[Network], fold: bool) -> None:
    model = lived_in(make(kind, channels=3))
    images = pixels(4, 3, 32)
    with torch.no_grad():
        exact = model(images)
        with (
            fold_batchnorm(model if fold else nn.Identity()),
            torch.autocast("cpu", torch.bfloat16),
        ):
            rough = model(images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    assert not torch.equal(rough, exact)


# ---- initialisation and learning


@every_network
def test_the_seed_decides_the_initial_weights(kind: type[Network]) -> None:
    first, again, other = (make(kind, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if name.endswith("conv.weight")]
    assert not any(torch.equal(first[name], other[name]) for name in changed)


@every_network
def test_convolutions_start_as_kaiming_says(kind: type[Network]) -> None:
    """Variance 2 / fan_out, fan_out = channels out x kernel area, measured on the layers of 2000 weights and more."""
    convolutions = [layer for layer in make(kind, width=16).modules() if isinstance(layer, nn.Conv2d)]
    large = [layer.weight for layer in convolutions if layer.weight.numel() > 2000]
    assert len(large) > 20
    for weight in large:
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert float(weight.detach().var()) * fan_out == pytest.approx(2, rel=0.2)


@every_network
def test_a_few_steps_learn_sixteen_images(kind: type[Network]) -> None:
    model, images, labels = make(kind).train(), pixels(16), torch.arange(16) % 7
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
