"""Square Attack: random search that never sees a gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.interface import IsAdversarial, Model, margin
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.square import (
    QUERIES_PER_DRAW,
    Square,
    Window,
    change_window_l2,
    change_window_linf,
    offsets_in_window,
    pyramids,
    square,
    window_side,
)
from advmoe.runtime.machine import generator

SHAPES = [(1, 1, 8, 8), (5, 3, 4, 6), (16, 2, 3, 1), (3, 1, 1, 1), (2, 3, 11, 5)]
every_ball = pytest.mark.parametrize("ball", [LInf(0.1), L2(0.4)], ids=["linf", "l2"])
# gaps that some images of the cloud cross soon, some late and some never
every_cloud = pytest.mark.parametrize(("ball", "gap"), [(LInf(0.1), 2.4), (L2(0.4), 1.6)], ids=["linf", "l2"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def settings(queries: int = 200, p_init: float = 0.8) -> Square:
    return Square(kind="square", queries=queries, p_init=p_init)


class Linear:
    """Two classes: the margin of class 1 is weight * (x - 1/2) - gap; counts the images it was shown."""

    def __init__(self, shape_CHW: tuple[int, ...], gap: float = 100.0) -> None:
        self.weight = torch.randn(shape_CHW, generator=generator("test_square", "weight", *shape_CHW))
        self.gap, self.seen = gap, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        # in double, so that no decision hangs on how a batch of this size is summed
        score_B = ((images_BCHW.double() - 0.5) * self.weight).sum(dim=(1, 2, 3)) - self.gap
        return torch.stack([torch.zeros_like(score_B), score_B], dim=1)

    def gain(self, found: Tensor, images: Tensor) -> Tensor:
        """How much the loss rose, (B,)."""
        return ((found - images).double() * self.weight).sum(dim=(1, 2, 3))


class Blind(torch.autograd.Function):
    """Passes pixels on, refuses gradients."""

    @staticmethod
    def forward(context: object, pixels: Tensor) -> Tensor:
        del context
        return pixels.clone()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        del context, gradients
        raise AssertionError("somebody asked for a gradient")


def inner(shape: tuple[int, ...]) -> Tensor:
    """Images whose balls the box never cuts."""
    return 0.48 + 0.04 * torch.rand(shape, generator=generator("test_square", "inner", *shape))


def anywhere(shape: tuple[int, ...]) -> Tensor:
    """Images with many pixels exactly on the walls."""
    return (torch.rand(shape, generator=generator("test_square", "anywhere", *shape)) * 2 - 0.5).clamp(0, 1)


def never(points: Tensor, labels: Tensor) -> Tensor:
    """A caller who denies everything."""
    del labels
    return torch.zeros(len(points), dtype=torch.bool)


def cloud() -> Tensor:
    """Images at all distances from the boundary."""
    return 0.5 + 0.05 * torch.randn(40, 1, 6, 6, generator=generator("test_square", "cloud"))


def run(
    model: Model,
    images: Tensor,
    ball: Ball,
    numbers: Square | None = None,
    rows: Tensor | None = None,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    """The attack on images that are all of class 0."""
    draws = ImageStreams(0, "square", torch.arange(len(images)) if rows is None else rows)
    labels = torch.zeros(len(images), dtype=torch.long)
    return square(
        model, images, labels, ball=ball, settings=numbers or settings(), draws=draws, is_adversarial=is_adversarial
    )


@every_ball
@every_shape
def test_square_stays_inside(ball: Ball, shape: tuple[int, ...]) -> None:
    images, model = anywhere(shape), Linear(shape[1:])
    before = images.clone()
    found = run(model, images, ball)
    assert found.shape == images.shape
    assert torch.isfinite(found).all()
    torch.testing.assert_close(ball.project(found, images), found, atol=1e-6, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", [LInf, L2])
@every_shape
def test_square_without_budget_changes_nothing(kind: Callable[[float], Ball], shape: tuple[int, ...]) -> None:
    images = anywhere(shape)
    assert torch.equal(run(Linear(shape[1:]), images, kind(0.0)), images)


# ---- how strong it is on a linear model, where the optimum is known


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 4, 6)], ids=str)
def test_linf_square_nearly_reaches_the_optimum_of_a_linear_model(shape: tuple[int, ...]) -> None:
    images, model, ball = inner(shape), Linear(shape[1:]), LInf(0.1)
    found = run(model, images, ball, settings(3000))
    optimum = float(ball.epsilon * model.weight.abs().sum())
    assert (model.gain(found, images) > 0.97 * optimum).all()
    assert (model.gain(found, images) < 1.0001 * optimum).all()


def test_linf_square_reaches_the_corners_of_the_image() -> None:
    """AutoAttack's code never moves the last row and column with a small window."""
    shape = (6, 1, 5, 5)
    images, model, ball = inner(shape), Linear(shape[1:]), LInf(0.1)
    change = run(model, images, ball, settings(3000)) - images
    right = change.sign() == model.weight.sign()
    assert right[:, :, -1].float().mean() > 0.95
    assert right[:, :, :, -1].float().mean() > 0.95


def test_l2_square_gets_far_on_a_linear_model() -> None:
    shape = (4, 1, 8, 8)
    images, model, ball = inner(shape), Linear(shape[1:]), L2(0.4)
    optimum = float(ball.epsilon * model.weight.norm())
    reached = [float(model.gain(run(model, images, ball, settings(n)), images).min()) / optimum for n in (1, 100, 2000)]
    assert reached[0] < 0.5
    assert reached == sorted(reached)
    assert 0.65 < reached[-1] <= 1.0001  # AutoAttack's code gets to 0.54 here


@every_ball
def test_square_spends_the_whole_radius(ball: Ball) -> None:
    images, model = inner((4, 2, 8, 8)), Linear((2, 8, 8))
    change = run(model, images, ball) - images
    if isinstance(ball, LInf):
        torch.testing.assert_close(change.abs(), torch.full_like(change, ball.epsilon), atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((4,), ball.epsilon), atol=1e-5, rtol=0)


@every_ball
def test_who_never_falls_gets_the_best_point_seen(ball: Ball) -> None:
    images, model, labels = inner((4, 1, 6, 6)), Linear((1, 6, 6)), torch.zeros(4, dtype=torch.long)
    seen: list[Tensor] = []

    def recording(points: Tensor) -> Tensor:
        logits = model(points)
        seen.append(margin(logits, labels))
        return logits

    found = run(recording, images, ball)
    torch.testing.assert_close(margin(model(found), labels), torch.stack(seen).amax(0), atol=1e-5, rtol=0)


# ---- queries


@every_ball
@pytest.mark.parametrize(
    "queries", [1, 2, QUERIES_PER_DRAW, QUERIES_PER_DRAW + 1, QUERIES_PER_DRAW + 2, 2 * QUERIES_PER_DRAW + 7]
)
def test_the_budget_is_hard(ball: Ball, queries: int) -> None:
    model = Linear((1, 4, 4))
    run(model, inner((7, 1, 4, 4)), ball, settings(queries))
    assert model.seen == 7 * queries


@every_cloud
def test_fallen_images_cost_nothing_and_stay_fallen(ball: Ball, gap: float) -> None:
    images, model = cloud(), Linear((1, 6, 6), gap)
    found = run(model, images, ball)
    assert model.seen < 0.95 * 40 * 200
    fallen = model(found).argmax(1) == 1
    assert 5 < fallen.sum() < 40
    # an image leaves at its first such point, which need not be the best one of all
    best = run(model, images, ball, is_adversarial=never)
    assert (model.gain(best, images) >= model.gain(found, images) - 1e-5).all()
    assert torch.equal(best[~fallen], found[~fallen])


@every_cloud
def test_square_on_an_image_does_not_depend_on_its_neighbours(ball: Ball, gap: float) -> None:
    """Some images fall early, so that later ones move up in the batch: their random numbers must not."""
    images, few, model = cloud(), torch.tensor([30, 3, 11, 12]), Linear((1, 6, 6), gap)
    together = run(model, images, ball, settings(2 * QUERIES_PER_DRAW + 20))
    assert (model(together).argmax(1) == 1).any()
    assert torch.equal(run(model, images[few], ball, settings(2 * QUERIES_PER_DRAW + 20), few), together[few])


# ---- with a caller who confirms


def test_denied_images_go_on_and_the_verdict_ends_them() -> None:
    images, model, ball = cloud(), Linear((1, 6, 6), gap=2.2), LInf(0.1)
    labels = torch.zeros(40, dtype=torch.long)
    believed: list[Tensor] = []

    def strict(points: Tensor, theirs: Tensor) -> Tensor:
        losses = margin(model(points), theirs)
        assert (losses > 0).all()
        believed.extend(points[losses > 0.3])
        return losses > 0.3

    found = run(model, images, ball, is_adversarial=strict)
    fallen = margin(model(found), labels) > 0.3
    assert 0 < fallen.sum() < 40
    assert (margin(model(found), labels)[~fallen] > 0).any()  # denied to the end
    assert torch.equal(torch.stack(sorted(believed, key=key)), torch.stack(sorted(found[fallen], key=key)))


def key(point: Tensor) -> list[float]:
    return [float(number) for number in point.flatten()]


def test_who_is_always_denied_gets_the_whole_search() -> None:
    images, model = inner((9, 1, 6, 6)), Linear((1, 6, 6), 1.0)
    denied = run(model, images, LInf(0.1), is_adversarial=never)
    assert model.seen == 9 * 200
    assert (model(denied).argmax(1) == 1).all()
    assert (model.gain(denied, images) > model.gain(run(model, images, LInf(0.1)), images)).all()


@every_ball
def test_square_asks_for_no_gradient(ball: Ball) -> None:
    images, linear = inner((3, 1, 6, 6)), Linear((1, 6, 6))
    scale = torch.ones(1, requires_grad=True)

    def model(points: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        passed: Tensor = Blind.apply(points)
        return linear(passed * scale)

    with torch.enable_grad():
        found = run(model, images, ball)
    assert not found.requires_grad
    assert torch.equal(found, run(linear, images, ball))


# ---- windows


def test_the_schedule_is_the_papers_stretched_to_the_budget() -> None:
    """Section 3.2 and appendix: from p = 0.8 on 32 x 32 pixels, at 10,000 queries and at half of them."""
    starts = {0: 29, 11: 20, 51: 14, 201: 10, 501: 7, 1001: 5, 2001: 4, 4001: 3, 6001: 2, 8001: 1}
    for query, side in starts.items():
        assert window_side(query, settings(10_000), 32, 32) == side == round(math.sqrt(0.8 * 1024 / 2 ** place(query)))
        assert window_side(max(query - 1, 0), settings(10_000), 32, 32) == (29 if query < 12 else before(starts, query))
        assert window_side(-(-query // 2), settings(5000), 32, 32) == side


def place(query: int) -> int:
    return [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001].index(query)


def before(starts: dict[int, int], query: int) -> int:
    return starts[max(start for start in starts if start < query)]


def test_a_window_fits_the_image() -> None:
    assert window_side(0, settings(p_init=1.0), 3, 12) == 3
    assert window_side(199, settings(p_init=0.01), 3, 3) == 1


def test_every_place_of_a_window_is_alike_likely() -> None:
    numbers = torch.rand(6000, generator=generator("test_square", "places")) * 2 - 1
    first = offsets_in_window(numbers, 3, 8)[:, 0]
    counts = torch.bincount(-first, minlength=6)
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 120).all()
    assert offsets_in_window(torch.tensor([-1.0, 1.0]), 3, 8)[:, 0].tolist() == [0, -5]


def test_a_mask_is_a_square_of_its_side() -> None:
    numbers = torch.rand(50, 2, generator=generator("test_square", "mask")) * 2 - 1
    mask = Window.at(numbers, 3, torch.zeros(50, 2, 6, 9)).mask()
    assert mask.shape == (50, 1, 6, 9)
    for each in mask[:, 0]:
        rows, columns = each.nonzero().unbind(1)
        assert each.sum() == 9
        assert rows.max() - rows.min() == columns.max() - columns.min() == 2


def test_a_stamp_lies_inside_its_mask_in_either_orientation() -> None:
    numbers, pattern = torch.tensor([[-1.0, -1.0], [1.0, 0.0]]), torch.arange(1.0, 10).view(3, 3)
    window = Window.at(numbers, 3, torch.zeros(2, 1, 5, 5))
    laid = window.stamp(pattern, torch.tensor([True, False]))
    assert torch.equal(laid != 0, window.mask())
    assert torch.equal(laid[0, 0, :3, :3], pattern)
    assert torch.equal(laid[1, 0, 2:, 1:4], pattern.T)


def test_an_linf_change_pushes_one_window_to_the_ends() -> None:
    images = inner((2, 3, 6, 6))
    numbers = torch.tensor([[1.0, -1, 1, -1, -1, 0, 0, 0], [-1.0, 1, 1, 1, 1, 0, 0, 0]])
    change = change_window_linf(images + 0.1, images, numbers, 2, LInf(0.1)) - images
    expected = torch.full_like(change, 0.1)
    expected[0, 1, :2, :2] = -0.1
    expected[1, 0, 4:, 4:] = -0.1
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)


def test_an_l2_change_keeps_the_radius_and_touches_two_windows_only() -> None:
    images, ball = inner((5, 2, 9, 9)), L2(0.4)
    noise = torch.randn(images.shape, generator=generator("test_square", "l2"))
    points = ball.project(images + noise, images)
    numbers = torch.rand(5, 7, generator=generator("test_square", "numbers")) * 2 - 1
    moved = change_window_l2(points, images, numbers, 3, ball)
    torch.testing.assert_close((moved - images).flatten(1).norm(dim=1), torch.full((5,), 0.4), atol=1e-5, rtol=0)
    gains, loses = (Window.at(numbers[:, at:], 3, images).mask() for at in (2, 4))
    untouched = (~(gains | loses)).expand_as(images)
    torch.testing.assert_close(moved[untouched], points[untouched], atol=1e-5, rtol=0)
    emptied = (loses & ~gains).expand_as(images)
    torch.testing.assert_close(moved[emptied], images[emptied], atol=1e-6, rtol=0)
    assert not torch.isclose(moved, points)[gains.expand_as(images)].any()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 9, 28])
def test_pyramids_are_two_halves_of_opposite_sign_and_norm_one(side: int) -> None:
    pattern = pyramids(side)
    assert pattern.shape == (side, side)
    assert float(pattern.norm()) == pytest.approx(1)
    assert (pattern[: side // 2] > 0).all()
    assert (pattern[side // 2 :] < 0).all()
    if side > 1:
        assert float(pattern[: side // 2].norm()) == pytest.approx(0.5**0.5)


def test_a_pyramid_is_the_papers() -> None:
    """Equation 2 for a half of 2 x 5: 1 + 1/4 + 1/9 in the middle, 1/4 + 1/9 around it, 1/9 at the ends."""
    middle, around, end = 1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9
    half = torch.tensor([[end, around, around, around, end], [end, around, middle, around, end]])
    torch.testing.assert_close(pyramids(5)[:2], half / half.norm() * 0.5**0.5)


@pytest.mark.parametrize("wrong", [{"queries": 0}, {"p_init": 0.0}, {"p_init": 1.5}, {"restarts": 2}])
def test_settings_refuse_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Square.model_validate({"kind": "square", "queries": 10, "p_init": 0.8} | wrong)
