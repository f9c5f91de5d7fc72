"""Attacks against closed forms, and one table that drives every attack through the same checks.

The checks are functions of an attack, so that a planted bad attack can be shown to fail them.

Shapes: B batch, C channel, H/W pixels, K classes, D pixels of an image in one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import presets, registry
from advmoe.attacks.apgd import ApgdCe, ApgdT
from advmoe.attacks.ball import L2, Ball, LInf, Norm, RandomStream, perturbation_norm
from advmoe.attacks.custom import Custom
from advmoe.attacks.engine import FrozenModel, PassCount
from advmoe.attacks.fab import FabT
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting, Transfer
from advmoe.attacks.interface import AttackFn, IsAdversarial, Loss, Model, cross_entropy, input_gradient, margin
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd, pgd, top_wrong_classes
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.attacks.rays import RayS
from advmoe.attacks.registry import AttackSettings
from advmoe.attacks.square import Square
from advmoe.models.mixture import MixtureOfExperts, UniformGate
from advmoe.runtime.machine import generator

SHAPES = [(1, 1, 8, 8), (5, 3, 4, 6), (16, 2, 3, 1)]
TOLERANCE = 1e-6
# strong enough that a random linear model loses most images, small enough that images of `inner` stay off the walls
EPSILONS: dict[Norm, float] = {"linf": 0.1, "l2": 0.4}


def stream(*parts: object) -> torch.Generator:
    return generator("test_attacks", *parts)


def make_ball(norm: Norm, epsilon: float) -> Ball:
    return LInf(epsilon) if norm == "linf" else L2(epsilon)


def size(change_BCHW: Tensor, norm: Norm) -> Tensor:
    """The norm of each image's change, in float64 so that the ruler is finer than what it measures."""
    order = torch.inf if norm == "linf" else 2
    length_B: Tensor = torch.linalg.vector_norm(change_BCHW.double().flatten(1), order, dim=1)
    return length_B


def inner(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images so far from the walls 0 and 1 that the box never cuts the balls used here."""
    return 0.45 + 0.1 * torch.rand(shape, generator=stream("inner", seed))


def anywhere(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images with many pixels exactly on the walls."""
    return (torch.rand(shape, generator=stream("anywhere", seed)) * 2 - 0.5).clamp(0, 1)


class Victim(Protocol):
    """A model whose own decisions are the true labels of an image."""

    def __call__(self, images_BCHW: Tensor, /) -> Tensor: ...

    def labels(self, images_BCHW: Tensor, /) -> Tensor: ...


class Linear:
    """logits = W (x - 1/2): its optimal perturbations are known."""

    def __init__(self, shape_CHW: tuple[int, ...], classes: int = 2, scale: float = 1.0) -> None:
        dimensions = int(torch.tensor(shape_CHW).prod())
        self.weight_KD = scale * torch.randn(classes, dimensions, generator=stream("weight", *shape_CHW))

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        # in double, so that no decision hangs on how a batch of this size is summed
        return ((images_BCHW.double() - 0.5).flatten(1) @ self.weight_KD.double().T).to(images_BCHW)

    def labels(self, images_BCHW: Tensor) -> Tensor:
        return self(images_BCHW).argmax(1)

    def uphill(self, labels_B: Tensor, like: Tensor) -> Tensor:
        """The gradient direction of the loss in the pixels, for two classes: other row minus true row."""
        assert len(self.weight_KD) == 2
        return self.towards(1 - labels_B, labels_B, like)

    def towards(self, goals_B: Tensor, labels_B: Tensor, like: Tensor) -> Tensor:
        """The gradient direction of the lead of one class over another."""
        rows_BD: Tensor = self.weight_KD[goals_B] - self.weight_KD[labels_B]
        return rows_BD.view_as(like)


class Plane(nn.Module):
    """A linear network: expert of the mixture below, or its gate."""

    def __init__(self, weight_KD: Tensor, normed: bool = False) -> None:
        super().__init__()
        self.weight_KD, self.normed = nn.Parameter(weight_KD.double(), requires_grad=False), normed

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores_BK = (images_BCHW.double() - 0.5).flatten(1) @ self.weight_KD.T
        return functional.log_softmax(scores_BK, dim=1) if self.normed else scores_BK


class Crowd(FrozenModel):
    """A mixture of three linear experts that differ a little, with a linear gate, as attacks get to see it."""

    def __init__(self, shape_CHW: tuple[int, ...], classes: int = 2) -> None:
        common_KD = Linear(shape_CHW, classes).weight_KD
        noise_EKD = torch.randn(3, *common_KD.shape, generator=stream("experts", *shape_CHW))
        gate_ED = torch.randn(3, common_KD.shape[1], generator=stream("gate", *shape_CHW))
        experts = [Plane(common_KD + 0.3 * noise_KD) for noise_KD in noise_EKD]
        super().__init__(
            MixtureOfExperts(experts, Plane(gate_ED, normed=True), "probabilities"), "float32", PassCount()
        )

    def labels(self, images_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return self(images_BCHW).argmax(1)


@dataclass(frozen=True)
class Entrant:
    """An attack, bound once it is known what else it may craft on, and the kind of model it is tried on."""

    bind: Callable[[Model], AttackFn]
    victim: Callable[[tuple[int, ...], int], Victim] = Linear

    def __call__(
        self,
        model: Model,
        images_BCHW: Tensor,
        labels_B: Tensor,
        ball: Ball,
        rows: Tensor | None = None,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        """`rows`: the numbers of the images, which their random draws follow."""
        draws = ImageStreams(0, "attack", torch.arange(len(images_BCHW)) if rows is None else rows)
        return self.bind(model)(model, images_BCHW, labels_B, ball=ball, draws=draws, is_adversarial=is_adversarial)


def pgd_settings(
    steps: int = 10, step_size: float = 0.25, restarts: int = 1, loss: Loss = "ce", targets: int = 0
) -> Pgd:
    return Pgd(kind="pgd", steps=steps, step_size=step_size, restarts=restarts, loss=loss, targets=targets)


def catalogued(settings: AttackSettings) -> Entrant:
    """A transfer crafts on the model itself here; test_gated.py has sources that differ."""
    victim = Crowd if registry.REGISTRY[type(settings)].needs_gate else Linear
    return Entrant(lambda model: registry.bind(settings, {"twin": model}), victim)


OWN = "one_step.py:attack"
OWN_CODE = """
from advmoe.attacks.interface import input_gradient

def attack(model, images, labels, *, ball, draws, is_adversarial=None):
    gradient, _ = input_gradient(model, images, labels, "margin")
    return images + 3 * ball.epsilon * ball.steepest(gradient)
"""


@pytest.fixture(autouse=True)
def own_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a user, in the folder where the tests run."""
    monkeypatch.chdir(tmp_path)
    Path("one_step.py").write_text(OWN_CODE)


class _Climb(TypedDict):
    steps: int
    step_size: float
    restarts: int


CLIMB: _Climb = {"steps": 8, "step_size": 0.25, "restarts": 1}
TABLE: dict[str, AttackSettings] = {
    "fgsm": Fgsm(kind="fgsm"),
    "pgd": pgd_settings(),
    "pgd-margin": pgd_settings(loss="margin"),
    "pgd-restarts": pgd_settings(restarts=3),
    "pgd-targeted": pgd_settings(loss="margin", targets=2),
    "pgd-targeted-ce": pgd_settings(targets=2, restarts=2),
    "apgd-ce": ApgdCe(kind="apgd-ce", steps=10, restarts=1),
    "apgd-t": ApgdT(kind="apgd-t", steps=10, targets=2, restarts=1),
    "fab-t": FabT(kind="fab-t", steps=6, targets=2, restarts=2),
    "square": Square(kind="square", queries=80, p_init=0.8),
    "rays": RayS(kind="rays", queries=80),
    "noise": Noise(kind="noise", draws=10),
    "gate-frozen": GateFrozen(kind="gate-frozen", **CLIMB),
    "misrouting": Misrouting(kind="misrouting", **CLIMB, lambdas=(0.0, 1.0)),
    "experts": Experts(kind="experts", **CLIMB),
    "transfer": Transfer(kind="transfer", **CLIMB, sources=("twin",)),
    "own": Custom(kind="own", function=OWN),
}


def each_of(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("attack", [catalogued(TABLE[name]) for name in names], ids=names)


def each_of_the_settings(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("settings", [TABLE[name] for name in names], ids=names)


every_attack = each_of(list(TABLE))
every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

Draft = Callable[[Model, Tensor, Tensor, Ball], Tensor]


def planted(draft: Draft) -> Entrant:
    def craft(
        model: Model,
        images: Tensor,
        labels: Tensor,
        /,
        *,
        ball: Ball,
        draws: RandomStream,
        is_adversarial: IsAdversarial | None = None,
    ) -> Tensor:
        del draws, is_adversarial
        return draft(model, images, labels, ball)

    return Entrant(lambda _: craft)


def idle(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that does nothing."""
    del model, labels_B, ball
    return images_BCHW.clone()


def greedy(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that takes twice its budget and forgets the box."""
    gradient, _ = input_gradient(model, images_BCHW, labels_B, "ce")
    return images_BCHW + 2 * ball.epsilon * ball.steepest(gradient)


def restless(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that moves even without a budget."""
    return greedy(model, images_BCHW, labels_B, L2(ball.epsilon + 0.01))


def timid(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that gets weaker the more it may do."""
    gradient, _ = input_gradient(model, images_BCHW, labels_B, "ce")
    return images_BCHW + max(0.0, 0.1 - ball.epsilon) * ball.steepest(gradient)


def sociable(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that moves all images of a batch the way that the first one needs."""
    gradient, _ = input_gradient(model, images_BCHW, labels_B, "ce")
    together = gradient[:1].expand_as(gradient)
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(together), images_BCHW)


def meddling(model: Model, images_BCHW: Tensor, labels_B: Tensor, ball: Ball) -> Tensor:
    """Planted: an attack that works in place."""
    return images_BCHW.copy_(greedy(model, images_BCHW, labels_B, ball))


# ---- the table: checks every attack must pass, and planted attacks that must not


def is_inside(attack: Entrant, norm: Norm, shape: tuple[int, ...], is_adversarial: IsAdversarial | None = None) -> bool:
    """In the ball and in the box, after a round trip through float32, what a file would hold."""
    model, images, epsilon = attack.victim(shape[1:], 3), anywhere(shape), EPSILONS[norm]
    found = attack(model, images, model.labels(images), make_ball(norm, epsilon), is_adversarial=is_adversarial)
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    in_ball = (size(found.double() - images.double(), norm) <= epsilon + TOLERANCE).all()
    return bool(in_ball and (found >= 0).all() and (found <= 1).all() and not found.requires_grad)


def keeps_still_without_budget(attack: Entrant, norm: Norm, shape: tuple[int, ...]) -> bool:
    model, images = attack.victim(shape[1:], 3), anywhere(shape)
    return torch.equal(attack(model, images, model.labels(images), make_ball(norm, 0.0)), images)


def accuracies(attack: Entrant, norm: Norm) -> list[float]:
    """Accuracy at growing shares of the usual epsilon, on images that the model all gets right when clean."""
    shape = (64, 1, 6, 6)
    model, images = attack.victim(shape[1:], 2), inner(shape)
    labels = model.labels(images)
    budgets = [make_ball(norm, share * EPSILONS[norm]) for share in (0.0, 0.03, 0.1, 0.3, 1.0)]
    return [float((model.labels(attack(model, images, labels, ball)) == labels).double().mean()) for ball in budgets]


def is_never_weaker_with_more(attack: Entrant, norm: Norm) -> bool:
    measured = accuracies(attack, norm)
    return measured == sorted(measured, reverse=True)


def beats_doing_nothing(attack: Entrant, norm: Norm) -> bool:
    measured = accuracies(attack, norm)
    return measured[-1] < measured[0] - 0.5


def ignores_neighbours(attack: Entrant, norm: Norm) -> bool:
    """What is found for an image, alone and in a crowd, is the same."""
    shape = (24, 1, 4, 4)
    model, images = attack.victim(shape[1:], 4), anywhere(shape)
    labels, ball, few = model.labels(images), make_ball(norm, EPSILONS[norm] / 2), torch.tensor([20, 3, 11])
    everyone = attack(model, images, labels, ball)
    return torch.allclose(attack(model, images[few], labels[few], ball, rows=few), everyone[few], atol=1e-5, rtol=0)


def leaves_its_inputs_alone(attack: Entrant) -> bool:
    images = anywhere(SHAPES[1])
    model, before = attack.victim(SHAPES[1][1:], 2), images.clone()
    labels = model.labels(images)
    with torch.no_grad():  # the caller's grad mode is no business of an attack
        attack(model, images, labels, LInf(0.1))
    return torch.equal(images, before) and not images.requires_grad and torch.equal(labels, model.labels(before))


@pytest.mark.parametrize("keyword", ["is_adversarial", "fooled"])
def test_a_custom_attack_receives_the_check_by_either_name(keyword: str) -> None:
    code = (
        f"def attack(model, images, labels, *, ball, draws, {keyword}):\n    assert {keyword}(images, labels).all()\n"
    )
    Path("checks.py").write_text(f"{code}    return images\n")
    settings, images, labels = Custom(kind="own", function="checks.py:attack"), torch.rand(3, 1, 2, 2), torch.arange(3)
    attack = registry.bind(settings, {})

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        del points
        return labels >= 0

    draws = BatchStream(torch.Generator())
    found = attack(Linear((1, 2, 2)), images, labels, ball=LInf(0.1), draws=draws, is_adversarial=is_adversarial)
    assert torch.equal(found, images)


def test_every_registered_attack_has_a_row() -> None:
    assert {settings.kind for settings in TABLE.values()} == set(registry.KINDS)
    assert {settings.kind for settings in presets.STANDARD_ATTACKS.values()} | {"transfer", "own"} == set(
        registry.KINDS
    )


# its one step is three epsilons long: the harness brings it back, see test_harness.py
built_in = each_of([name for name in TABLE if name != "own"])
# noise is a floor and no attack
real = each_of([name for name in TABLE if name not in {"own", "noise"}])


@built_in
@every_norm
@every_shape
def test_attack_stays_inside(attack: Entrant, norm: Norm, shape: tuple[int, ...]) -> None:
    assert is_inside(attack, norm, shape)


@every_attack
@every_norm
@every_shape
def test_attack_without_budget_changes_nothing(attack: Entrant, norm: Norm, shape: tuple[int, ...]) -> None:
    assert keeps_still_without_budget(attack, norm, shape)


@every_attack
@every_norm
def test_attack_is_never_weaker_with_more_budget(attack: Entrant, norm: Norm) -> None:
    assert is_never_weaker_with_more(attack, norm)


@built_in
@every_norm
def test_attack_stays_inside_whatever_its_caller_says(attack: Entrant, norm: Norm) -> None:
    assert is_inside(
        attack, norm, SHAPES[1], is_adversarial=lambda points, _: torch.zeros(len(points), dtype=torch.bool)
    )
    assert is_inside(attack, norm, SHAPES[1], is_adversarial=lambda points, _: points.flatten(1).sum(1) > 6)


@real
@every_norm
def test_attack_beats_doing_nothing(attack: Entrant, norm: Norm) -> None:
    assert beats_doing_nothing(attack, norm)


@every_attack
@every_norm
def test_attack_does_not_depend_on_batch_neighbours(attack: Entrant, norm: Norm) -> None:
    assert ignores_neighbours(attack, norm)


@every_norm
def test_planted_attacks_fail_the_checks(norm: Norm) -> None:
    assert not beats_doing_nothing(planted(idle), norm)
    assert not is_inside(planted(greedy), norm, SHAPES[1])
    assert not keeps_still_without_budget(planted(restless), norm, SHAPES[1])
    assert not is_never_weaker_with_more(planted(timid), norm)
    assert not ignores_neighbours(planted(sociable), norm)
    assert not leaves_its_inputs_alone(planted(meddling))


@every_attack
def test_attack_leaves_its_inputs_alone(attack: Entrant) -> None:
    assert leaves_its_inputs_alone(attack)


@each_of([name for name in TABLE if name not in {"fgsm", "own"}])
@every_norm
def test_attack_retires_an_image_at_its_first_confirmed_point(attack: Entrant, norm: Norm) -> None:
    """Nobody is asked about an image after it is confirmed inside the ball, and that point is what comes back."""
    shape = (24, 1, 4, 4)
    model, images = attack.victim(shape[1:], 2), 0.3 + 0.4 * torch.rand(shape, generator=stream("retires"))
    labels, ball = model.labels(images), make_ball(norm, 0.45 * EPSILONS[norm])
    referee = Referee(model, least=0.1)
    found = attack(model, images, labels, ball, is_adversarial=referee)
    assert not all(referee.judge(found, labels))  # some never fall
    points = torch.stack(referee.confirmed)
    whose = torch.cdist(points.flatten(1), images.flatten(1)).argmin(1)
    inside = size(points - images[whose], norm) <= ball.epsilon + TOLERANCE  # FAB asks about points outside, too
    assert 1 <= int(inside.sum()) == len(set(whose[inside].tolist()))
    torch.testing.assert_close(found[whose[inside]], points[inside], atol=TOLERANCE, rtol=0)


# ---- what an attack says it costs


class Unmoved(nn.Module):
    """Always sure of class 0; every pixel has a gradient."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        score_B = images_BCHW.flatten(1).square().mean(1)
        return torch.stack([score_B + 5, *(-step * score_B for step in range(3))], dim=1)


@each_of_the_settings([name for name in TABLE if name != "own"])
def test_passes_of_an_image_that_survives_are_as_announced(settings: AttackSettings) -> None:
    count, passes = 5, PassCount()
    mixture = MixtureOfExperts([Unmoved()], UniformGate(1), "probabilities")
    model, images = FrozenModel(mixture, "float32", passes), anywhere((count, 1, 4, 4))

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        passes.forward += len(points)
        return torch.zeros_like(labels, dtype=torch.bool)

    draws, labels = ImageStreams(0, "cost", torch.arange(count)), torch.zeros(count, dtype=torch.long)
    craft = registry.bind(settings, {"twin": model})
    craft(model, images, labels, ball=LInf(0.1), draws=draws, is_adversarial=is_adversarial)
    forward, backward = registry.REGISTRY[type(settings)].passes(settings)
    spent = (passes.forward / count, passes.backward / count)
    assert spent == (forward, backward)


# ---- closed forms on a linear model


@each_of_the_settings(["fgsm", "pgd", "pgd-margin", "pgd-targeted", "transfer"])
@every_shape
def test_linf_attacks_reach_the_optimum_of_a_linear_model(settings: AttackSettings, shape: tuple[int, ...]) -> None:
    epsilon, images, model = EPSILONS["linf"], inner(shape), Linear(shape[1:], scale=0.3)
    labels = model.labels(images)
    found = catalogued(settings)(model, images, labels, LInf(epsilon))
    best = images + epsilon * model.uphill(labels, images).sign()
    torch.testing.assert_close(found, best, atol=TOLERANCE, rtol=0)


L2_ATTACKS: dict[str, AttackSettings] = {
    "fgsm": TABLE["fgsm"],
    # a step as long as the radius halves the angle to the optimum each time: 40 steps leave nothing
    "pgd": pgd_settings(steps=40, step_size=1.0),
    "pgd-margin": pgd_settings(steps=40, step_size=1.0, loss="margin"),
    "pgd-targeted": pgd_settings(steps=40, step_size=1.0, loss="margin", targets=1),
}


@pytest.mark.parametrize("settings", L2_ATTACKS.values(), ids=L2_ATTACKS.keys())
@every_shape
def test_l2_attacks_reach_the_optimum_of_a_linear_model(settings: AttackSettings, shape: tuple[int, ...]) -> None:
    epsilon, images, model = EPSILONS["l2"], inner(shape), Linear(shape[1:], scale=0.3)
    labels = model.labels(images)
    found = catalogued(settings)(model, images, labels, L2(epsilon))
    uphill = model.uphill(labels, images)
    best = images + epsilon * uphill / size(uphill, "l2").float().view(-1, 1, 1, 1)
    torch.testing.assert_close(found, best, atol=1e-5, rtol=0)


def test_pgd_does_not_take_the_linf_direction_in_l2() -> None:
    """The two closed forms differ, so the tests above tell the norms apart."""
    images, model = inner(SHAPES[0]), Linear(SHAPES[0][1:])
    uphill = model.uphill(model.labels(images), images)
    cosine = torch.cosine_similarity(uphill.flatten(1), uphill.sign().flatten(1))
    assert (cosine < 0.95).all()


def test_fgsm_next_to_a_wall_uses_what_the_box_leaves() -> None:
    images, model = anywhere(SHAPES[1]), Linear(SHAPES[1][1:])
    labels = model.labels(images)
    found = catalogued(TABLE["fgsm"])(model, images, labels, LInf(0.1))
    torch.testing.assert_close(found, (images + 0.1 * model.uphill(labels, images).sign()).clamp(0, 1))


# ---- losses


def test_margin_is_positive_exactly_where_the_image_is_misclassified() -> None:
    logits_BK = torch.randn(500, 4, generator=stream("margin"))
    labels_B = torch.arange(500) % 4
    assert torch.equal(margin(logits_BK, labels_B) > 0, logits_BK.argmax(1) != labels_B)


def test_margin_is_best_wrong_minus_true() -> None:
    logits_BK = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])
    assert margin(logits_BK, torch.tensor([1, 2])).tolist() == [-2.0, 2.0]


def test_cross_entropy_is_one_number_per_image() -> None:
    logits_BK = torch.randn(7, 4, generator=stream("ce"))
    labels_B = torch.arange(7) % 4
    expected = torch.logsumexp(logits_BK.double(), 1) - logits_BK.double()[torch.arange(7), labels_B]
    torch.testing.assert_close(cross_entropy(logits_BK, labels_B).double(), expected, atol=1e-5, rtol=0)


def test_input_gradient_of_an_image_does_not_depend_on_its_batch() -> None:
    images, model = inner((6, 1, 4, 4)), Linear((1, 4, 4))
    labels = model.labels(images)
    together, _ = input_gradient(model, images, labels, "ce")
    alone, _ = input_gradient(model, images[2:3], labels[2:3], "ce")
    torch.testing.assert_close(together[2:3], alone)


# ---- PGD with a caller who confirms


class Referee:
    """Confirms a point only when the model is wrong by a clear margin; keeps every point it confirmed."""

    def __init__(self, model: Model, least: float) -> None:
        self.model, self.least = model, least
        self.confirmed: list[Tensor] = []

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        verdict = self.judge(points, labels)
        self.confirmed.extend(points[verdict])
        return verdict

    def judge(self, points: Tensor, labels: Tensor) -> Tensor:
        return margin(self.model(points), labels) > self.least


class Counted:
    """A model that counts the images it was shown."""

    def __init__(self, model: Model) -> None:
        self.model, self.seen = model, 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        return self.model(images_BCHW)


def run_pgd(
    model: Model, labels: Tensor, images: Tensor, settings: Pgd, is_adversarial: IsAdversarial | None = None
) -> Tensor:
    draws = ImageStreams(0, "pgd", torch.arange(len(images)))
    return pgd(model, images, labels, ball=LInf(0.05), settings=settings, draws=draws, is_adversarial=is_adversarial)


def pgd_case() -> tuple[Linear, Tensor, Tensor]:
    """A case in which some images fall at once, some late and some never."""
    model, images = Linear((1, 4, 4)), 0.3 + 0.4 * torch.rand(48, 1, 4, 4, generator=stream("pgd"))
    return model, images, model.labels(images)


@pytest.mark.parametrize(
    "settings",
    # in the last one an image can only fall at the end of a restart, which must not be forgotten in the next
    [pgd_settings(), pgd_settings(restarts=3), pgd_settings(steps=1, step_size=2.0, restarts=3)],
    ids=["one restart", "restarts", "restarts of one step"],
)
def test_pgd_retires_an_image_at_its_first_confirmed_point(settings: Pgd) -> None:
    model, images, labels = pgd_case()
    referee = Referee(model, least=0.3)
    found = run_pgd(model, labels, images, settings, referee)
    fallen = referee.judge(found, labels)
    assert 0 < fallen.sum() < len(images)
    # what was confirmed is what comes back, and nobody was asked about an image after that
    confirmed = torch.stack(referee.confirmed)
    assert len(confirmed) == fallen.sum()
    assert {tuple(row) for row in confirmed.flatten(1).tolist()} == {
        tuple(row) for row in found[fallen].flatten(1).tolist()
    }


def test_pgd_goes_on_where_the_caller_does_not_confirm() -> None:
    """The model alone cannot retire an image: a referee who always refuses gives the full ascent."""
    model, images, labels = pgd_case()
    full = run_pgd(model, labels, images, pgd_settings())
    assert (model.labels(full) != labels).any()
    refused = run_pgd(model, labels, images, pgd_settings(), Referee(model, least=1e9))
    assert torch.equal(refused, full)


def test_pgd_asks_about_points_that_the_model_gets_wrong_and_stops_there() -> None:
    model, images, labels = pgd_case()
    full = run_pgd(model, labels, images, pgd_settings())
    early = run_pgd(model, labels, images, pgd_settings(), Referee(model, least=0.0))
    fallen = model.labels(full) != labels
    assert torch.equal(model.labels(early) != labels, fallen)  # in a linear model nothing rises again
    assert (margin(model(early), labels) <= margin(model(full), labels) + 1e-5).all()
    assert not torch.equal(early[fallen], full[fallen])
    assert torch.equal(early[~fallen], full[~fallen])


def test_pgd_spares_fallen_images_the_work() -> None:
    model, images, labels = pgd_case()
    whole, spared = Counted(model), Counted(model)
    settings = pgd_settings(restarts=2)
    run_pgd(whole, labels, images, settings)
    run_pgd(spared, labels, images, settings, Referee(model, least=0.0))
    assert whole.seen == settings.steps * settings.restarts * len(images)
    assert spared.seen < 0.9 * whole.seen


def test_pgd_start_is_random_and_can_be_repeated() -> None:
    model, images, labels = pgd_case()

    def once(seed: int) -> Tensor:
        draws = ImageStreams(seed, "pgd", torch.arange(len(images)))
        # one tiny step leaves the start visible
        return pgd(model, images, labels, ball=LInf(0.05), settings=pgd_settings(1, 1e-3), draws=draws)

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_random_numbers_stay_with_their_image_when_others_have_fallen() -> None:
    """Short steps leave the starts visible; half of the images leave after the first of three."""
    model, images, labels = pgd_case()

    def bright(points: Tensor, labels: Tensor) -> Tensor:
        del labels
        return points.flatten(1).mean(1) > 0.5

    def attacked(rows: Tensor) -> Tensor:
        draws, settings = ImageStreams(0, "pgd", rows), pgd_settings(steps=1, step_size=1e-3, restarts=3)
        return pgd(
            model, images[rows], labels[rows], ball=LInf(0.05), settings=settings, draws=draws, is_adversarial=bright
        )

    everyone = attacked(torch.arange(48))
    left = int((~bright(everyone, labels)).sum())
    assert 5 < left < 43
    for row in range(48):
        assert torch.equal(attacked(torch.tensor([row])), everyone[row : row + 1])


# ---- targeted PGD


def test_likeliest_are_the_wrong_classes_by_falling_logit() -> None:
    logits_BK = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    labels_B = torch.tensor([0, 2])
    expected = [[2, 3], [1, 1], [3, 0]]
    for targets in (1, 2, 3, 9):  # more than there are wrong classes are cut
        found = top_wrong_classes(lambda _: logits_BK, torch.zeros(2, 1, 1, 1), labels_B, targets)
        assert [goals_B.tolist() for goals_B in found] == expected[:targets]


@pytest.mark.parametrize("rank", [1, 2])
@every_norm
@every_shape
def test_targeted_pgd_reaches_the_optimum_towards_its_class(rank: int, norm: Norm, shape: tuple[int, ...]) -> None:
    """Without a verdict the last target's point comes back; the optimum is where its lead over the label is largest."""
    epsilon, images, model = EPSILONS[norm], inner(shape), Linear(shape[1:], classes=4, scale=0.3)
    labels, ball = model.labels(images), make_ball(norm, EPSILONS[norm])
    settings = pgd_settings(steps=40, step_size=1.0, loss="margin", targets=rank)
    found = catalogued(settings)(model, images, labels, ball)
    goals = model(images).argsort(dim=1, descending=True)[:, rank]
    best = images + epsilon * ball.steepest(model.towards(goals, labels, images))
    torch.testing.assert_close(found, best, atol=1e-5, rtol=0)


@every_norm
def test_targeted_cross_entropy_raises_its_class_and_not_just_any(norm: Norm) -> None:
    images, model = inner((16, 1, 4, 4)), Linear((1, 4, 4), classes=4)
    labels, rank = model.labels(images), 3
    found = catalogued(pgd_settings(targets=rank))(model, images, labels, make_ball(norm, 2 * EPSILONS[norm]))
    goals = model(images).argsort(dim=1, descending=True)[:, rank]
    assert (model.labels(found) == goals).double().mean() > 0.7


def decoy(images_BCHW: Tensor) -> Tensor:
    """Three classes: the runner-up comes close and never wins, the third wins if somebody aims at it."""
    near_B, far_B = images_BCHW[:, 0].flatten(1).mean(1) - 0.5, images_BCHW[:, 1].flatten(1).mean(1) - 0.5
    return torch.stack([torch.zeros_like(near_B), 0.05 * torch.tanh(5 * near_B) - 0.1, 40 * far_B - 3], dim=1)


def test_targeted_pgd_finds_what_the_nearest_class_hides() -> None:
    images, labels = torch.full((6, 2, 4, 4), 0.5), torch.zeros(6, dtype=torch.long)
    ball = LInf(0.1)
    fallen = [
        int((decoy(catalogued(settings)(decoy, images, labels, ball)).argmax(1) != labels).sum())
        for settings in (pgd_settings(loss="margin"), pgd_settings(loss="margin", targets=2))
    ]
    assert fallen == [0, 6]


def test_targeted_pgd_spends_its_steps_on_every_target_and_restart() -> None:
    _, images, labels = pgd_case()
    whole = Counted(Linear((1, 4, 4), classes=4))
    run_pgd(whole, labels, images, pgd_settings(steps=3, restarts=2, targets=9))
    assert whole.seen == (1 + 3 * 2 * 3) * len(images)  # three wrong classes, and one look at the clean images
    spared, wrong = Counted(Unmoved()), torch.ones_like(labels)
    run_pgd(spared, wrong, images, pgd_settings(steps=3, restarts=2, targets=2), Referee(Unmoved(), least=0))
    assert spared.seen == 2 * len(images)  # all fallen before the first step, and no later ascent begun


# ---- balls


def test_length_is_the_norm_of_each_images_change() -> None:
    changes = torch.tensor([[0.3, 0.4], [-0.5, 0.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(perturbation_norm(changes, "linf"), torch.tensor([0.4, 0.5]))
    torch.testing.assert_close(perturbation_norm(changes, "l2"), torch.tensor([0.5, 0.5]))
    assert perturbation_norm(changes.double(), "l2").dtype == torch.double


@every_norm
def test_a_ball_knows_its_norm_and_its_like_of_another_size(norm: Norm) -> None:
    ball = make_ball(norm, 0.1)
    assert (ball.norm, ball.resized(0.4)) == (norm, make_ball(norm, 0.4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("far", [0.01, 0.3, 30.0])
def test_projection_lands_in_ball_and_box_and_stays_there(norm: Norm, seed: int, far: float) -> None:
    images = anywhere((9, 2, 3, 4), seed)
    epsilon = float(torch.rand((), generator=stream("epsilon", seed)))
    points = images + far * torch.randn(images.shape, generator=stream("points", seed))
    ball = make_ball(norm, epsilon)
    once = ball.project(points, images)
    assert (size(once.double() - images.double(), norm) <= epsilon + TOLERANCE).all()
    assert (once >= 0).all()
    assert (once <= 1).all()
    torch.testing.assert_close(ball.project(once, images), once, atol=TOLERANCE, rtol=0)


@every_norm
def test_projection_keeps_what_is_inside_already(norm: Norm) -> None:
    images = inner((9, 2, 3, 4))
    noise = torch.randn(images.shape, generator=stream("noise")).clamp(-1, 1)
    points = images + 0.9 * EPSILONS[norm] / images[0].numel() ** 0.5 * noise
    torch.testing.assert_close(make_ball(norm, EPSILONS[norm]).project(points, images), points, atol=1e-7, rtol=0)


@every_norm
def test_steepest_reaches_the_dual_norm(norm: Norm) -> None:
    gradient = torch.randn(7, 2, 3, 4, generator=stream("gradient"))
    direction = make_ball(norm, 0.1).steepest(gradient)
    torch.testing.assert_close(size(direction, norm), torch.ones(7, dtype=torch.float64), atol=1e-6, rtol=0)
    reached = (direction * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(reached, dual)


@every_norm
def test_steepest_of_no_gradient_is_no_direction(norm: Norm) -> None:
    assert torch.equal(make_ball(norm, 0.1).steepest(torch.zeros(2, 1, 3, 3)), torch.zeros(2, 1, 3, 3))


def test_the_smallest_gradient_points_somewhere_too() -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=stream("tiny"))
    direction = L2(0.1).steepest(gradient * 1e-25)
    torch.testing.assert_close(direction, L2(0.1).steepest(gradient))


def test_linf_start_fills_the_cube() -> None:
    images, epsilon = torch.full((200, 1, 8, 8), 0.5), 0.1
    change = LInf(epsilon).start(images, BatchStream(stream("start"))) - images
    assert float(change.abs().max()) == pytest.approx(epsilon, rel=0.01)
    assert float(change.std()) == pytest.approx(epsilon / 3**0.5, rel=0.05)


def test_l2_start_fills_the_ball_evenly() -> None:
    images, epsilon = torch.full((2000, 1, 2, 2), 0.5), 0.1
    change = L2(epsilon).start(images, BatchStream(stream("start"))) - images
    # the volume inside radius r grows like r^4 in four dimensions, so this share is uniform in [0, 1]
    share = (size(change, "l2") / epsilon) ** 4
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(share.std()) == pytest.approx(12**-0.5, abs=0.03)
    assert float(share.max()) <= 1 + 1e-5


# ---- draws


def batch_draws() -> RandomStream:
    return BatchStream(stream("draws"))


def image_draws() -> RandomStream:
    return ImageStreams(0, "draws", torch.arange(100))


@pytest.mark.parametrize("make", [batch_draws, image_draws])
def test_uniform_draws_fill_minus_one_to_one(make: Callable[[], RandomStream]) -> None:
    drawn = make().uniform(torch.zeros(100, 1, 10, 10))
    assert drawn.shape == (100, 1, 10, 10)
    assert -1 <= float(drawn.min()) < -0.99
    assert 0.99 < float(drawn.max()) <= 1
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(3**-0.5, abs=0.02)


@pytest.mark.parametrize("make", [batch_draws, image_draws])
def test_normal_draws_are_standard(make: Callable[[], RandomStream]) -> None:
    drawn = make().normal(torch.zeros(100, 1, 10, 10))
    assert float(drawn.mean()) == pytest.approx(0, abs=0.04)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("make", [batch_draws, image_draws])
def test_draws_differ_between_images_and_between_calls(make: Callable[[], RandomStream]) -> None:
    draws, like = make(), torch.zeros(100, 1, 3, 3)
    first, second = draws.uniform(like), draws.uniform(like)
    assert len({tuple(row) for row in torch.cat([first, second]).flatten(1).tolist()}) == 200


def test_an_image_draws_the_same_in_any_company() -> None:
    together, alone = ImageStreams(5, "pgd", torch.tensor([3, 7, 9])), ImageStreams(5, "pgd", torch.tensor([7]))
    three, one = torch.zeros(3, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    for _ in range(3):  # later draws must agree too
        assert torch.equal(together.uniform(three)[1:2], alone.uniform(one))
        assert torch.equal(together.normal(three)[1:2], alone.normal(one))


def test_batch_draws_do_depend_on_company() -> None:
    """What the test above would look like for one stream per batch: the reason why evaluation has one per image."""
    together, alone = BatchStream(stream("company")), BatchStream(stream("company"))
    assert not torch.equal(together.uniform(torch.zeros(3, 1, 4, 4))[1:2], alone.uniform(torch.zeros(1, 1, 4, 4)))


@pytest.mark.parametrize("other", [ImageStreams(6, "pgd", torch.tensor([7])), ImageStreams(5, "x", torch.tensor([7]))])
def test_image_draws_depend_on_seed_and_purpose(other: ImageStreams) -> None:
    one = torch.zeros(1, 1, 4, 4)
    assert not torch.equal(ImageStreams(5, "pgd", torch.tensor([7])).uniform(one), other.uniform(one))
