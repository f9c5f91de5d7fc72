"""FAB against closed forms, linear programs and brute force.

Shapes: B batch, C channel, H/W pixels, D pixels of an image in one row, K classes.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from advmoe.attacks.ball import L2, Ball, LInf, Norm, RandomStream
from advmoe.attacks.fab import FabT, closest_adversarial, fab_t, project_onto_plane
from advmoe.attacks.interface import IsAdversarial, Model, margin
from advmoe.attacks.random_streams import ImageStreams
from advmoe.runtime.machine import generator
from benchmarks import checkpoints

TOLERANCE = 1e-6
every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def stream(*parts: object) -> torch.Generator:
    return generator("test_fab", *parts)


def size(change: Tensor, norm: Norm) -> Tensor:
    length_B: Tensor = torch.linalg.vector_norm(change.double().flatten(1), torch.inf if norm == "linf" else 2, dim=1)
    return length_B


def dual(normals_BD: Tensor, norm: Norm) -> Tensor:
    """What a change of length 1 can gain at most."""
    length_B: Tensor = torch.linalg.vector_norm(normals_BD.double(), 1 if norm == "linf" else 2, dim=1)
    return length_B


def make_ball(norm: Norm, epsilon: float) -> Ball:
    return LInf(epsilon) if norm == "linf" else L2(epsilon)


def inner(count: int) -> Tensor:
    """Images so far from the walls that the box plays no part."""
    return 0.45 + 0.1 * torch.rand(count, 2, 3, 4, generator=stream("inner"))


def anywhere(count: int) -> Tensor:
    """Images with many pixels exactly on the walls."""
    return (torch.rand(count, 2, 3, 4, generator=stream("anywhere")) * 2 - 0.5).clamp(0, 1)


class Linear:
    """logits = W (x - 1/2) for images of 2 x 3 x 4."""

    def __init__(self, classes: int = 2) -> None:
        self.weight_KD = torch.randn(classes, 24, generator=stream("weight", classes))

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - 0.5).flatten(1) @ self.weight_KD.to(images_BCHW).T

    def uphill(self, labels_B: Tensor, targets_B: Tensor) -> Tensor:
        return self.weight_KD[targets_B] - self.weight_KD[labels_B]


class Bent:
    """A random network with one hidden layer: its boundary has corners, so every step counts."""

    def __init__(self, classes: int = 4) -> None:
        self.first = torch.randn(24, 64, generator=stream("first")) / 2
        self.second = torch.randn(64, classes, generator=stream("second"))

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return ((images_BCHW - 0.5).flatten(1) @ self.first).relu() @ self.second


class Counted:
    """A model that counts the images it was shown."""

    def __init__(self, model: Model) -> None:
        self.model, self.seen = model, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        return self.model(images_BCHW)


class Referee:
    """Confirms a point only when the model is wrong by a clear margin; keeps every point it was asked about."""

    def __init__(self, model: Model, least: float) -> None:
        self.model, self.least = model, least
        self.asked: list[Tensor] = []

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        assert (self.model(points).argmax(1) != labels).all()
        self.asked.extend(points)
        return margin(self.model(points), labels) > self.least


class NoDraws:
    """Randomness for those that need none."""

    def uniform(self, like: Tensor) -> Tensor:
        raise AssertionError(f"drew {like.shape}")

    def normal(self, like: Tensor) -> Tensor:
        raise AssertionError(f"drew {like.shape}")

    def pick(self, rows: Tensor) -> "NoDraws":
        del rows
        return self


def settings(steps: int = 20, targets: int = 9, restarts: int = 1) -> FabT:
    return FabT(kind="fab-t", steps=steps, targets=targets, restarts=restarts)


def draws_for(count: int) -> RandomStream:
    return ImageStreams(0, "fab", torch.arange(count))


def nearest(
    model: Model,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    how: FabT | None = None,
    is_adversarial: IsAdversarial | None = None,
) -> tuple[Tensor, Tensor]:
    draws = draws_for(len(images))
    return closest_adversarial(
        model, images, labels, norm=norm, settings=how or settings(), draws=draws, is_adversarial=is_adversarial
    )


def attacked(
    model: Model,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    how: FabT | None = None,
    is_adversarial: IsAdversarial | None = None,
) -> Tensor:
    draws = draws_for(len(images))
    return fab_t(
        model, images, labels, ball=ball, settings=how or settings(), draws=draws, is_adversarial=is_adversarial
    )


def confirmed(model: Model) -> IsAdversarial:
    return lambda points, labels: model(points).argmax(1) != labels


# ---- projection on a plane inside the box


def planes(rows: int, dimensions: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points, normals and gaps: walls, zero weights and both signs; `reach` is the gap's share of what the box has."""
    points = (torch.rand(rows, dimensions, generator=stream("points", dimensions)) * 2 - 0.5).clamp(0, 1)
    normals = torch.randn(rows, dimensions, generator=stream("normals", dimensions)) ** 3
    normals[torch.rand(rows, dimensions, generator=stream("zeros", dimensions)) < 0.1] = 0
    up = (torch.where(normals > 0, 1 - points, -points) * normals).sum(1)
    down = (torch.where(normals > 0, -points, 1 - points) * normals).sum(1)
    sign = torch.rand(rows, generator=stream("signs", dimensions)) < 0.5
    return points, normals, reach * torch.where(sign, up, down)


def solved(point: Tensor, normal: Tensor, gap: float, norm: Norm) -> Any:
    """The shortest change by somebody else's solver."""
    x, w = point.double().numpy(), normal.double().numpy()
    if norm == "l2":
        pinned = [{"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda _: w}]
        bounds, options = optimize.Bounds(-x, 1 - x), {"ftol": 1e-14, "maxiter": 1000}
        start = np.zeros_like(x)
        return optimize.minimize(
            lambda d: d @ d, start, jac=lambda d: 2 * d, constraints=pinned, bounds=bounds, options=options
        ).x
    size_ = len(x)  # variables: the change, then its length, which is minimised
    length = np.concatenate([np.zeros(size_), [1.0]])
    below = np.block([[np.eye(size_), -np.ones((size_, 1))], [-np.eye(size_), -np.ones((size_, 1))]])
    bounds_ = [*zip(-x, 1 - x, strict=True), (0, None)]
    return optimize.linprog(
        length, below, np.zeros(2 * size_), np.concatenate([w, [0.0]])[None], [gap], bounds=bounds_
    ).x[:-1]


@every_norm
@pytest.mark.parametrize("reach", [0.02, 0.5, 0.98])
def test_projection_is_as_short_as_a_solver_s(norm: Norm, reach: float) -> None:
    points, normals, gaps = planes(20, 7, reach)
    change = project_onto_plane(points, normals, gaps, norm)
    expected = torch.stack(
        [torch.from_numpy(solved(x, w, float(gap), norm)) for x, w, gap in zip(points, normals, gaps, strict=True)]
    )
    torch.testing.assert_close(size(change, norm), size(expected, norm), atol=1e-5, rtol=1e-4)
    if norm == "l2":  # in L-inf a solver may choose pixels below the longest freely
        torch.testing.assert_close(change.double(), expected, atol=2e-4, rtol=0)


def bisected(points: Tensor, normals: Tensor, gaps: Tensor, norm: Norm) -> Tensor:
    """Brute force in float64: halve the interval of the time at which every pixel has moved enough."""
    points, normals, gaps = points.double(), normals.double(), gaps.double()
    uphill = normals * gaps[:, None].sign()
    room = torch.where(uphill > 0, 1 - points, points)
    pace = torch.ones_like(uphill) if norm == "linf" else uphill.abs()
    low, high = torch.zeros_like(gaps), torch.full_like(gaps, 1e6)
    for _ in range(120):
        middle = (low + high) / 2
        enough = (uphill.abs() * torch.minimum(middle[:, None] * pace, room)).sum(1) >= gaps.abs()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return uphill.sign() * torch.minimum(high[:, None] * pace, room)


@every_norm
@pytest.mark.parametrize("reach", [0.001, 0.3, 0.9, 0.999])
def test_projection_is_exact_for_large_images(norm: Norm, reach: float) -> None:
    points, normals, gaps = planes(16, 3072, reach)
    change = project_onto_plane(points, normals, gaps, norm)
    gained = (change.double() * normals.double()).sum(1)
    torch.testing.assert_close(gained, gaps.double(), atol=0, rtol=2e-5)
    torch.testing.assert_close(change.double(), bisected(points, normals, gaps, norm), atol=1e-4, rtol=1e-3)
    assert (points + change >= -TOLERANCE).all()
    assert (points + change <= 1 + TOLERANCE).all()


@every_norm
def test_projection_out_of_reach_goes_to_the_walls(norm: Norm) -> None:
    points, normals, gaps = planes(16, 30, 1.5)
    change = project_onto_plane(points, normals, gaps, norm)
    walls = torch.where(normals * gaps[:, None] > 0, 1.0, 0.0)
    torch.testing.assert_close((points + change)[normals != 0], walls[normals != 0])
    assert (change[normals == 0] == 0).all()


@every_norm
def test_projection_of_a_point_on_the_plane_is_the_point(norm: Norm) -> None:
    points, normals, _ = planes(4, 30, 0.5)
    assert torch.equal(project_onto_plane(points, normals, torch.zeros(4), norm), torch.zeros(4, 30))


@every_norm
def test_projection_without_a_normal_is_finite(norm: Norm) -> None:
    points, normals, gaps = planes(4, 30, 0.5)
    assert torch.equal(project_onto_plane(points, 0 * normals, gaps, norm), torch.zeros(4, 30))


@every_norm
@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1e9])
def test_projection_does_not_depend_on_the_scale_of_the_normal(norm: Norm, scale: float) -> None:
    points, normals, gaps = planes(8, 30, 0.4)
    change = project_onto_plane(points, normals, gaps, norm)
    if scale >= 1e-12:
        torch.testing.assert_close(project_onto_plane(points, scale * normals, scale * gaps, norm), change)
    else:
        assert project_onto_plane(points, scale * normals, scale * gaps, norm).isfinite().all()


@every_norm
def test_projection_of_a_row_does_not_depend_on_the_others(norm: Norm) -> None:
    points, normals, gaps = planes(8, 30, 0.7)
    together = project_onto_plane(points, normals, gaps, norm)
    for row in range(8):
        one = slice(row, row + 1)
        torch.testing.assert_close(project_onto_plane(points[one], normals[one], gaps[one], norm), together[one])


# ---- minimal distances on linear models


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_minimal_distance_of_a_linear_model_is_reached(norm: Norm, classes: int) -> None:
    model, images = Linear(classes), inner(40)
    logits = model(images)
    labels = logits.argmax(1)
    lead = logits.gather(1, labels[:, None]) - logits  # what each other class is behind
    each = torch.stack(
        [lead[:, k] / dual(model.uphill(labels, torch.full_like(labels, k)), norm) for k in range(classes)], 1
    )
    best = each.scatter(1, labels[:, None], torch.inf).amin(1)
    points, distances = nearest(model, images, labels, norm)
    assert (model(points).argmax(1) != labels).all()
    torch.testing.assert_close(distances.double(), size(points - images, norm), atol=TOLERANCE, rtol=1e-5)
    assert (distances > best - TOLERANCE).all()
    torch.testing.assert_close(distances.double(), best, atol=1e-5, rtol=1e-3)


@every_norm
def test_minimal_distance_next_to_walls_is_a_solver_s(norm: Norm) -> None:
    model, images = Linear(), anywhere(20)
    logits = model(images)
    labels = logits.argmax(1)
    normals, behind = model.uphill(labels, 1 - labels), -margin(logits, labels)
    best = torch.stack(
        [
            torch.from_numpy(solved(x.flatten(), w, float(gap), norm))
            for x, w, gap in zip(images, normals, behind, strict=True)
        ]
    )
    assert not torch.allclose(size(best, norm), behind / dual(normals, norm), rtol=0.01)  # the walls matter
    _, distances = nearest(model, images, labels, norm)
    torch.testing.assert_close(distances.double(), size(best, norm), atol=1e-5, rtol=2e-3)


@every_norm
def test_radius_decides_on_a_linear_model(norm: Norm) -> None:
    model, images = Linear(), inner(60)
    labels = model(images).argmax(1)
    best = -margin(model(images), labels) / dual(model.uphill(labels, 1 - labels), norm)
    epsilon = float(best.median()) * 1.01
    found = attacked(model, images, labels, make_ball(norm, epsilon))
    clear = (best / epsilon - 1).abs() > 0.005
    assert torch.equal((model(found).argmax(1) != labels)[clear], (best < epsilon)[clear])


# ---- more is never worse


def case() -> tuple[Bent, Tensor, Tensor]:
    model, images = Bent(), anywhere(40)
    return model, images, model(images).argmax(1)


@every_norm
@pytest.mark.parametrize(
    "growing",
    [
        [settings(steps=steps) for steps in (1, 3, 10, 40)],
        [settings(targets=targets) for targets in (1, 2, 3)],
        [settings(steps=2, targets=1, restarts=restarts) for restarts in (1, 2, 4)],
    ],
    ids=["steps", "targets", "restarts"],
)
def test_more_is_never_worse_and_helps(norm: Norm, growing: list[FabT]) -> None:
    model, images, labels = case()
    results = [nearest(model, images, labels, norm, how)[1] for how in growing]
    for less, more in pairwise(results):
        assert (more <= less * 1.05).all()  # not 1: the final search starts from different points
        assert more.mean() <= less.mean() * 1.001
    assert (results[-1] < results[0] * 0.99).any()


@every_norm
def test_bent_boundary_is_approached_closely(norm: Norm) -> None:
    """Nothing closer lies on the line to the image, nor near the point: one percent less and it is gone."""
    model, images, labels = case()
    points, distances = nearest(model, images, labels, norm, settings(steps=60))
    assert (model(points).argmax(1) != labels).all()
    shorter = images + 0.99 * (points - images)
    assert (model(shorter).argmax(1) == labels).float().mean() > 0.9
    noise = torch.randn(200, *images.shape, generator=stream("noise"))
    near = shorter + 0.1 * distances.view(1, -1, 1, 1, 1) * noise / noise.flatten(2).norm(dim=2).view(200, -1, 1, 1, 1)
    for some in near:
        closer = size(some.clamp(0, 1) - images, norm) < 0.99 * distances
        assert not ((model(some.clamp(0, 1)).argmax(1) != labels) & closer).float().mean() > 0.1


# ---- the attack form


@every_norm
@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.3])
def test_result_is_inside_ball_and_box(norm: Norm, epsilon: float) -> None:
    model, images, labels = case()
    for is_adversarial in (None, confirmed(model)):
        found = attacked(model, images, labels, make_ball(norm, epsilon), settings(restarts=2), is_adversarial)
        assert (size(found - images, norm) <= epsilon + TOLERANCE).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert not found.requires_grad
        assert found.shape == images.shape
        if epsilon == 0:
            assert torch.equal(found, images)


@every_norm
def test_result_does_not_depend_on_batch_neighbours(norm: Norm) -> None:
    model, images, labels = case()

    def found(rows: Tensor, is_adversarial: IsAdversarial | None) -> Tensor:
        draws = ImageStreams(0, "fab", rows)
        ball = make_ball(norm, 0.1)
        how = settings(restarts=2)
        return fab_t(
            model, images[rows], labels[rows], ball=ball, settings=how, draws=draws, is_adversarial=is_adversarial
        )

    few = torch.tensor([30, 3, 11])
    for is_adversarial in (None, confirmed(model)):
        torch.testing.assert_close(
            found(few, is_adversarial), found(torch.arange(40), is_adversarial)[few], atol=1e-4, rtol=0
        )


def test_inputs_and_grad_mode_are_left_alone() -> None:
    model, images, labels = case()
    before = images.clone()
    with torch.no_grad():
        attacked(model, images, labels, LInf(0.1))
    assert torch.equal(images, before)
    assert not images.requires_grad


@every_norm
def test_image_that_is_wrong_already_is_its_own_closest_point(norm: Norm) -> None:
    model, images, labels = case()
    points, distances = nearest(model, images, (labels + 1) % 4, norm)
    assert torch.equal(points, images)
    assert torch.equal(distances, torch.zeros(40))


def test_first_restart_draws_nothing_and_later_ones_do() -> None:
    model, images, labels = case()

    def found(draws: RandomStream, restarts: int) -> Tensor:
        how = settings(steps=3, restarts=restarts)
        return closest_adversarial(model, images, labels, norm="l2", settings=how, draws=draws)[0]

    found(NoDraws(), 1)
    with pytest.raises(AssertionError, match="drew"):
        found(NoDraws(), 2)
    first, second = (found(ImageStreams(seed, "fab", torch.arange(40)), 2) for seed in (0, 1))
    assert not torch.equal(first, second)


@every_norm
def test_random_start_is_half_as_far_as_the_closest_point(norm: Norm) -> None:
    """Seen through a model that remembers what it was shown; one step, so that the start is the third look."""
    model, images, labels = Linear(), inner(10), Linear()(inner(10)).argmax(1)
    seen: list[Tensor] = []

    def remembering(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return model(points)

    closest_adversarial(
        remembering, images, labels, norm=norm, settings=settings(steps=1, restarts=2), draws=draws_for(10)
    )
    step, start = seen[2], seen[3]
    assert (model(step).argmax(1) != labels).all()
    torch.testing.assert_close(size(start - images, norm), size(step - images, norm) / 2, atol=1e-5, rtol=1e-4)


# ---- a caller who confirms


@every_norm
def test_denied_points_do_not_count(norm: Norm) -> None:
    model, images, labels = case()
    points, distances = nearest(model, images, labels, norm, is_adversarial=Referee(model, least=torch.inf))
    assert distances.isinf().all()
    assert (margin(model(points), labels) > 0).all()  # the best that there is
    epsilon = 0.05
    found = attacked(model, images, labels, make_ball(norm, epsilon), is_adversarial=Referee(model, least=torch.inf))
    assert (size(found - images, norm) <= epsilon + TOLERANCE).all()


@every_norm
def test_only_confirmed_points_count_and_they_are_close_too(norm: Norm) -> None:
    """A referee with a margin moves the boundary by that margin; the closest confirmed point is still found."""
    model, images, least = Linear(), inner(40), 0.05
    labels = model(images).argmax(1)
    points, distances = nearest(model, images, labels, norm, settings(steps=40), Referee(model, least))
    assert (margin(model(points), labels) > least).all()
    best = (least - margin(model(images), labels)) / dual(model.uphill(labels, 1 - labels), norm)
    assert (distances > best - TOLERANCE).all()
    assert (distances.double() / best).median() < 1.1


@every_norm
def test_image_leaves_at_its_first_confirmed_point_in_the_ball(norm: Norm) -> None:
    model, images, labels = case()
    epsilon = float(nearest(model, images, labels, norm)[1].quantile(0.5))  # between two images
    referee, whole, spared = Referee(model, 0.0), Counted(model), Counted(model)
    ball = make_ball(norm, epsilon)
    full = attacked(whole, images, labels, ball)
    early = attacked(spared, images, labels, ball, is_adversarial=referee)
    fallen = model(early).argmax(1) != labels
    assert 0.3 < float(fallen.float().mean()) < 0.7
    assert (model(full).argmax(1) != labels)[fallen].all()
    assert spared.seen < 0.8 * whole.seen
    for image, point in zip(images[fallen], early[fallen], strict=True):
        inside = [asked for asked in referee.asked if size((asked - image)[None], norm) <= 1.000001 * epsilon]
        assert len(inside) == 1  # asked about no other afterwards
        torch.testing.assert_close(point, inside[0], atol=TOLERANCE, rtol=0)


@every_norm
def test_final_search_stops_in_the_ball_too(norm: Norm) -> None:
    """The walk ends half a percent beyond the boundary of a linear model: only the final search gets into this ball."""
    model, images = Linear(), inner(10)
    labels = model(images).argmax(1)
    best = -margin(model(images), labels) / dual(model.uphill(labels, 1 - labels), norm)
    inside = 0
    for row in range(10):
        one, referee, epsilon = slice(row, row + 1), Referee(model, 0.0), 1.002 * float(best[row])
        found = attacked(model, images[one], labels[one], make_ball(norm, epsilon), is_adversarial=referee)
        inside += sum(bool(size(asked - images[one], norm) <= epsilon) for asked in referee.asked)
        assert model(found).argmax(1) != labels[one]
    assert inside == 10


def test_each_step_costs_one_forward_pass_with_gradient() -> None:
    model, images, labels = case()
    counted = Counted(model)
    nearest(counted, images, labels, "linf", settings(steps=7, targets=2))
    assert counted.seen == 40 * (1 + 2 * (7 + 1) + 3 * 3)  # the images; two walks and their ends; the final search


# ---- awkward models


def flat(images: Tensor) -> Tensor:
    return 0 * images.flatten(1)[:, :3]


def steep(images: Tensor) -> Tensor:
    return (1e4 * (images - 0.5).flatten(1)[:, :3]).softmax(1)  # saturated: gradients of exactly 0


def coarse(images: Tensor) -> Tensor:
    return Linear(3)(images.bfloat16()).bfloat16().float()


@every_norm
@pytest.mark.parametrize("model", [flat, steep, coarse])
def test_flat_and_coarse_models_give_finite_points(norm: Norm, model: Callable[[Tensor], Tensor]) -> None:
    images = anywhere(30)
    labels = model(images).argmax(1)
    points, distances = nearest(model, images, labels, norm, settings(restarts=2))
    assert points.isfinite().all()
    assert not distances.isnan().any()
    assert (model(points).argmax(1) != labels)[distances.isfinite()].all()
    assert attacked(model, images, labels, make_ball(norm, 0.1)).isfinite().all()


@every_norm
def test_coarse_logits_hardly_cost_distance(norm: Norm) -> None:
    images, exact = anywhere(40), Linear(3)
    labels = exact(images).argmax(1)
    _, fine = nearest(exact, images, labels, norm)
    _, rough = nearest(coarse, images, labels, norm, settings(steps=40), confirmed(exact))
    assert (rough.isfinite()).all()
    assert rough.median() < 1.1 * fine.median()


@every_norm
def test_walk_does_not_end_on_a_tie(norm: Norm) -> None:
    """Logits in steps, as bfloat16 has them: near the boundary both are equal, and the label, listed first, wins."""
    exact, images = Linear(), inner(200)
    images = images[exact(images).argmax(1) == 0]
    labels = torch.zeros(len(images), dtype=torch.int64)

    def stepped(points: Tensor) -> Tensor:
        logits = exact(points)
        return logits + ((logits * 100).round() / 100 - logits).detach()

    best = -margin(exact(images), labels) / dual(exact.uphill(labels, 1 - labels), norm)
    _, distances = nearest(stepped, images, labels, norm)
    assert distances.isfinite().all()
    assert distances.median() < 1.1 * best.median()


# ---- a network trained by others


@pytest.mark.skipif(not checkpoints.is_available(), reason=f"needs {checkpoints.FOLDER}")
def test_agrees_with_the_reference_on_a_trained_network() -> None:
    model, theirs = checkpoints.load_model("wk-fmnist").requires_grad_(False), checkpoints.load_reference("wk-fmnist")
    right, robust = theirs.clean[:100], theirs.autoattack[:100]
    images, labels = (part[right] for part in checkpoints.load_images("wk-fmnist", 100))
    found = attacked(model, images, labels, LInf(theirs.epsilon), settings(steps=20, targets=4), confirmed(model))
    standing = model(found).argmax(1) == labels
    assert not (~standing & robust[right]).any()
    assert int((standing & ~robust[right]).sum()) <= 2
