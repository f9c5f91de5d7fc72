"""RayS: decisions are all it sees."""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor

from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.rays import RayS, initial_state, next_radius, ray_points, rays, sign_blocks
from advmoe.runtime.machine import generator

SHAPES = [(1, 1, 8, 8), (5, 3, 4, 6), (16, 2, 3, 1), (3, 1, 1, 1)]
every_ball = pytest.mark.parametrize("ball", [LInf(0.1), L2(0.4)], ids=["linf", "l2"])
# gaps that some images of the cloud cross soon, some late and some never
every_cloud = pytest.mark.parametrize(("ball", "gap"), [(LInf(0.1), 2.4), (L2(0.4), 1.6)], ids=["linf", "l2"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Linear:
    """Two classes: the margin of class 1 is weight * (x - 1/2) - gap; counts the images it was shown."""

    def __init__(self, shape_CHW: tuple[int, ...], gap: float = 1.0) -> None:
        self.weight = torch.randn(shape_CHW, generator=generator("test_rays", "weight", *shape_CHW))
        self.gap, self.seen = gap, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        # in double, so that no decision hangs on how a batch of this size is summed
        score_B = ((images_BCHW.double() - 0.5) * self.weight).sum(dim=(1, 2, 3)) - self.gap
        return torch.stack([torch.zeros_like(score_B), score_B], dim=1)

    def radius(self, images: Tensor) -> Tensor:
        """The least L-inf change that fools, (B,)."""
        gap = -self(images)[:, 1]
        return gap / self.weight.abs().sum()


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
    return 0.48 + 0.04 * torch.rand(shape, generator=generator("test_rays", "inner", *shape))


def anywhere(shape: tuple[int, ...]) -> Tensor:
    """Images with many pixels exactly on the walls."""
    return (torch.rand(shape, generator=generator("test_rays", "anywhere", *shape)) * 2 - 0.5).clamp(0, 1)


def cloud(gap: float = 2.4) -> tuple[Tensor, Linear]:
    """A case in which some images fall early, some late and some never."""
    images = 0.5 + 0.05 * torch.randn(40, 1, 6, 6, generator=generator("test_rays", "cloud"))
    return images, Linear((1, 6, 6), gap)


def run(
    model: Model,
    images: Tensor,
    ball: Ball,
    queries: int = 300,
    is_adversarial: IsAdversarial | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The attack on images that are all of class 0."""
    draws = ImageStreams(0, "rays", torch.arange(len(images)) if rows is None else rows)
    labels = torch.zeros(len(images), dtype=torch.long)
    settings = RayS(kind="rays", queries=queries)
    return rays(model, images, labels, ball=ball, settings=settings, draws=draws, is_adversarial=is_adversarial)


@every_ball
@every_shape
@pytest.mark.parametrize("gap", [0.2, 1.0, 100.0])
def test_rays_stay_inside(ball: Ball, shape: tuple[int, ...], gap: float) -> None:
    images, model = anywhere(shape), Linear(shape[1:], gap)
    before = images.clone()
    found = run(model, images, ball)
    assert found.shape == images.shape
    torch.testing.assert_close(ball.project(found, images), found, atol=1e-6, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", [LInf, L2])
@every_shape
def test_rays_without_budget_change_nothing(kind: Callable[[float], Ball], shape: tuple[int, ...]) -> None:
    images = anywhere(shape)
    assert torch.equal(run(Linear(shape[1:]), images, kind(0.0)), images)


# ---- a linear model, where the nearest boundary lies along the signs of the weights


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 3, 1)], ids=str)
def test_rays_find_what_is_hardly_within_reach_and_nothing_beyond(shape: tuple[int, ...]) -> None:
    images, model = inner((1, *shape)), Linear(shape, gap=0.8)
    radius = float(model.radius(images))
    near = run(model, images, LInf(1.02 * radius), 2000)
    far = run(model, images, LInf(0.98 * radius), 2000)
    assert model(near).argmax(1).item() == 1
    assert model(far).argmax(1).item() == 0


def test_the_best_ray_is_the_sign_of_the_weights() -> None:
    images, model = inner((4, 1, 8, 8)), Linear((1, 8, 8), gap=0.8)
    found = run(model, images, LInf(0.5 * float(model.radius(images).min())), 3000)
    heavy = (model.weight.abs() > 0.1).expand_as(images)  # light pixels hardly move the boundary
    assert torch.equal((found - images).sign()[heavy], model.weight.sign().expand_as(images)[heavy])


def test_l2_rays_reach_what_equal_sizes_in_all_pixels_can() -> None:
    images, model = inner((1, 1, 6, 6)), Linear((1, 6, 6), gap=0.8)
    radius = float(model.radius(images)) * 6  # the L2 norm of that corner of the cube
    assert model(run(model, images, L2(1.03 * radius), 2000)).argmax(1).item() == 1
    assert model(run(model, images, L2(0.97 * radius), 2000)).argmax(1).item() == 0


# ---- queries


@every_ball
@pytest.mark.parametrize("queries", [1, 2, 3, 50, 257])
def test_the_budget_is_hard(ball: Ball, queries: int) -> None:
    model = Linear((1, 4, 4), gap=100.0)
    run(model, inner((7, 1, 4, 4)), ball, queries)
    assert model.seen == 7 * queries


@every_cloud
def test_an_image_leaves_at_the_first_point_inside(ball: Ball, gap: float) -> None:
    images, model = cloud(gap)
    seen: list[Tensor] = []

    def recording(points: Tensor) -> Tensor:
        seen.append(points.clone())
        return model(points)

    found = run(recording, images, ball)
    fallen = model(found).argmax(1) == 1
    assert 5 < fallen.sum() < 40
    assert sum(len(points) for points in seen) < 0.95 * 40 * 300
    asked = {tuple(point.flatten().tolist()) for points in seen for point in points}
    assert {tuple(point.flatten().tolist()) for point in found[fallen]} <= asked


def test_more_queries_never_lose_an_image() -> None:
    images, model = cloud()
    fallen = [model(run(model, images, LInf(0.1), queries)).argmax(1) == 1 for queries in (3, 30, 300)]
    assert (fallen[0] <= fallen[1]).all()
    assert (fallen[1] <= fallen[2]).all()
    assert fallen[0].sum() < fallen[2].sum()


@every_cloud
def test_rays_on_an_image_do_not_depend_on_its_neighbours(ball: Ball, gap: float) -> None:
    images, model = cloud(gap)
    few = torch.tensor([30, 3, 11, 12])
    assert torch.equal(run(model, images[few], ball, rows=few), run(model, images, ball)[few])


# ---- decisions only


@every_ball
@pytest.mark.parametrize(
    "disguise", [torch.exp, lambda logits: 8 * logits - 7, lambda logits: logits.argsort(1).argsort(1)]
)
def test_only_the_decision_is_read(ball: Ball, disguise: Callable[[Tensor], Tensor]) -> None:
    images, model = cloud()
    assert torch.equal(run(lambda points: disguise(model(points)), images, ball), run(model, images, ball))


@every_ball
def test_rays_ask_for_no_gradient(ball: Ball) -> None:
    images, linear = cloud()
    scale = torch.ones(1, requires_grad=True)

    def model(points: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        passed: Tensor = Blind.apply(points)
        return linear(passed * scale)

    with torch.enable_grad():
        found = run(model, images, ball)
    assert not found.requires_grad
    assert torch.equal(found, run(linear, images, ball))


# ---- with a caller who confirms


def test_the_caller_is_asked_about_wrong_points_inside_only() -> None:
    images, model = cloud()
    ball = LInf(0.1)

    def judge(points: Tensor, labels: Tensor) -> Tensor:
        assert len(points)
        assert (model(points).argmax(1) != labels).all()
        nearest = (points[:, None] - images[None]).abs().amax(dim=(2, 3, 4)).amin(1)
        assert (nearest <= ball.epsilon + 1e-6).all()
        return torch.ones(len(points), dtype=torch.bool)

    assert torch.equal(run(model, images, ball, is_adversarial=judge), run(model, images, ball))


def test_denied_images_go_on_until_the_verdict() -> None:
    """The caller wants a clear margin: the search must go below epsilon by the model's own decisions to get there."""
    images, model = cloud()
    believed: list[Tensor] = []

    def strict(points: Tensor, labels: Tensor) -> Tensor:
        del labels
        clear = model(points)[:, 1] > 0.3
        believed.extend(points[clear])
        return clear

    found = run(model, images, LInf(0.1), 2000, strict)
    fallen = model(found)[:, 1] > 0.3
    # all whose optimum passes with something to spare
    reachable = 0.1 * model.weight.abs().sum() + model(images)[:, 1] > 0.3 + 0.1
    assert (fallen >= reachable).all()
    assert 0 < fallen.sum() == len(believed) < 40


def test_who_is_always_denied_gets_the_end_of_the_best_ray() -> None:
    images, model = cloud()
    found = run(model, images, LInf(0.1), 1000, lambda points, _: torch.zeros(len(points)).bool())
    torch.testing.assert_close((found - images).abs(), torch.full_like(images, 0.1), atol=1e-6, rtol=0)
    assert ((found - images).sign() == model.weight.sign()).float().mean() > 0.9


def test_rays_of_an_image_with_hardly_a_way_out_take_every_second_flip() -> None:
    """Few corners of the box are of class 1, none of them near white: flips of one fixed ray would never meet it."""
    images, model = inner((8, 1, 6, 6)), Linear((1, 6, 6), gap=6.0)
    seen: list[Tensor] = []

    def recording(points: Tensor) -> Tensor:
        logits = model(points)
        seen.append(logits[:, 1] > 0)
        return logits

    run(recording, images, LInf(0.1), 2000)
    assert torch.stack(seen).any(dim=0).all()


# ---- blocks


def test_the_first_ray_is_as_long_as_the_box() -> None:
    images = anywhere((3, 2, 4, 5))
    for ball in (LInf(0.1), L2(0.1)):
        search = initial_state(images)
        ends = ray_points(images, search.signs_bCHW, next_radius(search, ball), ball)
        torch.testing.assert_close(ends, torch.ones_like(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pixels", [1, 2, 3, 7, 64, 100])
def test_sweeps_cover_all_pixels_in_ever_finer_blocks(pixels: int) -> None:
    blocks = sign_blocks(pixels)
    assert next(blocks) == (0, 0)
    widest = pixels
    while widest > 1:
        widest = min(widest, one_sweep(blocks, pixels))
    assert list(islice(blocks, 2 * pixels))[-pixels:] == [(pixel, pixel + 1) for pixel in range(pixels)]


def one_sweep(blocks: object, pixels: int) -> int:
    """Takes the blocks of one sweep; the size of the largest."""
    end, sizes = 0, []
    while end < pixels:
        start, stop = next(blocks)  # type: ignore[call-overload]
        assert start == end < stop
        end = stop
        sizes.append(stop - start)
    assert max(sizes) - min(sizes) <= 1
    return int(max(sizes))
