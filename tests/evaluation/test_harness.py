"""The harness: outputs of attacks are verified, each image's result depends on it alone, and killed runs resume.

Shapes: N images, b images of one batch, C channel, H/W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks.ball import L2, Ball, LInf
from advmoe.attacks.custom import Custom
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.gate_aware import Experts, GateFrozen, Misrouting, Transfer
from advmoe.attacks.noise import Noise
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.registry import AttackSettings
from advmoe.attacks.square import Square
from advmoe.core.errors import UserError
from advmoe.evaluation import harness
from advmoe.evaluation.harness import (
    AttackOutcome,
    EvaluationConfig,
    EvaluationResult,
    EvaluationTarget,
    clear_resume_state,
    evaluate,
)
from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts, UniformGate
from advmoe.models.resnet import ResNet18
from advmoe.runtime import machine
from advmoe.runtime.checkpoints import workdir
from advmoe.runtime.machine import generator
from advmoe.statistics.decisions import CLEAN, WORST

COUNT, CLASSES = 20, 3
FGSM = Fgsm(kind="fgsm")
PGD = Pgd(kind="pgd", steps=5, step_size=0.25, restarts=1, loss="ce", targets=0)
NOISE = Noise(kind="noise", draws=5)
SQUARE = Square(kind="square", queries=10, p_init=0.8)
OWN = Custom(kind="own", function="mine.py:attack")
CLIMB: dict[str, Any] = {"steps": 2, "step_size": 0.5, "restarts": 1}
BALL = LInf(0.05)
PIXELS = torch.rand(COUNT, 1, 8, 8, generator=generator("test_harness", "pixels"))

every_ball = pytest.mark.parametrize("ball", [LInf(0.05), L2(0.3)], ids=["linf", "l2"])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Linear(nn.Module):
    """logits = W (x - 1/2): a fast model for most of these tests."""

    def __init__(self, seed: int = 0, classes: int = CLASSES) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(torch.randn(classes, 64, generator=generator("test_harness", "weight", seed)))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return (images_NCHW - 0.5).flatten(1) @ self.weight_KD.T


class Lambda(nn.Module):
    """Wraps a function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.function(images_NCHW)


def constant_class(images_NCHW: Tensor) -> Tensor:
    """Predicts class 0 for every image; every pixel has a gradient."""
    score_N = images_NCHW.flatten(1).square().mean(1)
    return torch.stack([score_N + 5, -score_N, -2 * score_N], dim=1)


def make_resnet() -> ResNet18:
    """Returns a small network whose decisions vary: seeded weights, BatchNorm statistics from some batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet18(channels=1, classes=CLASSES, width=4, mean=(0.5,), std=(0.3,))
    model.train()
    with torch.no_grad():
        for step in range(10):
            model(torch.rand(32, 1, 8, 8, generator=generator("test_harness", "life", step)))
    return model.eval()


def decisions(model: nn.Module, images: Tensor = PIXELS) -> Tensor:
    return inference.predict(model, images, harness.DECISION_BATCH).argmax(1)


def make_target(model: nn.Module | None = None, wrong: bool = True, **more: Any) -> EvaluationTarget:
    """Labels as the model predicts them; with `wrong`, except for every fourth image."""
    model = model or Linear()
    labels = decisions(model)
    labels[:: 4 if wrong else COUNT + 1] += 0 if not wrong else 1
    return EvaluationTarget("tiny", model, PIXELS.clone(), labels % CLASSES, **more)


def make_config(
    ball: Ball = BALL,
    batch_size: int | None = 6,
    drop_fallen: bool = False,
    precision: Precision = "float32",
    limits: Mapping[str, int] | None = None,
    seed: int = 0,
) -> EvaluationConfig:
    return EvaluationConfig(ball, seed, precision, batch_size, drop_fallen, limits or {})


def own(body: str, head: str = "") -> Custom:
    """Writes a custom attack with this body to mine.py."""
    lines = ["import torch", "from pathlib import Path", "from advmoe.attacks.pgd import Pgd, pgd", head]
    lines += ["def attack(model, images, labels, *, ball, draws, is_adversarial=None):"]
    Path("mine.py").write_text("\n".join([*lines, *(f"    {line}" for line in body.splitlines()), ""]))
    return OWN


def same(left: AttackOutcome, right: AttackOutcome) -> bool:
    """Whether all but the seconds is equal."""
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("attacked", "correct", "predicted", "images")
    ) and all(getattr(left, name) == getattr(right, name) for name in ("overshoot", "forward", "backward", "limit"))


def same_result(left: EvaluationResult, right: EvaluationResult) -> bool:
    return (
        torch.equal(left.clean_logits, right.clean_logits)
        and torch.equal(left.labels, right.labels)
        and list(left.outcomes) == list(right.outcomes)
        and all(same(left.outcomes[name], right.outcomes[name]) for name in left.outcomes)
    )


def sentence(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def norm_of(change_NCHW: Tensor, ball: Ball) -> Tensor:
    order = torch.inf if isinstance(ball, LInf) else 2
    length_N: Tensor = torch.linalg.vector_norm(change_NCHW.double().flatten(1), order, dim=1)
    return length_N


# ---- results


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@every_ball
def test_images_are_inside_the_ball_and_classified_in_float32(ball: Ball, precision: Precision) -> None:
    model = make_resnet()
    target = make_target(model)
    result = evaluate(target, {"fgsm": FGSM, "pgd": PGD}, make_config(ball, precision=precision))
    right = decisions(model) == target.labels
    assert torch.equal(result.correct[CLEAN], right)
    torch.testing.assert_close(result.clean_logits, inference.predict(model, PIXELS, harness.DECISION_BATCH))
    for outcome in result.outcomes.values():
        assert torch.equal(outcome.attacked, right)
        change = outcome.images.double() - PIXELS.double()
        assert (norm_of(change, ball) <= ball.epsilon + 1e-6).all()
        assert torch.equal(outcome.images.clamp(0, 1), outcome.images)
        assert torch.equal(outcome.images[~right], PIXELS[~right])
        assert (change[right].flatten(1) != 0).any(dim=1).all()
        assert torch.equal(outcome.predicted, decisions(model, outcome.images))
        assert torch.equal(outcome.correct, right & (outcome.predicted == target.labels))
        assert outcome.overshoot == 0
    assert 0 < result.correct["pgd"].sum() < right.sum()  # some images survive, some do not


def test_worst_is_the_worst_case_over_each_image_and_not_over_the_attacks() -> None:
    result = evaluate(make_target(), {"fgsm": FGSM, "noise": NOISE, "pgd": PGD}, make_config(LInf(0.02)))
    correct = result.correct
    assert list(correct) == [CLEAN, "fgsm", "noise", "pgd", WORST]
    assert torch.equal(correct[WORST], correct[CLEAN] & correct["fgsm"] & correct["noise"] & correct["pgd"])
    assert torch.equal(result.correct_under(["noise"]), correct[CLEAN] & correct["noise"])
    assert torch.equal(result.correct_under([]), correct[CLEAN])
    shares = result.accuracies()
    assert shares[WORST].correct == int(correct[WORST].sum())
    assert {share.total for share in shares.values()} == {COUNT}


def test_two_attacks_that_fool_different_images_count_together() -> None:
    labels, clean = torch.zeros(4, dtype=torch.long), torch.tensor([[1.0, 0.0]]).expand(4, 2)

    def outcome(correct: list[bool]) -> AttackOutcome:
        tensors = (torch.ones(4, dtype=torch.bool), torch.tensor(correct), labels, torch.zeros(4, 1, 1, 1))
        return AttackOutcome(*tensors, overshoot=0.0, forward=0, backward=0, seconds=0.0, limit=4)

    outcomes = {"a": outcome([True, False, True, True]), "b": outcome([False, True, True, True])}
    shares = EvaluationResult(clean, labels, outcomes).accuracies()
    assert [shares[name].correct for name in (CLEAN, "a", "b", WORST)] == [4, 3, 3, 2]


def test_a_model_that_is_always_wrong_is_not_attacked() -> None:
    model = Linear()
    target = EvaluationTarget("tiny", model, PIXELS, (decisions(model) + 1) % CLASSES)
    outcome = evaluate(target, {"pgd": PGD}, make_config()).outcomes["pgd"]
    assert torch.equal(outcome.images, PIXELS)
    assert not outcome.attacked.any()
    assert not outcome.correct.any()
    assert (outcome.forward, outcome.backward, outcome.overshoot) == (0, 0, 0.0)


def test_evaluating_leaves_model_and_images_as_they_were() -> None:
    target = make_target(make_resnet())
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    evaluate(target, {"pgd": PGD, "own": own("images.zero_()\nlabels.zero_()\nreturn images")}, make_config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())
    assert not any(module.training for module in target.model.modules())
    assert all(parameter.requires_grad for parameter in target.model.parameters())
    assert torch.equal(target.images, PIXELS)


def test_without_attacks_there_is_clean_accuracy() -> None:
    result = evaluate(make_target(), {}, make_config())
    assert list(result.correct) == [CLEAN, WORST]
    assert result.accuracies()[WORST] == result.accuracies()[CLEAN]


# ---- dropping, order, limits


def test_a_misclassified_image_is_not_attacked_again() -> None:
    target = make_target()
    result = evaluate(target, {"fgsm": FGSM, "noise": NOISE, "pgd": PGD}, make_config(LInf(0.02), drop_fallen=True))
    fgsm, noise, last = result.outcomes.values()
    assert 0 < fgsm.correct.sum() < fgsm.attacked.sum()
    assert torch.equal(noise.attacked, fgsm.correct)
    assert torch.equal(last.attacked, noise.correct)
    assert torch.equal(noise.images[~fgsm.correct], PIXELS[~fgsm.correct])
    assert not noise.correct[~fgsm.correct].any()
    assert torch.equal(result.correct[WORST], last.correct)


def test_dropping_changes_which_images_are_attacked_and_not_the_result() -> None:
    target = make_target(make_resnet())
    attacks: dict[str, AttackSettings] = {"fgsm": FGSM, "pgd": PGD}
    whole = evaluate(target, attacks, make_config())
    clear_resume_state(target, attacks, make_config())  # or the saved batches would be used
    dropped = evaluate(target, attacks, make_config(drop_fallen=True))
    met = dropped.outcomes["pgd"].attacked
    assert 0 < met.sum() < whole.outcomes["pgd"].attacked.sum()
    assert torch.equal(dropped.outcomes["pgd"].correct[met], whole.outcomes["pgd"].correct[met])
    assert torch.equal(whole.correct[WORST], dropped.correct[WORST])


def test_without_dropping_an_attack_does_not_depend_on_those_before_it() -> None:
    target = make_target()
    attacks: dict[str, AttackSettings] = {"pgd": PGD, "noise": NOISE, "square": SQUARE}
    forwards = evaluate(target, attacks, make_config())
    for name, attack in attacks.items():
        clear_resume_state(target, {name: attack}, make_config())
    backwards = evaluate(target, dict(reversed(attacks.items())), make_config())
    assert list(backwards.outcomes) == ["square", "noise", "pgd"]
    assert all(same(forwards.outcomes[name], backwards.outcomes[name]) for name in attacks)


def test_the_name_of_an_attack_seeds_its_random_stream() -> None:
    target = make_target()
    outcomes = evaluate(target, {"pgd": PGD, "again": PGD}, make_config()).outcomes
    assert not torch.equal(outcomes["pgd"].images, outcomes["again"].images)
    other = evaluate(target, {"pgd": PGD}, make_config(seed=1)).outcomes["pgd"]
    assert not torch.equal(outcomes["pgd"].images, other.images)


@pytest.mark.parametrize("drop_fallen", [False, True])
def test_an_attack_with_a_limit_runs_on_the_first_images_only(drop_fallen: bool) -> None:
    attacks: dict[str, AttackSettings] = {"pgd": PGD, "noise": NOISE}
    config = make_config(LInf(0.2), limits={"pgd": 8}, drop_fallen=drop_fallen)
    result = evaluate(make_target(), attacks, config)
    outcome = result.outcomes["pgd"]
    assert not outcome.attacked[8:].any()
    assert outcome.attacked[:8].any()
    assert outcome.limit == 8
    assert torch.equal(outcome.correct[8:], result.correct[CLEAN][8:])  # not counted
    shares = result.accuracies()
    assert (shares["pgd"].total, shares["pgd"].correct) == (8, int(outcome.correct[:8].sum()))
    assert shares["noise"].total == shares[WORST].total == COUNT
    assert result.outcomes["noise"].attacked[8:].any()


def test_a_limit_beyond_the_images_is_none() -> None:
    free = evaluate(make_target(), {"pgd": PGD}, make_config())
    clear_resume_state(make_target(), {"pgd": PGD}, make_config())
    assert same_result(free, evaluate(make_target(), {"pgd": PGD}, make_config(limits={"pgd": 999})))


# ---- batches


@every_ball
def test_decisions_do_not_depend_on_the_batch_size(ball: Ball) -> None:
    target = make_target(make_resnet())
    attacks: dict[str, AttackSettings] = {"pgd": PGD, "square": SQUARE}
    whole = evaluate(target, attacks, make_config(ball, COUNT))
    assert 0 < whole.correct["pgd"].sum() < whole.correct[CLEAN].sum()
    for batch_size in (1, 3):
        clear_resume_state(target, attacks, make_config(ball))
        found = evaluate(target, attacks, make_config(ball, batch_size))
        for name in attacks:
            assert torch.equal(found.correct[name], whole.correct[name])
            # one pixel whose gradient is all but zero may take its step the other way after another rounding
            change = (found.outcomes[name].images - whole.outcomes[name].images).abs()
            assert (change < 1e-4).double().mean() > 0.98


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_an_attack_gets_batches_of_the_given_size(batch_size: int | None) -> None:
    attack = own("with Path('sizes').open('a') as log:\n    print(len(images), file=log)\nreturn images")
    target = make_target(wrong=False)
    evaluate(target, {"own": attack}, make_config(batch_size=batch_size))
    sizes = [int(line) for line in Path("sizes").read_text().split()]
    assert sizes == {None: [20], 1: [1] * 20, 7: [7, 7, 6]}[batch_size]


LOG = "with Path('sizes').open('a') as log:\n    print(len(images), file=log)\n"
ROOM = "if len(images) > {room}:\n    raise {error}('CUDA out of memory. Tried to allocate 1 GiB')\n"
REAL = "return images + ball.epsilon * draws.uniform(images)"


@pytest.mark.parametrize("error", ["torch.cuda.OutOfMemoryError", "MemoryError", "RuntimeError"])
def test_an_attack_that_runs_out_of_memory_gets_smaller_batches(error: str) -> None:
    target = make_target(wrong=False)
    roomy = evaluate(target, {"own": own(LOG + REAL)}, make_config(batch_size=16))
    Path("sizes").unlink()
    tight = evaluate(target, {"own": own(LOG + ROOM.format(room=5, error=error) + REAL)}, make_config(batch_size=16))
    assert same_result(roomy, tight)
    assert [int(line) for line in Path("sizes").read_text().split()] == [16, 8, 4, 4, 4, 4, 4]


def test_one_image_that_does_not_fit_ends_the_run() -> None:
    attack = own(LOG + ROOM.format(room=0, error="torch.cuda.OutOfMemoryError") + REAL)
    message = sentence(lambda: evaluate(make_target(wrong=False), {"own": attack}, make_config(batch_size=4)))
    assert message.startswith("mine.py:attack raised OutOfMemoryError: CUDA out of memory")
    assert Path("sizes").read_text().split() == ["4", "2", "1"]


def test_another_error_is_not_tried_again() -> None:
    attack = own(LOG + "raise RuntimeError('no idea')")
    message = sentence(lambda: evaluate(make_target(), {"own": attack}, make_config(batch_size=4)))
    assert message == "mine.py:attack raised RuntimeError: no idea"
    assert Path("sizes").read_text().split() == ["4"]


# ---- outputs of attacks are verified


@every_ball
@pytest.mark.parametrize("body", ["return 1 - 2 * images", "return images.mul_(-2).add_(1)"], ids=["new", "in place"])
def test_an_attack_outside_the_ball_is_brought_back_and_reported(ball: Ball, body: str) -> None:
    target = make_target()
    result = evaluate(target, {"own": own(body)}, make_config(ball))
    outcome, right = result.outcomes["own"], result.correct[CLEAN]
    expected = ball.project(1 - 2 * PIXELS, PIXELS)
    torch.testing.assert_close(outcome.images[right], expected[right])
    assert outcome.overshoot == 1.0
    assert torch.equal(outcome.predicted, decisions(target.model, outcome.images))


def test_overshoot_is_the_share_of_the_attacked_images() -> None:
    body = "outside = (torch.arange(len(images)) % 2 == 0).float()[:, None, None, None]\nreturn images + 2 * outside"
    outcome = evaluate(make_target(wrong=False), {"own": own(body)}, make_config(batch_size=4)).outcomes["own"]
    assert outcome.overshoot == 0.5


def test_rounding_is_no_overshoot() -> None:
    outcome = evaluate(make_target(), {"own": own("return images + 1.00001 * ball.epsilon")}, make_config(LInf(0.001)))
    assert outcome.outcomes["own"].overshoot < 1.0  # images near 1 leave the box
    inner = EvaluationTarget("tiny", Linear(), 0.2 + 0.6 * PIXELS, decisions(Linear(), 0.2 + 0.6 * PIXELS))
    found = evaluate(inner, {"own": own("return images + 1.001 * ball.epsilon")}, make_config())
    assert found.outcomes["own"].overshoot == 0.0


def test_a_claimed_success_is_verified() -> None:
    """The clean images are returned as adversarial, and `is_adversarial` is ignored."""
    body = "claimed = is_adversarial(images, (labels + 1) % 3)\nassert claimed.all()\nreturn images"
    target = make_target()
    result = evaluate(target, {"own": own(body)}, make_config())
    assert torch.equal(result.correct["own"], result.correct[CLEAN])


def precision_dependent(images_NCHW: Tensor) -> Tensor:
    """Class 0 in float32, class 1 under autocast."""
    side = -1.0 if torch.is_autocast_enabled("cpu") else 1.0
    score_N = side * (5 + images_NCHW.flatten(1).mean(1))
    return torch.stack([score_N, torch.zeros_like(score_N)], dim=1)


@pytest.mark.parametrize("attack", [FGSM, PGD, NOISE, SQUARE], ids=lambda attack: attack.kind)
def test_success_counts_only_in_float32(attack: AttackSettings) -> None:
    target = make_target(Lambda(precision_dependent), wrong=False)
    result = evaluate(target, {"attack": attack}, make_config(precision="bfloat16"))
    assert result.correct["attack"].all()


class ModeDependent(nn.Module):
    """Predicts other classes in train mode."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return constant_class(images_NCHW) * (-1 if self.training else 1)


def test_a_model_is_evaluated_in_eval_mode() -> None:
    target = make_target(ModeDependent().train(), wrong=False)
    assert evaluate(target, {"pgd": PGD}, make_config()).correct["pgd"].all()
    assert target.model.training


# ---- passes


def test_passes_are_counted_over_all_batches() -> None:
    result = evaluate(
        make_target(Lambda(constant_class), wrong=False), {"fgsm": FGSM, "pgd": PGD, "noise": NOISE}, make_config()
    )
    passes = {name: (outcome.forward, outcome.backward) for name, outcome in result.outcomes.items()}
    # the last points of PGD are classified in float32, which is a pass too
    assert passes == {"fgsm": (COUNT, COUNT), "pgd": (6 * COUNT, 5 * COUNT), "noise": (5 * COUNT, 0)}
    assert all(outcome.seconds >= 0 for outcome in result.outcomes.values())


def test_passes_through_other_networks_count() -> None:
    target = make_target(Lambda(constant_class), wrong=False, sources={"other": Lambda(constant_class)})
    transfer = Transfer(kind="transfer", **CLIMB, sources=("other",))
    outcome = evaluate(target, {"transfer": transfer}, make_config()).outcomes["transfer"]
    assert (outcome.forward, outcome.backward) == (3 * COUNT, 2 * COUNT)


def test_images_misclassified_early_cost_less() -> None:
    free = evaluate(make_target(wrong=False), {"pgd": PGD}, make_config(LInf(0.3))).outcomes["pgd"]
    assert not free.correct.any()
    assert free.backward < 5 * COUNT


# ---- resuming a killed run


COUNTED_PGD = """
calls = Path("calls")
numbers = calls.read_text().split() if calls.exists() else []
if Path("bomb").exists() and len(numbers) >= 2:
    raise RuntimeError("killed")
calls.write_text(" ".join([*numbers, str(len(images))]))
settings = Pgd(kind="pgd", steps=3, step_size=0.5, restarts=1, loss="ce", targets=0)
return pgd(model, images, labels, ball=ball, settings=settings, draws=draws, is_adversarial=is_adversarial)
"""


def calls() -> list[int]:
    """Returns the sizes of the batches attacked since the last call."""
    found = [int(size) for size in Path("calls").read_text().split()] if Path("calls").exists() else []
    Path("calls").unlink(missing_ok=True)
    return found


def kill_after_two_batches(
    target: EvaluationTarget, attacks: Mapping[str, AttackSettings], config: EvaluationConfig
) -> None:
    Path("bomb").touch()
    assert sentence(lambda: evaluate(target, attacks, config)) == "mine.py:attack raised RuntimeError: killed"
    Path("bomb").unlink()


def stored() -> list[Path]:
    return sorted(machine.machine().state_dir.rglob("*.safetensors"))


def test_a_killed_run_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    attacks: dict[str, AttackSettings] = {"pgd": PGD, "own": own(COUNTED_PGD)}
    target, config = make_target(make_resnet(), wrong=False), make_config()
    expected = evaluate(target, attacks, config)
    assert calls() == [6, 6, 6, 2]
    clear_resume_state(target, attacks, config)
    assert stored() == []
    kill_after_two_batches(target, attacks, config)
    assert calls() == [6, 6]
    capsys.readouterr()
    assert same_result(evaluate(target, attacks, config), expected)
    assert "own: 12 images resumed from the interrupted run" in capsys.readouterr().out
    assert calls() == [6, 2]  # the finished batches were not attacked again
    assert same_result(evaluate(target, attacks, config), expected)
    assert calls() == []


def test_a_run_may_resume_with_another_batch_size_or_after_dropping() -> None:
    attacks = {"own": own(COUNTED_PGD)}
    target = make_target(wrong=False)
    expected = evaluate(target, attacks, make_config())
    clear_resume_state(target, attacks, make_config())
    calls()
    kill_after_two_batches(target, attacks, make_config())
    calls()
    found = evaluate(target, attacks, make_config(batch_size=5, drop_fallen=True))
    assert calls() == [5, 3]
    torch.testing.assert_close(found.outcomes["own"].images, expected.outcomes["own"].images, atol=1e-5, rtol=0)
    assert torch.equal(found.correct["own"], expected.correct["own"])


def test_a_damaged_file_is_ignored_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    attacks = {"own": own(COUNTED_PGD)}
    target = make_target(wrong=False)
    expected = evaluate(target, attacks, make_config())
    calls()
    first, second, *_ = stored()
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    found = evaluate(target, attacks, make_config())
    assert calls() == [6, 6]
    assert same_result(found, expected)
    warnings = capsys.readouterr().err
    for path in (first, second):
        assert f"warning: {path} is damaged and ignored; its images are attacked again" in warnings
    evaluate(target, attacks, make_config())  # saved again
    assert calls() == []
    assert "damaged" not in capsys.readouterr().err


def test_an_own_attack_that_was_changed_starts_anew() -> None:
    target = make_target(wrong=False)
    evaluate(target, {"own": own(COUNTED_PGD)}, make_config())
    calls()
    evaluate(target, {"own": own(COUNTED_PGD, head="# another thought")}, make_config())
    assert calls() == [6, 6, 6, 2]


def test_batches_of_another_version_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks, target = {"own": own(COUNTED_PGD)}, make_target(wrong=False)
    evaluate(target, attacks, make_config())
    calls()
    monkeypatch.setattr(workdir, "code_fingerprint", lambda: "another version")
    evaluate(target, attacks, make_config())
    assert calls() == [6, 6, 6, 2]


def changed_labels() -> EvaluationTarget:
    target = make_target(wrong=False)
    target.labels[0] = (target.labels[0] + 1) % CLASSES
    return target


@pytest.mark.parametrize(
    "changed",
    [
        lambda attacks: evaluate(make_target(Linear(seed=1), wrong=False), attacks, make_config()),
        lambda attacks: evaluate(make_target(wrong=False, identity="other file"), attacks, make_config()),
        lambda attacks: evaluate(changed_labels(), attacks, make_config()),
        lambda attacks: evaluate(make_target(wrong=False), attacks, make_config(LInf(0.06))),
        lambda attacks: evaluate(make_target(wrong=False), attacks, make_config(L2(0.05))),
        lambda attacks: evaluate(make_target(wrong=False), attacks, make_config(seed=1)),
        lambda attacks: evaluate(make_target(wrong=False), attacks, make_config(precision="bfloat16")),
        lambda attacks: evaluate(make_target(wrong=False), {"renamed": attacks["own"]}, make_config()),
    ],
    ids=["weights", "identity", "labels", "epsilon", "norm", "seed", "precision", "name"],
)
def test_batches_of_another_configuration_are_not_used(
    changed: Callable[[Mapping[str, AttackSettings]], EvaluationResult],
) -> None:
    attacks = {"own": own(COUNTED_PGD)}
    evaluate(make_target(wrong=False), attacks, make_config())
    calls()
    changed(attacks)
    assert sum(calls()) >= COUNT - 1


def test_clearing_one_attack_keeps_the_others() -> None:
    target = make_target()
    attacks: dict[str, AttackSettings] = {"pgd": PGD, "noise": NOISE}
    evaluate(target, attacks, make_config())
    before = len(stored())
    clear_resume_state(target, {"pgd": PGD}, make_config())
    assert 0 < len(stored()) < before
    clear_resume_state(target, attacks, make_config())
    assert stored() == []
    clear_resume_state(target, attacks, make_config())  # nothing left to delete


# ---- what cannot be evaluated


def nan_on_two(images_NCHW: Tensor) -> Tensor:
    logits = constant_class(images_NCHW)
    bad = (images_NCHW[:, 0, 0, 0] == PIXELS[3, 0, 0, 0]) | (images_NCHW[:, 0, 0, 0] == PIXELS[7, 0, 0, 0])
    return torch.where(bad[:, None], torch.nan, logits)


def plain_target(model: nn.Module, highest: int = 2) -> EvaluationTarget:
    return EvaluationTarget("tiny", model, PIXELS, torch.arange(COUNT) % (highest + 1))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Lambda(nan_on_two), "tiny: NaN or infinite logits on 2 of 20 clean images"),
        (Lambda(lambda images: constant_class(images) / 0), "tiny: NaN or infinite logits on 20 of 20 clean images"),
        (Lambda(lambda images: constant_class(images)[:, :2]), "tiny: outputs 2 classes, but labels go up to 2"),
        (Lambda(lambda images: constant_class(images)[:, :1]), "tiny: outputs 1 classes, but labels go up to 2"),
        (Lambda(lambda images: images), "tiny: must map images to logits (B, K), but returned shape (20, 1, 8, 8)"),
        (
            Lambda(lambda images: constant_class(images)[:, 0]),
            "tiny: must map images to logits (B, K), but returned shape (20,)",
        ),
    ],
)
def test_a_model_that_is_no_classifier_is_rejected_in_one_sentence(model: nn.Module, expected: str) -> None:
    assert sentence(lambda: evaluate(plain_target(model), {"pgd": PGD}, make_config())) == expected


@every_ball
def test_epsilon_0_is_refused(ball: Ball) -> None:
    nothing = type(ball)(0.0)  # type: ignore[call-arg]
    message = sentence(lambda: evaluate(make_target(), {"pgd": PGD}, make_config(nothing)))
    assert message.startswith("epsilon must be greater than 0")


GATED: list[AttackSettings] = [
    GateFrozen(kind="gate-frozen", **CLIMB),
    Misrouting(kind="misrouting", **CLIMB, lambdas=(1.0,)),
    Experts(kind="experts", **CLIMB),
]


@pytest.mark.parametrize("attack", GATED, ids=lambda attack: attack.kind)
def test_an_attack_on_the_gate_of_a_model_without_one_is_refused(attack: AttackSettings) -> None:
    message = sentence(lambda: evaluate(make_target(), {"first": PGD, "mine": attack}, make_config()))
    assert message == f"attack mine: tiny has no gate; {attack.kind} attacks only mixtures of this project"
    assert stored() == []  # raised before any attack ran


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attack", GATED, ids=lambda attack: attack.kind)
def test_an_attack_on_the_gate_of_a_mixture_runs(attack: AttackSettings, precision: Precision) -> None:
    mixture = MixtureOfExperts([make_resnet(), make_resnet()], UniformGate(2), "probabilities")
    target = make_target(mixture)
    assert target.has_gate
    result = evaluate(target, {"attack": attack}, make_config(precision=precision))
    assert result.correct["attack"].sum() <= result.correct[CLEAN].sum()
    assert result.outcomes["attack"].backward > 0


def test_a_missing_source_is_named() -> None:
    target = make_target(sources={"there": Linear(1)})
    transfer = Transfer(kind="transfer", **CLIMB, sources=("there", "gone"))
    message = sentence(lambda: evaluate(target, {"transfer": transfer}, make_config()))
    assert message == "attack transfer: tiny has no source network 'gone' to transfer from"


def test_a_transfer_leaves_its_source_as_it_was() -> None:
    source = make_resnet().train()
    target = make_target(make_resnet(), sources={"other": source})
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    evaluate(target, {"transfer": Transfer(kind="transfer", **CLIMB, sources=("other",))}, make_config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert source.training
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_another_source_starts_a_transfer_anew() -> None:
    transfer = {"transfer": Transfer(kind="transfer", **CLIMB, sources=("other",))}
    first, second = (
        evaluate(make_target(sources={"other": Linear(seed)}), transfer, make_config()).outcomes["transfer"]
        for seed in (1, 2)
    )
    assert not torch.equal(first.images, second.images)


def test_a_missing_own_attack_is_named_before_any_attack_runs() -> None:
    message = sentence(lambda: evaluate(make_target(), {"own": OWN}, make_config()))
    assert message == "mine.py:attack: no such file mine.py"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return images[:1]", "mine.py:attack: must return images of shape (6, 1, 8, 8), not (1, 1, 8, 8)"),
        ("return images * torch.nan", "mine.py:attack: returned NaN or infinite pixels"),
        ("return images.nowhere", "mine.py:attack raised AttributeError: "),
    ],
)
def test_an_own_attack_that_fails_is_named(body: str, expected: str) -> None:
    message = sentence(lambda: evaluate(make_target(wrong=False), {"own": own(body)}, make_config()))
    assert message.startswith(expected)


def test_pgd_by_hand_is_what_the_harness_runs() -> None:
    """Seeds, batches and checks change nothing: the plain function returns the same points."""
    target = make_target(wrong=False)
    outcome = evaluate(target, {"pgd": PGD}, make_config(batch_size=COUNT)).outcomes["pgd"]
    draws = ImageStreams(0, "pgd", torch.arange(COUNT))

    def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wrong: Tensor = target.model(points).argmax(1) != labels
        return wrong

    by_hand = pgd(
        target.model, PIXELS, target.labels, ball=BALL, settings=PGD, draws=draws, is_adversarial=is_adversarial
    )
    torch.testing.assert_close(outcome.images, by_hand, atol=1e-5, rtol=0)
