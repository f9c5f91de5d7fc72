"""A convolution written out as a matrix is the same convolution.

Shapes: E experts, B batch, C channel, H/W pixels.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from advmoe.machine import generator
from advmoe.models.folding import SMALL, Folding, small
from advmoe.models.layers import ConvNorm, folded

EXPERTS, CHANNELS_IN, CHANNELS_OUT, COUNT = 3, 5, 4, 6
SIDES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 5)]  # the last is larger than it is used for, and right as well
EXACT = 1e-12  # float64: only the order of sums differs


def drawn(*shape: int, purpose: str = "weights") -> Tensor:
    return torch.randn(shape, generator=generator("test_folding", purpose), dtype=torch.float64)


def layer(kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS_IN, CHANNELS_OUT, kernel, stride, padding=kernel // 2)


def weights(kernel: int) -> tuple[Tensor, Tensor]:
    filters = EXPERTS * CHANNELS_OUT
    return drawn(filters, CHANNELS_IN, kernel, kernel), drawn(filters, purpose="bias")


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product((1, 3, 5), (1, 2))))
def test_matrices_are_the_convolution(sides: tuple[int, int], kernel: int, stride: int) -> None:
    (weight, bias), conv = weights(kernel), layer(kernel, stride)
    maps = drawn(EXPERTS, COUNT, CHANNELS_IN, *sides, purpose="maps")
    expected = [
        functional.conv2d(each, filters, shift, stride, kernel // 2)
        for each, filters, shift in zip(maps, weight.chunk(EXPERTS), bias.chunk(EXPERTS), strict=True)
    ]
    folding = Folding(lambda: (weight, bias), conv)
    found = folding.multiplied(maps.permute(0, 1, 3, 4, 2), torch.float64)
    torch.testing.assert_close(found.permute(0, 1, 4, 2, 3), torch.stack(expected), atol=EXACT, rtol=0)


def test_new_weights_go_where_the_old_ones_were() -> None:
    """A recording on a GPU reads the same memory for ever."""
    current = [weights(3)]
    folding = Folding(lambda: current[0], layer(3, 1))
    maps = drawn(EXPERTS, COUNT, 2, 2, CHANNELS_IN, purpose="maps")
    before = folding.multiplied(maps, torch.float64)
    folding.convolution(torch.float64)
    places = [tensor.data_ptr() for form in folding.kept.values() for tensor in form]
    current[0] = (2 * current[0][0], 2 * current[0][1])
    folding.renew()
    torch.testing.assert_close(folding.multiplied(maps, torch.float64), 2 * before, atol=EXACT, rtol=0)
    assert torch.equal(folding.convolution(torch.float64)[0], current[0][0])
    assert [tensor.data_ptr() for form in folding.kept.values() for tensor in form] == places


def test_one_type_for_each_that_is_asked_for() -> None:
    folding = Folding(lambda: weights(3), layer(3, 1))
    maps = drawn(EXPERTS, COUNT, 2, 2, CHANNELS_IN, purpose="maps")
    exact = folding.multiplied(maps, torch.float64)
    rough = folding.multiplied(maps.bfloat16(), torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("side", "convolves"), [(1, False), (2, False), (3, True)])
def test_only_small_maps_are_multiplied(
    side: int, convolves: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ConvNorm(CHANNELS_IN, CHANNELS_OUT, 3).eval()
    images = drawn(COUNT, CHANNELS_IN, side, side, purpose="maps").float()
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    convolved, conv2d = [], functional.conv2d

    def watched(*given: Any) -> Tensor:
        convolved.append(side)
        return conv2d(*given)

    with torch.no_grad():
        plain = model(images)
        monkeypatch.setattr(functional, "conv2d", watched)
        with folded(model):
            torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    assert bool(convolved) is convolves


def test_on_a_gpu_nothing_is_multiplied() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, 3, 2, 2, device="cuda")
        assert not small(there)
    assert small(torch.empty(2, 3, 1, SMALL))
    assert not small(torch.empty(2, 3, 1, SMALL + 1))
