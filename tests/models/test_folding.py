"""A convolution written out as a matrix is the same convolution.

Shapes: E experts, B batch, C channel, H/W pixels.
"""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from advmoe.models.folding import MAX_PIXELS, FoldedConvCache, FoldedFilters, is_matrix_faster, is_small_map
from advmoe.models.layers import ConvNorm, fold_batchnorm
from advmoe.runtime.machine import generator

EXPERTS, CHANNELS_IN, CHANNELS_OUT, COUNT = 3, 5, 4, 6
SIDES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 5)]  # the last is larger than it is used for, and right as well
EXACT = 1e-12  # float64: only the order of sums differs


def drawn(*shape: int, purpose: str = "weights") -> Tensor:
    return torch.randn(shape, generator=generator("test_folding", purpose), dtype=torch.float64)


def layer(kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS_IN, CHANNELS_OUT, kernel, stride, padding=kernel // 2)


def experts(kernel: int, factor: float = 1.0) -> list[FoldedFilters]:
    """Weight, scale and bias of each."""
    return [
        (
            drawn(CHANNELS_OUT, CHANNELS_IN, kernel, kernel, purpose=f"weight {number}"),
            factor * drawn(CHANNELS_OUT, purpose=f"scale {number}"),
            factor * drawn(CHANNELS_OUT, purpose=f"bias {number}"),
        )
        for number in range(EXPERTS)
    ]


def convolved(maps_EBCHW: Tensor, kernel: int, stride: int) -> Tensor:
    return torch.stack(
        [
            functional.conv2d(maps, weight * scale[:, None, None, None], bias, stride, kernel // 2)
            for maps, (weight, scale, bias) in zip(maps_EBCHW, experts(kernel), strict=True)
        ]
    )


@pytest.mark.parametrize("count", [COUNT, 1, 0])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product((1, 3, 5), (1, 2))))
def test_matrices_are_the_convolution(sides: tuple[int, int], kernel: int, stride: int, count: int) -> None:
    maps = drawn(EXPERTS, count, CHANNELS_IN, *sides, purpose="maps")
    folding = FoldedConvCache(layer(kernel, stride))
    found = folding.apply_matrix(lambda: experts(kernel), maps.permute(0, 1, 3, 4, 2), torch.float64)
    expected = convolved(maps, kernel, stride)
    torch.testing.assert_close(found.permute(0, 1, 4, 2, 3), expected, atol=EXACT, rtol=0)


def test_new_weights_go_where_the_old_ones_were() -> None:
    """A recording on a GPU reads the same memory for ever."""
    folding, maps = FoldedConvCache(layer(3, 1)), drawn(EXPERTS, COUNT, 2, 2, CHANNELS_IN, purpose="maps")

    def answers(factor: float) -> list[Tensor]:
        exact, rough = (
            folding.apply_matrix(lambda: experts(3, factor), maps.to(dtype), dtype).double()
            for dtype in (torch.float64, torch.bfloat16)
        )
        return [exact, rough, folding.conv_weights(lambda: experts(3, factor), torch.float64)[0].clone()]

    before = answers(1.0)
    places = [tensor.data_ptr() for form in folding.cast.values() for tensor in form]
    assert len(places) == 6
    folding.refold(lambda: experts(3, 2.0))
    for old, new in zip(before, answers(1.0), strict=True):  # of what is kept, whatever weights it is offered
        torch.testing.assert_close(new, 2 * old, atol=EXACT, rtol=0)
    assert [tensor.data_ptr() for form in folding.cast.values() for tensor in form] == places


def test_one_type_for_each_that_is_asked_for() -> None:
    folding, maps = FoldedConvCache(layer(3, 1)), drawn(EXPERTS, COUNT, 2, 2, CHANNELS_IN, purpose="maps")
    exact = folding.apply_matrix(lambda: experts(3), maps, torch.float64)
    rough = folding.apply_matrix(lambda: experts(3), maps.bfloat16(), torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_what_is_folded_goes_with_its_network() -> None:
    """Weights of large networks must not wait for the garbage collector, which does not know of a GPU's memory."""
    gc.disable()
    try:
        model = ConvNorm(CHANNELS_IN, CHANNELS_OUT, 3).eval()
        with torch.no_grad(), fold_batchnorm(model):
            model(drawn(COUNT, CHANNELS_IN, 2, 2, purpose="maps").float())
            kept = [weakref.ref(tensor) for form in model._conv_cache.cast.values() for tensor in form]
        assert not any(tensor() is not None for tensor in kept)
        weight = weakref.ref(model.conv.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("kernel", "side", "expected"), [(3, 2, True), (1, 1, True), (1, 2, False), (3, 3, False)])
def test_a_kernel_of_one_pixel_is_a_matrix_on_one_pixel(kernel: int, side: int, expected: bool) -> None:
    assert is_matrix_faster(torch.empty(2, CHANNELS_IN, side, side), layer(kernel, 1)) is expected
    assert is_matrix_faster(torch.empty(2, CHANNELS_IN, side, side), layer(kernel, 2)) is (side < 3)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("side", "convolves"), [(1, False), (2, False), (3, True)])
def test_only_small_maps_are_multiplied(
    side: int, convolves: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ConvNorm(CHANNELS_IN, CHANNELS_OUT, 3).eval()
    images = drawn(COUNT, CHANNELS_IN, side, side, purpose="maps").float()
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    ran, conv2d = [], functional.conv2d

    def watched(*given: Any) -> Tensor:
        ran.append(side)
        return conv2d(*given)

    with torch.no_grad():
        plain = model(images)
        monkeypatch.setattr(functional, "conv2d", watched)
        with fold_batchnorm(model):
            torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    assert bool(ran) is convolves


def test_on_a_gpu_and_for_a_compiler_nothing_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, 3, 2, 2, device="cuda")
        assert not is_small_map(there)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_small_map(torch.empty(2, 3, 1, MAX_PIXELS))
    monkeypatch.undo()
    assert is_small_map(torch.empty(2, 3, 1, MAX_PIXELS))
    assert not is_small_map(torch.empty(2, 3, 1, MAX_PIXELS + 1))
