"""The floor: random points of the ball, and the bookkeeping that all attacks without gradients share."""

import pytest
import torch
from torch import Tensor

from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.interface import IsAdversarial, Model, confirm_adversarial, margin
from advmoe.attacks.noise import Noise, noise
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.runtime.machine import generator

BALLS = [LInf(0.1), L2(0.4)]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=["linf", "l2"])


class Linear:
    """Two classes, the margin of the wrong one is weight * (x - image) - gap; counts the images it was shown."""

    def __init__(self, weight_CHW: Tensor, gap: float) -> None:
        self.weight, self.gap, self.seen = weight_CHW, gap, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        # in double, so that no decision hangs on how a batch of this size is summed
        score_B = ((images_BCHW.double() - 0.5) * self.weight).sum(dim=(1, 2, 3)) - self.gap
        return torch.stack([torch.zeros_like(score_B), score_B], dim=1)


def linear(gap: float) -> Linear:
    return Linear(torch.randn(1, 4, 4, generator=generator("test_noise", "weight")), gap)


def run(
    model: Model, ball: Ball, rows: Tensor | None = None, points: int = 20, is_adversarial: IsAdversarial | None = None
) -> tuple[Tensor, Tensor]:
    """The images and what noise makes of them, all of class 0."""
    rows = torch.arange(24) if rows is None else rows
    images = (0.5 + 0.05 * torch.randn(24, 1, 4, 4, generator=generator("test_noise", "images")))[rows]
    settings, draws = Noise(kind="noise", draws=points), ImageStreams(0, "noise", rows)
    labels = torch.zeros(len(rows), dtype=torch.long)
    return images, noise(
        model, images, labels, ball=ball, settings=settings, draws=draws, is_adversarial=is_adversarial
    )


@every_ball
def test_noise_stays_inside(ball: Ball) -> None:
    images, found = run(linear(1.0), ball)
    torch.testing.assert_close(ball.project(found, images), found, atol=1e-6, rtol=0)
    assert not torch.equal(found, images)


@pytest.mark.parametrize("kind", [LInf, L2])
def test_noise_without_budget_changes_nothing(kind: type[LInf] | type[L2]) -> None:
    images, found = run(linear(1.0), kind(0.0))
    assert torch.equal(found, images)


@every_ball
def test_more_noise_is_never_weaker(ball: Ball) -> None:
    model = linear(100.0)  # nobody falls, so that the best point comes back
    losses = [margin(model(run(model, ball, points=n)[1]), torch.zeros(24, dtype=torch.long)) for n in (1, 5, 50)]
    assert (losses[1] >= losses[0]).all()
    assert (losses[2] > losses[0]).float().mean() > 0.9


def test_noise_is_far_from_the_optimum() -> None:
    """A floor: the best of 50 random points reaches a fraction of what the sign of the gradient does."""
    model = linear(100.0)
    images, found = run(model, LInf(0.1), points=50)
    gain = ((found - images) * model.weight).sum(dim=(1, 2, 3))
    assert (gain < 0.9 * 0.1 * model.weight.abs().sum()).all()


@every_ball
def test_noise_on_an_image_does_not_depend_on_its_neighbours(ball: Ball) -> None:
    few = torch.tensor([20, 3, 11])
    model = linear(0.3)
    _, together = run(model, ball)
    _, alone = run(model, ball, few)
    assert torch.equal(together[few], alone)


@every_ball
def test_noise_spends_one_query_a_point_and_fallen_images_none(ball: Ball) -> None:
    strong, weak = linear(100.0), linear(0.3)
    run(strong, ball)
    assert strong.seen == 24 * 20
    images, found = run(weak, ball)
    assert 24 < weak.seen < 24 * 20
    assert (weak(found).argmax(1) == 1).sum() > (weak(images).argmax(1) == 1).sum()


def test_noise_goes_on_where_the_caller_denies() -> None:
    model = linear(0.3)
    asked: list[Tensor] = []

    def never(points: Tensor, labels: Tensor) -> Tensor:
        assert (model(points).argmax(1) != labels).all()
        asked.append(points)
        return torch.zeros(len(points), dtype=torch.bool)

    _, denied = run(model, LInf(0.1), is_adversarial=never)
    _, best = run(linear(100.0), LInf(0.1))
    assert asked
    assert torch.equal(denied, best)


def test_noise_is_random_and_can_be_repeated() -> None:
    images, labels = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)

    def once(seed: int) -> Tensor:
        settings, draws = Noise(kind="noise", draws=2), BatchStream(generator("test_noise", seed))
        return noise(linear(100.0), images, labels, ball=LInf(0.1), settings=settings, draws=draws)

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


# ---- who counts as fallen


def test_suspects_are_believed_when_nobody_else_judges() -> None:
    suspect = torch.tensor([True, False, True])
    assert torch.equal(confirm_adversarial(suspect, torch.zeros(3, 1, 1, 1), torch.zeros(3).long(), None), suspect)


def test_only_suspects_are_judged() -> None:
    points, labels = torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([0, 1, 2, 3])
    suspect = torch.tensor([True, False, True, True])

    def judge(some: Tensor, theirs: Tensor) -> Tensor:
        assert some.flatten().tolist() == theirs.tolist() == [0, 2, 3]
        return theirs != 2

    assert confirm_adversarial(suspect, points, labels, judge).tolist() == [True, False, False, True]
    assert suspect.tolist() == [True, False, True, True]


def test_without_a_suspect_nobody_is_asked() -> None:
    def judge(points: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError((points, labels))

    nobody = torch.zeros(2, dtype=torch.bool)
    assert not confirm_adversarial(nobody, torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), judge).any()
