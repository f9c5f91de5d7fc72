"""APGD against closed forms, against a slow transcript of the algorithm, and against real networks.

Shapes: B batch, C channel, H/W pixels, K classes, D pixels of an image in one row, T evaluations of the model.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from advmoe.attacks.apgd import ApgdCe, ApgdT, apgd_ce, apgd_t, dlr, random_start, step_size_checkpoints, targeted_dlr
from advmoe.attacks.ball import L2, Ball, LInf, Norm
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.attacks.random_streams import ImageStreams
from advmoe.runtime.machine import generator
from benchmarks import checkpoints as published

SHAPE = (1, 4, 4)
EPSILONS: dict[Norm, float] = {"linf": 0.05, "l2": 0.2}
every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
every_kind = pytest.mark.parametrize("kind", ["ce", "t"])


def stream(*parts: object) -> torch.Generator:
    return generator("test_apgd", *parts)


def make_ball(norm: Norm, epsilon: float | None = None) -> Ball:
    epsilon = EPSILONS[norm] if epsilon is None else epsilon
    return LInf(epsilon) if norm == "linf" else L2(epsilon)


def size(change_BCHW: Tensor, norm: Norm) -> Tensor:
    length_B: Tensor = torch.linalg.vector_norm(change_BCHW.flatten(1), torch.inf if norm == "linf" else 2, dim=1)
    return length_B


def inner(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Images so far from the walls 0 and 1 that the box never cuts the balls used here; float64: no rounding noise."""
    return 0.4 + 0.2 * torch.rand((count, *shape), generator=stream("inner"), dtype=torch.float64)


class Waves:
    """A smooth network whose loss goes up and down many times within a ball."""

    def __init__(self, classes: int, frequency: float = 15.0) -> None:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=stream("waves", *size), dtype=torch.float64)

        pixels, hidden = int(np.prod(SHAPE)), 32
        self.inward = frequency * normal(pixels, hidden) / pixels**0.5
        self.outward = normal(hidden, classes) / hidden**0.5
        self.seen: list[Tensor] = []

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen.append(images_BCHW.detach())
        logits_BK: Tensor = torch.sin(images_BCHW.flatten(1) @ self.inward) @ self.outward
        return logits_BK

    @property
    def passes(self) -> int:
        return sum(len(points) for points in self.seen)


class Linear:
    """logits = W (x - 1/2): what a ball can do to it is known."""

    def __init__(self, classes: int, scale: float = 0.3) -> None:
        size = (classes, int(np.prod(SHAPE)))
        self.weight_KD = scale * torch.randn(size, generator=stream("linear", classes), dtype=torch.float64)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - 0.5).flatten(1) @ self.weight_KD.T

    def reach(self, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
        """By how much the best wrong class can get ahead of the true one inside the ball (B,), the box left aside."""
        logits_BK = self(images_BCHW)
        rows_BKD = self.weight_KD[None] - self.weight_KD[labels_B][:, None]
        dual = torch.linalg.vector_norm(rows_BKD, 1 if isinstance(ball, LInf) else 2, dim=2)
        ahead_BK = logits_BK - logits_BK.gather(1, labels_B[:, None]) + ball.epsilon * dual
        best_B: Tensor = ahead_BK.scatter(1, labels_B[:, None], -torch.inf).amax(dim=1)
        return best_B


def labels_of(model: Model, images_BCHW: Tensor) -> Tensor:
    return model(images_BCHW).argmax(dim=1)


def never(points: Tensor, labels: Tensor) -> Tensor:
    """A caller who confirms nothing: every ascent goes to its end."""
    del points
    return torch.zeros_like(labels, dtype=torch.bool)


def attack(
    kind: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    is_adversarial: IsAdversarial | None = None,
    *,
    steps: int = 20,
    targets: int = 9,
    restarts: int = 1,
    numbers: Tensor | None = None,
) -> Tensor:
    draws = ImageStreams(0, "apgd", torch.arange(len(images)) if numbers is None else numbers)
    if kind == "ce":
        ce = ApgdCe(kind="apgd-ce", steps=steps, restarts=restarts)
        return apgd_ce(model, images, labels, ball=ball, settings=ce, draws=draws, is_adversarial=is_adversarial)
    t = ApgdT(kind="apgd-t", steps=steps, targets=targets, restarts=restarts)
    return apgd_t(model, images, labels, ball=ball, settings=t, draws=draws, is_adversarial=is_adversarial)


# ---- settings


@pytest.mark.parametrize("missing", ["steps", "targets", "restarts"])
def test_settings_have_no_defaults(missing: str) -> None:
    full = {"kind": "apgd-t", "steps": 100, "targets": 9, "restarts": 1}
    assert ApgdT.model_validate(full).targets == 9
    with pytest.raises(ValidationError):
        ApgdT.model_validate({key: value for key, value in full.items() if key != missing})


# ---- losses


LOGITS = torch.tensor([[4.0, 1.0, 3.0, 0.0]])


@pytest.mark.parametrize(("label", "expected"), [(0, -1 / 3), (2, 1 / 3), (1, 1.0), (3, 4 / 3)])
def test_dlr_by_hand(label: int, expected: float) -> None:
    assert float(dlr(LOGITS, torch.tensor([label]))) == pytest.approx(expected)


@pytest.mark.parametrize(("label", "target", "expected"), [(0, 1, -3 / 3.5), (0, 2, -1 / 3.5), (1, 0, 3 / 3.5)])
def test_targeted_dlr_by_hand(label: int, target: int, expected: float) -> None:
    assert float(targeted_dlr(LOGITS, torch.tensor([label]), torch.tensor([target]))) == pytest.approx(expected)


def test_dlr_losses_know_neither_scale_nor_offset() -> None:
    logits = torch.randn(50, 6, generator=stream("scale"))
    labels, targets = torch.arange(50) % 6, (torch.arange(50) + 2) % 6
    torch.testing.assert_close(dlr(1e4 * logits + 5, labels), dlr(logits, labels), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        targeted_dlr(1e4 * logits + 5, labels, targets), targeted_dlr(logits, labels, targets), atol=1e-4, rtol=1e-4
    )


def test_dlr_is_positive_exactly_where_the_image_is_misclassified() -> None:
    logits, labels = torch.randn(500, 4, generator=stream("sign")), torch.arange(500) % 4
    assert torch.equal(dlr(logits, labels) > 0, logits.argmax(1) != labels)


TIES = {
    "all": [1.0, 1.0, 1.0, 1.0, 1.0],
    "best four": [2.0, 2.0, 2.0, 2.0, 1.0],
    "true below a tie": [0.0, 2.0, 2.0, 2.0, 2.0],
    "best two": [2.0, 2.0, 1.0, 0.0, 0.0],
    "zero": [0.0] * 5,
}


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES.keys())
@pytest.mark.parametrize("target", [1, 4])
def test_dlr_losses_stay_finite_where_logits_tie(tied: list[float], target: int) -> None:
    logits = torch.tensor([tied], requires_grad=True)
    label = torch.tensor([0])
    for loss in (dlr(logits, label), targeted_dlr(logits, label, torch.tensor([target]))):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.norm().isfinite()  # an L2 step divides by it


def test_only_the_untargeted_dlr_vanishes_where_the_true_class_ranks_third() -> None:
    logits, label = LOGITS.clone().requires_grad_(True), torch.tensor([1])
    (flat,) = torch.autograd.grad(dlr(logits, label).sum(), logits)
    (steep,) = torch.autograd.grad(targeted_dlr(logits, label, torch.tensor([0])).sum(), logits)
    assert flat.abs().max() < 1e-6
    assert steep.abs().max() > 0.1


# ---- checkpoints


def test_checkpoints_of_a_hundred_steps_are_those_of_the_paper() -> None:
    assert step_size_checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 17, 50, 101, 1000])
def test_checkpoints_come_ever_closer(steps: int) -> None:
    found = step_size_checkpoints(steps)
    gaps = list(found.values())
    assert list(found) == [sum(gaps[: place + 1]) for place in range(len(gaps))]
    assert gaps == sorted(gaps, reverse=True)
    assert min(gaps) >= 1
    assert max(found) <= steps


# ---- the algorithm, transcribed for one image with its whole history kept


class Transcript:
    """Algorithm 1, one image, one ascent; `evaluate` gives (loss, gradient) of a point at its turn."""

    def __init__(
        self, image: Tensor, first: Tensor, ball: Ball, steps: int, evaluate: Callable[[Tensor], tuple[float, Tensor]]
    ) -> None:
        self.points, self.losses = [first], list[float]()
        self.slow, self.stuck, self.fine = 0, 0, 0  # how often a checkpoint found what
        gradients = list[Tensor]()

        def look() -> None:
            loss, gradient = evaluate(self.points[-1])
            self.losses.append(loss)
            gradients.append(gradient)

        look()
        here, there, step_size, last, fresh = 0, 0, 2 * ball.epsilon, 0, True
        for step in range(1, steps + 1):
            share = 1.0 if step == 1 else 0.75
            point, old = self.points[here], self.points[there]
            aim = ball.project(point + step_size * ball.steepest(gradients[here]), image)
            self.points.append(ball.project(point + share * (aim - point) + (1 - share) * (point - old), image))
            look()
            there, here = here, step
            if step in step_size_checkpoints(steps):
                rises = sum(self.losses[i + 1] > self.losses[i] for i in range(last, step))
                slow = rises <= 0.75 * (step - last)
                stuck = not fresh and max(self.losses) == max(self.losses[: last + 1])
                self.slow, self.stuck, self.fine = (
                    self.slow + slow,
                    self.stuck + (stuck and not slow),
                    self.fine + (not slow and not stuck),
                )
                if slow or stuck:
                    step_size, here = step_size / 2, self.best
                last, fresh = step, slow or stuck

    @property
    def best(self) -> int:
        return self.losses.index(max(self.losses))


class Scripted:
    """A model whose logits and gradients come from a script, one line for each time it is asked, whatever the pixels.

    So the rises and falls of the loss can be chosen, and with them what every checkpoint has to decide.
    """

    def __init__(self, heights_BT: Tensor, slopes_BTD: Tensor) -> None:
        self.heights, self.slopes, self.turn = heights_BT, slopes_BTD, 0
        self.seen: list[Tensor] = []

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen.append(images_BCHW.detach())
        pixels = images_BCHW.flatten(1)
        climb_B = self.heights[:, self.turn] + ((pixels - pixels.detach()) * self.slopes[:, self.turn]).sum(dim=1)
        self.turn += 1
        return torch.stack([-climb_B, torch.zeros_like(climb_B)], dim=1)


def script(turns: int) -> tuple[Tensor, Tensor]:
    """Losses of every kind: always rising, always falling, noise, many rises to no new height, and mixtures."""
    time = torch.arange(turns, dtype=torch.float64)
    saws = [(time % period) / period for period in (9, 14, 23, 40)]
    lower_saws = [saw - 5 * (time > 0) - 0.02 * time for saw in saws]
    smooth = [time, -time, -((time - 60) ** 2) / 60, torch.sin(time / 9) * 9]
    noisy = [trend * time + torch.randn(turns, generator=stream("noise", trend)) for trend in (0.0, 0.3, 1.0, 2.0)]
    heights = torch.stack([*saws, *lower_saws, *smooth, *noisy])
    slopes = torch.randn((*heights.shape, int(np.prod(SHAPE))), generator=stream("slopes"), dtype=torch.float64)
    return (heights - heights.max() - 1) / 100, slopes  # below 0: never misclassified; far from -inf: no tiny gradients


def read(heights_T: Tensor, slopes_TD: Tensor) -> Callable[[Tensor], tuple[float, Tensor]]:
    """One image's part of a script, a line for each call."""
    lines = iter(zip(heights_T.tolist(), slopes_TD.view(-1, 1, *SHAPE), strict=True))
    return lambda _: next(lines)


@every_norm
def test_ascent_follows_the_algorithm(norm: Norm) -> None:
    steps, ball = 100, make_ball(norm)
    heights, slopes = script(steps + 1)
    images, model = inner(len(heights)), Scripted(heights, slopes)
    found = attack("ce", model, images, torch.zeros(len(images), dtype=torch.int64), ball, steps=steps)
    seen_TBCHW = torch.stack(model.seen)
    slow = stuck = fine = 0
    for number, image in enumerate(images):
        lines = read(heights[number], slopes[number])
        transcript = Transcript(image[None], seen_TBCHW[0, number][None], ball, steps, lines)
        torch.testing.assert_close(seen_TBCHW[:, number], torch.cat(transcript.points), atol=1e-9, rtol=0)
        assert torch.equal(found[number], seen_TBCHW[transcript.best, number])
        slow, stuck, fine = slow + transcript.slow, stuck + transcript.stuck, fine + transcript.fine
    assert min(slow, stuck, fine) >= 5  # the script has put every decision to the test


def test_best_point_of_all_restarts_is_returned() -> None:
    steps, restarts = 10, 3
    heights, slopes = script(restarts * (steps + 1))
    images, model = inner(len(heights)), Scripted(heights, slopes)
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = attack("ce", model, images, labels, LInf(0.05), steps=steps, restarts=restarts)
    best = heights.argmax(dim=1)
    assert len({int(turn) // (steps + 1) for turn in best}) == restarts  # each restart has its turn
    torch.testing.assert_close(found, torch.stack(model.seen)[best, torch.arange(len(images))], atol=0, rtol=0)


def targeted_loss(logits_K: Tensor, label: int, target: int) -> Tensor:
    lead: Tensor = logits_K[target] - logits_K[label]
    if len(logits_K) < 4:
        return lead
    first, _, third, fourth, *_ = logits_K.sort(descending=True).values
    loss: Tensor = lead / (first - (third + fourth) / 2)
    return loss


def graded(loss: Callable[[Tensor], Tensor], model: Model) -> Callable[[Tensor], tuple[float, Tensor]]:
    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        pixels = point.clone().requires_grad_(True)
        value = loss(model(pixels)[0])
        (gradient,) = torch.autograd.grad(value, pixels)
        return value.item(), gradient

    return evaluate


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_targets_are_aimed_at_likeliest_first_with_the_right_loss(norm: Norm, classes: int) -> None:
    steps, ball, model = 15, make_ball(norm), Waves(classes)
    image = inner(1)
    ranking = model(image)[0].argsort(descending=True).tolist()
    label, targets = ranking[0], ranking[1:4]
    model.seen.clear()
    found = attack("t", model, image, torch.tensor([label]), ball, never, steps=steps, targets=3)
    seen = torch.cat(model.seen)
    assert torch.equal(seen[0], image[0])  # the look at the clean image that ranks the classes
    transcripts = []
    for place, target in enumerate(targets):
        visited = seen[1 + place * (steps + 1) :][: steps + 1]
        evaluate = graded(lambda logits, target=target: targeted_loss(logits, label, target), Waves(classes))  # type: ignore[misc]
        transcripts.append(Transcript(image, visited[:1], ball, steps, evaluate))
        torch.testing.assert_close(visited, torch.cat(transcripts[-1].points), atol=1e-7, rtol=0)
    assert len(seen) == 1 + len(targets) * (steps + 1)
    best = max(transcripts, key=lambda transcript: max(transcript.losses))
    torch.testing.assert_close(found, best.points[best.best], atol=1e-7, rtol=0)


def test_a_wrong_class_is_aimed_at_where_the_model_is_wrong_already() -> None:
    """Otherwise the second likeliest class could be the true one, and its loss constant."""
    model, image = Waves(5), inner(1)
    ranking = model(image)[0].argsort(descending=True).tolist()
    model.seen.clear()
    attack("t", model, image, torch.tensor([ranking[1]]), LInf(0.05), never, steps=3, targets=1)
    visited = torch.cat(model.seen)[1:]
    evaluate = graded(lambda logits: targeted_loss(logits, ranking[1], ranking[0]), Waves(5))
    torch.testing.assert_close(visited, torch.cat(Transcript(image, visited[:1], LInf(0.05), 3, evaluate).points))


# ---- the start


@every_norm
def test_start_is_on_the_surface_of_the_ball(norm: Norm) -> None:
    images = inner(300)
    change = random_start(make_ball(norm), images, ImageStreams(0, "start", torch.arange(300))) - images
    torch.testing.assert_close(size(change, norm), torch.full((300,), EPSILONS[norm], dtype=torch.float64))
    assert len({tuple(row) for row in change.flatten(1).tolist()}) == 300
    assert change.mean(dim=0).abs().max() < 0.2 * EPSILONS[norm]
    if norm == "linf":  # one pixel reaches the surface, the others fill the cube
        assert float(change.std()) == pytest.approx(EPSILONS[norm] / 3**0.5, rel=0.1)
    else:  # no direction is preferred: this is the kurtosis of a uniform direction in 16 dimensions
        assert float((change**4).mean() / (change**2).mean() ** 2) == pytest.approx(3 * 16 / 18, abs=0.3)


@every_norm
def test_every_ascent_starts_anew(norm: Norm) -> None:
    model, images = Waves(4), inner(2)
    labels = labels_of(model, images)
    model.seen.clear()
    attack("t", model, images, labels, make_ball(norm), never, steps=2, targets=2, restarts=2)
    starts = torch.cat(model.seen[1::3])
    assert len({tuple(row) for row in starts.flatten(1).tolist()}) == 8


# ---- closed forms on linear models


@pytest.mark.parametrize("kind", ["ce", "t"])
def test_linf_optimum_of_a_linear_model_is_reached(kind: str) -> None:
    model, images, ball = Linear(2), inner(16), LInf(0.05)
    labels = labels_of(model, images)
    uphill = (model.weight_KD[1 - labels] - model.weight_KD[labels]).view_as(images)
    found = attack(kind, model, images, labels, ball, never)
    torch.testing.assert_close(found, images + 0.05 * uphill.sign(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["ce", "t"])
def test_l2_optimum_of_a_linear_model_is_reached(kind: str) -> None:
    model, images, ball = Linear(2), inner(16), L2(0.2)
    labels = labels_of(model, images)
    uphill = (model.weight_KD[1 - labels] - model.weight_KD[labels]).view_as(images)
    found = attack(kind, model, images, labels, ball, never, steps=100)
    torch.testing.assert_close(found, images + 0.2 * ball.steepest(uphill), atol=1e-5, rtol=0)


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_targets_find_exactly_what_a_linear_model_gives_away(norm: Norm, classes: int) -> None:
    model, images, ball = Linear(classes, scale=1.0), inner(64), make_ball(norm, 0.012 if norm == "linf" else 0.04)
    labels = labels_of(model, images)
    reach = model.reach(images, labels, ball)
    found = attack("t", model, images, labels, ball, steps=50)
    clear = reach.abs() > 1e-3
    assert torch.equal((labels_of(model, found) != labels)[clear], (reach > 0)[clear])
    assert 5 < int((reach > 0).sum()) < 59


# ---- images that fall


class Referee:
    """Confirms a point only when the true class trails by more than `least`; keeps what it was asked and confirmed."""

    def __init__(self, model: Model, least: float) -> None:
        self.model, self.least = model, least
        self.asked: list[Tensor] = []
        self.confirmed: list[Tensor] = []

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        assert (labels_of(self.model, points) != labels).all()  # asked only where the model is wrong
        verdict = self.judge(points, labels)
        self.asked.extend(points)
        self.confirmed.extend(points[verdict])
        return verdict

    def judge(self, points: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(points)
        return logits.amax(dim=1) - logits.gather(1, labels[:, None]).squeeze(1) > self.least


def rows_of(points: Iterable[Tensor]) -> set[tuple[float, ...]]:
    return {tuple(point.flatten().tolist()) for point in points}


def case(frequency: float = 15.0) -> tuple[Waves, Tensor, Tensor, Ball]:
    """Some of these images fall at once, some late and some never."""
    model, images = Waves(5, frequency), inner(40)
    labels = labels_of(model, images)
    model.seen.clear()
    return model, images, labels, LInf(0.02)


@every_kind
@pytest.mark.parametrize("restarts", [1, 2])
def test_an_image_leaves_at_its_first_confirmed_point(kind: str, restarts: int) -> None:
    model, images, labels, ball = case()
    referee = Referee(Waves(5), least=0.1)
    found = attack(kind, model, images, labels, ball, referee, restarts=restarts)
    fallen = referee.judge(found, labels)
    assert 5 < fallen.sum() < 35
    assert len(referee.asked) > len(referee.confirmed) == fallen.sum()
    assert rows_of(referee.confirmed) == rows_of(found[fallen])


@every_kind
def test_fallen_images_cost_nothing_more(kind: str) -> None:
    model, images, labels, ball = case()
    ascents, steps = (2, 20) if kind == "ce" else (4 * 2, 20)
    attack(kind, model, images, labels, ball, never, steps=steps, restarts=2)
    whole = (ascents * (steps + 1) + (kind == "t")) * len(images)
    assert model.passes == whole
    model.seen.clear()
    found = attack(kind, model, images, labels, ball, steps=steps, restarts=2)
    last = model.seen[-1]
    spared = model.passes
    fallen = labels_of(model, found) != labels
    assert len(last) <= int((~fallen).sum()) + 1
    assert spared < 0.8 * whole


@every_kind
def test_nothing_is_computed_once_all_have_fallen(kind: str) -> None:
    model, images, labels, ball = case()
    wrong = (labels + 1) % 5  # the model is wrong from the start on
    attack(kind, model, images, wrong, ball, restarts=3)
    standing = [len(points) for points in model.seen]
    assert standing[-1] > 0
    assert len(standing) < 15


@every_kind
def test_without_a_caller_the_model_decides(kind: str) -> None:
    model, images, labels, ball = case()
    alone = attack(kind, model, images, labels, ball)
    judged = attack(kind, model, images, labels, ball, Referee(Waves(5), least=-torch.inf))
    assert torch.equal(alone, judged)
    assert not torch.equal(alone, attack(kind, model, images, labels, ball, never))


@every_kind
def test_a_denied_image_goes_on_to_the_end(kind: str) -> None:
    """A caller who always refuses gets the point of the highest loss, better than where the model was wrong first."""
    model, images, labels, ball = case()
    first = attack(kind, model, images, labels, ball)
    denied = attack(kind, model, images, labels, ball, never)
    fallen = labels_of(model, first) != labels

    def lead(points: Tensor) -> Tensor:
        logits = model(points)
        return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - logits.gather(1, labels[:, None])[:, 0]

    assert lead(denied)[fallen].mean() > lead(first)[fallen].mean() + 0.05


# ---- company


@every_kind
@every_norm
@pytest.mark.parametrize("company", [[17], [17, 3], [30, 17, 2, 5, 9, 11], list(range(40))], ids=len)
def test_result_does_not_depend_on_company(kind: str, norm: Norm, company: list[int]) -> None:
    model, images, labels, _ = case()
    ball = make_ball(norm, 0.012 if norm == "linf" else 0.04)
    rows = torch.tensor(company)

    def attacked(numbers: Tensor) -> Tensor:
        return attack(kind, model, images[numbers], labels[numbers], ball, restarts=2, targets=3, numbers=numbers)

    everyone = attacked(torch.arange(40))
    fallen = labels_of(model, everyone) != labels
    assert 5 < fallen.sum() < 35  # so that many lose their neighbours on the way
    torch.testing.assert_close(attacked(rows), everyone[rows], atol=1e-9, rtol=0)
    survivors = (~fallen).nonzero()[:, 0]
    torch.testing.assert_close(attacked(survivors), everyone[survivors], atol=1e-9, rtol=0)


# ---- rough models


class Coarse(Waves):
    """The same network with its logits rounded to bfloat16, after an optional scaling that makes most of them tie."""

    def __init__(self, classes: int, scale: float) -> None:
        super().__init__(classes)
        self.scale = scale

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return (100 + self.scale * super().__call__(images_BCHW.double())).bfloat16().to(images_BCHW)


@every_kind
@every_norm
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_ties_do_no_harm(kind: str, norm: Norm, scale: float, classes: int) -> None:
    model, images, ball = Coarse(classes, scale), inner(12).float().round(decimals=1), make_ball(norm)
    labels = labels_of(model, images)
    found = attack(kind, model, images, labels, ball, never)
    assert all(points.isfinite().all() for points in model.seen)
    assert found.isfinite().all()
    assert found.dtype == images.dtype
    assert (size(found - images, norm) <= ball.epsilon + 1e-6).all()


@every_kind
@every_norm
def test_every_point_is_inside_ball_and_box(kind: str, norm: Norm) -> None:
    model, ball = Waves(4), make_ball(norm, 0.3)
    images = (inner(10) * 6 - 2.5).clamp(0, 1).float()
    model.inward, model.outward = model.inward.float(), model.outward.float()
    labels = labels_of(model, images)
    found = attack(kind, model, images, labels, ball, never)
    for points in [*model.seen, found]:
        assert (size(points.double() - images.double(), norm) <= 0.3 + 1e-6).all()
        assert points.min() >= 0
        assert points.max() <= 1
    assert not found.requires_grad


# ---- the authors' decisions on a real network


@pytest.mark.skipif(not published.is_available(), reason=f"needs {published.FOLDER}")
def test_decisions_agree_with_the_reference() -> None:
    model, theirs = published.load_model("wk-fmnist").requires_grad_(False), published.load_reference("wk-fmnist")
    images, labels = published.load_images("wk-fmnist", 30)
    standing = labels_of(model, images) == labels
    for kind in ("ce", "t"):
        rows = standing.nonzero()[:, 0]
        found = attack(kind, model, images[rows], labels[rows], LInf(theirs.epsilon), steps=100, numbers=rows)
        standing[rows] = labels_of(model, found) == labels[rows]
    assert (
        standing != theirs.autoattack[:30]
    ).sum() <= 1  # the reference has two more attacks, which can find an image of their own
