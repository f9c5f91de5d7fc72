"""Attacks that know of the gate, on mixtures so small that it is plain what each of them must find.

Shapes: B batch, b images still open, C channel, H/W pixels, D pixels of an image in one row, E experts, K classes.
"""

from collections.abc import Callable, Mapping
from typing import TypedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import registry
from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.engine import FrozenModel, PassCount
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting, Transfer, gate_loss
from advmoe.attacks.interface import IsAdversarial, Model
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.registry import AttackSettings
from advmoe.models.mixture import Mixing, MixtureOfExperts, MixtureOutput, mix
from advmoe.runtime.machine import generator

COUNT = 8
SHAPE = (COUNT, 2, 4, 4)
ZEROS = torch.zeros(COUNT, dtype=torch.long)
every_mixing = pytest.mark.parametrize("mixing", ["probabilities", "logits"])


class _Climb(TypedDict):
    steps: int
    step_size: float
    restarts: int


CLIMB: _Climb = {"steps": 10, "step_size": 0.25, "restarts": 1}
PGD = Pgd(kind="pgd", **CLIMB, loss="ce", targets=0)
FROZEN = GateFrozen(kind="gate-frozen", **CLIMB)
MISROUTING = Misrouting(kind="misrouting", **CLIMB, lambdas=(1.0,))
EXPERTS = Experts(kind="experts", **CLIMB)


def stream(*parts: object) -> torch.Generator:
    return generator("test_gated", *parts)


def pixels() -> Tensor:
    """Both channels of every image have a mean of 1/2."""
    noise = 0.2 * torch.rand(SHAPE, generator=stream("pixels"))
    return 0.5 + noise - noise.mean(dim=(2, 3), keepdim=True)


class Dense(nn.Module):
    """A small smooth network; as a gate it gives log weights."""

    def __init__(self, name: str, outputs: int, normed: bool = False) -> None:
        super().__init__()
        draw = stream("dense", name)
        self.first_DH = nn.Parameter(torch.randn(32, 12, generator=draw), requires_grad=False)
        self.second_HK = nn.Parameter(torch.randn(12, outputs, generator=draw), requires_grad=False)
        self.normed = normed

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores_BK = torch.tanh((images_BCHW - 0.5).flatten(1) @ self.first_DH) @ self.second_HK
        return functional.log_softmax(scores_BK, dim=1) if self.normed else scores_BK


class Lambda(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.function(images_BCHW)


def dense_mixture(mixing: Mixing = "probabilities") -> MixtureOfExperts:
    experts = [Dense(f"expert {number}", 3) for number in range(2)]
    return MixtureOfExperts(experts, Dense("gate", 2, normed=True), mixing)


def frozen(model: nn.Module, passes: PassCount | None = None) -> FrozenModel:
    return FrozenModel(model.eval(), "float32", passes or PassCount())


def decisions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        labels: Tensor = model(images).argmax(1)
    return labels


def run(
    settings: AttackSettings,
    model: Model,
    labels: Tensor,
    ball: Ball,
    is_adversarial: IsAdversarial | None = None,
    sources: Mapping[str, Model] | None = None,
) -> Tensor:
    attack_fn = registry.bind(settings, sources or {})
    draws = ImageStreams(0, "gated", torch.arange(COUNT))
    return attack_fn(model, pixels(), labels, ball=ball, draws=draws, is_adversarial=is_adversarial)


def starts(ball: Ball) -> Tensor:
    """Where all of these attacks begin."""
    return ball.start(pixels(), ImageStreams(0, "gated", torch.arange(COUNT)))


def one_step(settings: AttackSettings, model: nn.Module, labels: Tensor) -> Tensor:
    """The direction of the first step, (B, D); in L2 that is the gradient's."""
    ball = L2(4.0)  # so wide that neither ball nor projection bends a short step
    moved = run(settings, frozen(model), labels, L2Inside(ball.epsilon)) - starts(L2Inside(ball.epsilon))
    return moved.flatten(1)


class L2Inside(L2):
    """Without the box, and starting near the image: for a look at a gradient."""

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        del images
        return points

    def start(self, images: Tensor, draws: object) -> Tensor:
        del draws
        return images + 0.05 * torch.randn(images.shape, generator=stream("start"))


def numeric_gradient(function: Callable[[Tensor], Tensor], points: Tensor, width: float = 1e-4) -> Tensor:
    """Central differences in double, one pixel after another (B, D); `function` maps images to (B,)."""
    columns = []
    for pixel in range(points[0].numel()):
        step = torch.zeros(points[0].numel(), dtype=torch.double)
        step[pixel] = width
        step = step.view(points.shape[1:])
        columns.append((function(points.double() + step) - function(points.double() - step)) / (2 * width))
    return torch.stack(columns, dim=1)


def cosines(left_BD: Tensor, right_BD: Tensor) -> Tensor:
    return torch.cosine_similarity(left_BD.double(), right_BD.double(), dim=1)


# ---- (b) the gate frozen


@every_mixing
def test_gate_frozen_climbs_the_mixture_whose_gate_stays_as_on_the_clean_image(mixing: Mixing) -> None:
    model = dense_mixture(mixing)
    labels = decisions(model, pixels())
    short = FROZEN.model_copy(update={"steps": 1, "step_size": 0.01})
    moved = one_step(short, model, labels)
    precise = dense_mixture(mixing).double()
    with torch.no_grad():
        clean_gate = precise.gate(pixels().double())

    def frozen_loss(points: Tensor) -> Tensor:
        logits_BEK = torch.stack([expert(points) for expert in precise.experts], dim=1)
        return functional.cross_entropy(mix(clean_gate, logits_BEK, mixing), labels, reduction="none")

    def whole_loss(points: Tensor) -> Tensor:
        return functional.cross_entropy(precise(points), labels, reduction="none")

    at = starts(L2Inside(4.0))
    assert (cosines(moved, numeric_gradient(frozen_loss, at)) > 0.999).all()
    # and this is another direction than that of the mixture as it is, which plain PGD takes
    assert cosines(moved, numeric_gradient(whole_loss, at)).median() < 0.98
    plain = one_step(PGD.model_copy(update={"steps": 1, "step_size": 0.01}), model, labels)
    assert (cosines(plain, numeric_gradient(whole_loss, at)) > 0.999).all()


def only_the_gate_moves(mixing: Mixing = "probabilities") -> MixtureOfExperts:
    """Experts that give the same answers whatever they see: one right, one wrong about class 0."""
    right, wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])
    experts = [
        Lambda(lambda images, answer=answer: answer + 0 * images.flatten(1).sum(1, keepdim=True))  # type: ignore[misc]
        for answer in (right, wrong)
    ]
    return MixtureOfExperts(experts, Dense("gate", 2, normed=True), mixing)


def test_gate_frozen_finds_nothing_to_climb_where_only_the_gate_moves() -> None:
    ball = LInf(0.1)
    assert torch.equal(run(FROZEN, frozen(only_the_gate_moves()), ZEROS, ball), starts(ball))
    assert not torch.equal(run(PGD, frozen(only_the_gate_moves()), ZEROS, ball), starts(ball))


def test_gate_frozen_is_judged_on_a_gate_that_moves() -> None:
    """Its own view of the mixture never changes here, but what it shows to its caller does."""
    model, ball = only_the_gate_moves(), LInf(0.3)
    asked: list[Tensor] = []

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        asked.append(decisions(model, points) != labels)
        return asked[-1]

    labels = decisions(model, pixels())
    found = run(FROZEN.model_copy(update={"steps": 1}), frozen(model), labels, ball, is_adversarial)
    suspects, everybody_left = asked
    assert suspects.all()  # during the climb: points that the whole mixture gets wrong, and only they
    assert 0 < len(suspects) == int((decisions(model, starts(ball)) != labels).sum())
    assert len(everybody_left) == COUNT - len(suspects)
    assert torch.equal(found, starts(ball))


# ---- (c) misrouting


def some_parts() -> tuple[MixtureOutput, Tensor]:
    log_gate_BE = torch.randn(5, 3, generator=stream("gate"), dtype=torch.double).log_softmax(1)
    logits_BEK = torch.randn(5, 3, 4, generator=stream("votes"), dtype=torch.double)
    leaves = (log_gate_BE.requires_grad_(True), logits_BEK.requires_grad_(True))
    return MixtureOutput(mix(*leaves, "probabilities"), *leaves), torch.arange(5) % 4


def test_gate_loss_is_the_mean_loss_of_the_experts_under_the_gate() -> None:
    parts, labels = some_parts()
    with torch.no_grad():
        expected = []
        for gate_E, logits_EK, label in zip(parts.log_gate_BE.exp(), parts.logits_BEK, labels.tolist(), strict=True):
            losses = [-(row.exp() / row.exp().sum()).log()[label] for row in logits_EK]
            expected.append(sum(share * loss for share, loss in zip(gate_E, losses, strict=True)))
    torch.testing.assert_close(gate_loss(parts, labels).detach(), torch.stack(expected))


def test_gate_loss_moves_the_gate_and_not_the_experts() -> None:
    parts, labels = some_parts()
    to_gate, to_votes = torch.autograd.grad(
        gate_loss(parts, labels).sum(), [parts.log_gate_BE, parts.logits_BEK], allow_unused=True
    )
    assert to_votes is None or not to_votes.any()
    losses_BE = -parts.logits_BEK.detach().log_softmax(2)[torch.arange(5), :, labels]
    torch.testing.assert_close(to_gate, parts.log_gate_BE.detach().exp() * losses_BE)


def test_gate_loss_is_highest_where_the_gate_trusts_the_worst_expert() -> None:
    logits_BEK = torch.tensor([[[5.0, 0.0], [0.0, 0.0], [0.0, 5.0]]]).expand(3, 3, 2)
    log_gate_BE = torch.full((3, 3), -20.0).fill_diagonal_(0.0)
    losses = gate_loss(MixtureOutput(torch.zeros(3, 2), log_gate_BE, logits_BEK), torch.zeros(3, dtype=torch.long))
    assert losses.tolist() == sorted(losses.tolist())
    assert float(losses[2] - losses[0]) == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("ball", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 3])
@every_mixing
def test_misrouting_without_a_gate_loss_is_plain_pgd(mixing: Mixing, restarts: int, ball: Ball) -> None:
    model = dense_mixture(mixing)
    labels = decisions(model, pixels())
    plain = run(PGD.model_copy(update={"restarts": restarts}), frozen(model), labels, ball)
    none = MISROUTING.model_copy(update={"restarts": restarts, "lambdas": (0.0,)})
    torch.testing.assert_close(run(none, frozen(model), labels, ball), plain, atol=1e-6, rtol=0)
    assert not torch.allclose(run(MISROUTING, frozen(model), labels, ball), plain, atol=1e-3)


@pytest.mark.parametrize("weight", [0.5, 50.0])
def test_misrouting_climbs_ce_plus_lambda_times_the_gate_loss(weight: float) -> None:
    model = dense_mixture()
    labels = decisions(model, pixels())
    settings = MISROUTING.model_copy(update={"steps": 1, "step_size": 0.01, "lambdas": (weight,)})
    moved = one_step(settings, model, labels)
    at, precise = starts(L2Inside(4.0)).double(), dense_mixture().double()
    with torch.no_grad():
        losses_BE = torch.stack(
            [functional.cross_entropy(expert(at), labels, reduction="none") for expert in precise.experts], dim=1
        )

    def loss(points: Tensor) -> Tensor:
        whole = functional.cross_entropy(precise(points), labels, reduction="none")
        routed: Tensor = (precise.gate(points).exp() * losses_BE).sum(1)
        return whole + weight * routed

    assert (cosines(moved, numeric_gradient(loss, at)) > 0.999).all()


def test_every_lambda_gets_its_restarts() -> None:
    model = dense_mixture()
    labels, passes = decisions(model, pixels()), PassCount()
    settings = MISROUTING.model_copy(update={"restarts": 2, "lambdas": (0.0, 1.0, 10.0)})
    run(settings, frozen(model, passes), labels, LInf(0.1))
    assert passes == PassCount(forward=3 * 2 * 10 * COUNT, backward=3 * 2 * 10 * COUNT)


def test_a_lambda_later_in_the_list_does_not_spoil_what_an_earlier_one_found() -> None:
    model, ball = dense_mixture(), LInf(0.005)
    labels = decisions(model, pixels())

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        return decisions(model, points) != labels

    def fallen(*lambdas: float) -> Tensor:
        found = run(MISROUTING.model_copy(update={"lambdas": lambdas}), frozen(model), labels, ball, is_adversarial)
        return decisions(model, found) != labels

    assert 0 < fallen(0.0).sum() < COUNT
    assert (fallen(0.0, 100.0) >= fallen(0.0)).all()


# ---- a mixture whose weak spot is its gate


def weak_gate(images_BCHW: Tensor) -> Tensor:
    """The right expert as long as the first channel is dark: its mean must rise by 0.08 over all 16 pixels."""
    side_B = 200 * (images_BCHW[:, 0].mean(dim=(1, 2)) - 0.58)
    return functional.log_softmax(torch.stack([-side_B, side_B], dim=1), dim=1)


def expert(answer: float) -> Lambda:
    """Class 0 for a positive answer; a glance at the second channel gives it a gradient, too small to matter."""
    return Lambda(lambda images: torch.stack([answer + images[:, 1].mean(dim=(1, 2)), torch.zeros(len(images))], dim=1))


def test_misrouting_finds_the_gate_that_is_the_weak_spot_and_gate_frozen_does_not() -> None:
    model, ball = MixtureOfExperts([expert(4.0), expert(-4.0)], Lambda(weak_gate), "probabilities"), LInf(0.1)
    assert torch.equal(decisions(model, pixels()), ZEROS)
    found = {settings.kind: run(settings, frozen(model), ZEROS, ball) for settings in (FROZEN, MISROUTING, EXPERTS)}
    fallen = {kind: int(decisions(model, points).sum()) for kind, points in found.items()}
    assert fallen == {"gate-frozen": 0, "misrouting": COUNT, "experts": 0}
    for kind, points in found.items():
        torch.testing.assert_close(ball.project(points, pixels()), points, msg=kind)


# ---- (d) experts alone and (e) other networks: judged on the model


def lines(direction: int, gap: float) -> Lambda:
    """Class 1 once the mean of one channel has risen by `gap`."""

    def logits(images: Tensor) -> Tensor:
        lead = 20 * (images[:, direction].mean(dim=(1, 2)) - 0.5 - gap)
        return torch.stack([torch.zeros_like(lead), lead], dim=1)

    return Lambda(logits)


def two_lines(heard: int) -> MixtureOfExperts:
    """The first expert falls at once, along the first channel, the second late, along the second; one is heard."""

    def gate(images: Tensor) -> Tensor:
        scores = torch.full((len(images), 2), -30.0)
        scores[:, heard] = 0.0
        return scores + 0 * images.flatten(1).sum(1, keepdim=True)

    return MixtureOfExperts([lines(0, gap=-0.2), lines(1, gap=0.08)], Lambda(gate), "probabilities")


class Verdict:
    """The caller's verdict; remembers what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.asked, self.denied = model, 0, 0

    def __call__(self, points: Tensor, labels: Tensor) -> Tensor:
        wrong = decisions(self.model, points) != labels
        self.asked, self.denied = self.asked + len(points), self.denied + int((~wrong).sum())
        return wrong


def test_an_expert_that_falls_is_no_mixture_that_falls() -> None:
    """The expert that is never heard is wrong from the start, yet its images stay until the mixture falls, too."""
    model, ball = two_lines(heard=1), LInf(0.1)
    labels, verdict = ZEROS, Verdict(model)
    assert decisions(model.experts[0], pixels()).all()
    assert not decisions(model, pixels()).any()
    found = run(EXPERTS, frozen(model), labels, ball, verdict)
    assert decisions(model, found).all()
    assert (verdict.asked, verdict.denied) == (COUNT, 0)  # asked only about what the mixture itself gets wrong


def test_an_expert_that_nobody_hears_gives_nothing() -> None:
    model, verdict = two_lines(heard=1), Verdict(two_lines(heard=1))
    model.experts = model.experts[:1]  # what is climbed
    whole = two_lines(heard=1)

    class OnlyFirst(FrozenModel):
        def expert_models(self) -> list[Model]:
            return [FrozenModel(whole.experts[0], "float32", self.passes)]

    found = run(EXPERTS, OnlyFirst(whole, "float32", PassCount()), ZEROS, LInf(0.1), verdict)
    assert not decisions(whole, found).any()
    assert verdict.asked == 0
    torch.testing.assert_close(LInf(0.1).project(found, pixels()), found)


def transfer_settings(*sources: str) -> Transfer:
    return Transfer(kind="transfer", **CLIMB, sources=sources)


def test_a_transfer_is_judged_on_the_model_and_takes_every_source() -> None:
    target, ball = lines(1, gap=0.08), LInf(0.1)
    sources = {"decoy": lines(0, gap=-0.2), "twin": lines(1, gap=-0.3)}
    surrogates = {name: frozen(source) for name, source in sources.items()}
    assert all(decisions(source, pixels()).all() for source in sources.values())
    fallen = {}
    for names in (("decoy",), ("twin",), ("decoy", "twin")):
        verdict = Verdict(target)
        found = run(transfer_settings(*names), frozen(target), ZEROS, ball, verdict, surrogates)
        fallen[names] = int(decisions(target, found).sum())
        assert verdict.denied == 0
        assert verdict.asked == fallen[names]
    assert fallen == {("decoy",): 0, ("twin",): COUNT, ("decoy", "twin"): COUNT}


def test_a_transfer_takes_no_gradient_of_its_target() -> None:
    passes = PassCount()
    surrogates = {"twin": frozen(lines(1, gap=0.0))}
    run(
        transfer_settings("twin"),
        frozen(lines(1, gap=0.08), passes),
        ZEROS,
        LInf(0.1),
        Verdict(lines(1, 0.08)),
        surrogates,
    )
    assert passes.backward == 0
    assert 0 < passes.forward <= 10 * COUNT


def test_experts_climbs_each_expert_on_its_own() -> None:
    """Without a verdict the last expert's point comes back: that of plain PGD on it, with its turn of the draws."""
    model, ball = dense_mixture(), LInf(0.1)
    labels = decisions(model, pixels())
    draws = ImageStreams(0, "gated", torch.arange(COUNT))
    for member in model.experts:
        alone = registry.bind(PGD, {})(frozen(member), pixels(), labels, ball=ball, draws=draws)
    torch.testing.assert_close(run(EXPERTS, frozen(model), labels, ball), alone, atol=1e-6, rtol=0)
