"""Three published robust classifiers, as independent models for the benchmarks.

Their folder is not part of the project; its README names the source of each network. The weights are npz arrays with
PyTorch names, read without pickle.

Shapes: B batch, C channel, H/W pixels.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.data.sources.npz import read_npz
from advmoe.models.layers import Normalize

FOLDER = Path(os.environ.get("BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Block(nn.Module):
    """A residual block without BatchNorm; the shortcut is a 1x1 convolution if the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride)) if changes else nn.Sequential()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Maps features (B, C, H, W) to features."""
        hidden = self.conv2(torch.relu(self.conv1(images_BCHW)))
        return torch.relu(hidden + self.shortcut(images_BCHW))


class ResNet4b(nn.Module):
    """A ResNet with two stages of two blocks, for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
        self.layer2 = nn.Sequential(Block(32, 32, 2), Block(32, 32, 1))
        self.linear1 = nn.Linear(512, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Maps pixels in [0, 1] to logits (B, 10)."""
        hidden = torch.relu(self.conv1(self.normalize(images_BCHW)))
        hidden = self.layer2(self.layer1(hidden)).flatten(1)
        logits: Tensor = self.linear2(torch.relu(self.linear1(hidden)))
        return logits


class SmallCnn(nn.Module):
    """A network of four convolutions and three linear layers, for MNIST."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"conv1": (1, 32), "conv2": (32, 32), "conv3": (32, 64), "conv4": (64, 64)}
        self.feature_extractor = nn.ModuleDict({name: nn.Conv2d(*width, 3) for name, width in widths.items()})
        sizes = {"fc1": (1024, 200), "fc2": (200, 200), "fc3": (200, 10)}
        self.classifier = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Maps pixels in [0, 1] to logits (B, 10)."""
        hidden = images_BCHW
        for name, convolution in self.feature_extractor.items():
            hidden = torch.relu(convolution(hidden))
            if name in {"conv2", "conv4"}:
                hidden = nn.functional.max_pool2d(hidden, 2)
        hidden = hidden.flatten(1)
        for name in ("fc1", "fc2"):
            hidden = torch.relu(self.classifier[name](hidden))
        logits: Tensor = self.classifier["fc3"](hidden)
        return logits


def wong_kolter() -> nn.Module:
    """Returns a network of two convolutions and two linear layers, for Fashion-MNIST (Wong & Kolter 2018)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


@dataclass(frozen=True)
class Checkpoint:
    """Factory of a network, and the names of the files with weights, images and reference decisions."""

    factory: Callable[[], nn.Module]
    weights: str
    images: str
    reference: str


CHECKPOINTS = {
    "resnet4b-cifar": Checkpoint(ResNet4b, "resnet4b_cifar", "cifar10_test_first200", "ref_resnet4b"),
    "trades-mnist": Checkpoint(SmallCnn, "trades_mnist_smallcnn", "mnist_test_first200", "ref_trades"),
    "wk-fmnist": Checkpoint(wong_kolter, "wk_fmnist_eps0.1", "fashion_mnist_test_first200", "ref_wk_fmnist"),
}


def is_available() -> bool:
    """Returns whether the folder exists."""
    return (FOLDER / "checkpoints").is_dir()


def load_model(name: str) -> nn.Module:
    """Returns the network with its weights, in eval mode."""
    checkpoint = CHECKPOINTS[name]
    network = checkpoint.factory()
    problems = network.load_state_dict(_tensors(FOLDER / "checkpoints" / f"{checkpoint.weights}.npz"), strict=False)
    added = {"normalize.mean", "normalize.std"}  # the source normalises outside the network
    assert not problems.unexpected_keys
    assert set(problems.missing_keys) <= added
    return network.eval()


def load_images(name: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Returns the first `count` test images (N, C, H, W) in [0, 1], and their labels (N,)."""
    labelled, _ = read_npz(FOLDER / f"{CHECKPOINTS[name].images}.npz")
    return torch.from_numpy(labelled.images[:count]).float() / 255, torch.from_numpy(labelled.labels[:count])


@dataclass(frozen=True)
class ReferenceDecisions:
    """Correctness of the first N images, clean and under the reference AutoAttack, as bool (N,)."""

    epsilon: float
    clean: Tensor
    autoattack: Tensor


def load_reference(name: str) -> ReferenceDecisions:
    """Returns the reference's decisions."""
    with np.load(FOLDER / "reference" / f"{CHECKPOINTS[name].reference}.npz", allow_pickle=False) as file:
        clean, robust = (torch.from_numpy(file[key]) for key in ("clean_correct", "autoattack_correct"))
        return ReferenceDecisions(float(file["epsilon"]), clean, robust)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}
