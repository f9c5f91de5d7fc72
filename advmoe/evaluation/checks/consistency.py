"""Check 10, consistency: the saved images agree with the reported results, and no test image was trained on.

Covers ball and box, replay, epsilon 0, batch size, the used share of epsilon, and overlap with the training data. Most
of it is recommended by Carlini et al. 2019 (arXiv 1902.06705, sections 4 and 5).

Shapes: N images, n of them, C channel, H/W pixels, K classes.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks import engine, registry
from advmoe.attacks.apgd import ApgdCe, ApgdT
from advmoe.attacks.ball import Ball, Norm, perturbation_norm
from advmoe.attacks.custom import Custom
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.registry import AttackSettings
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Issue, error_message, percent, worst_status
from advmoe.evaluation.harness import BALL_TOLERANCE, DECISION_BATCH, AttackOutcome
from advmoe.models import inference

CHECK_ID = "plumbing"
PART_SIZES = (1, 2, 5)  # batch sizes in which a few images are attacked, besides all of them together
FLOAT_TOLERANCE = 1e-6  # in pixel units: float32 cannot represent image + epsilon exactly
TIE_TOLERANCE = 1e-4  # of the largest logit: closer to a tie, a decision may depend on the kernel
MAX_OVERSHOOT_SHARE = 0.1  # share of attacked images outside the ball from which the check fails
MIN_USED_SHARE: dict[Norm, float] = {  # of epsilon, reached at one image at least
    "linf": 0.9,  # along signs, in one pixel at least
    "l2": 0.6,  # the box shortens single long steps, by 0.3 on black images
}
MAX_DUPLICATE_SHARE = 0.01  # share of test images in the training data; fewer may be duplicates within the data set

SubCheck = Callable[[CheckContext, dict[str, Any]], Iterator[Issue]]


def consistency(context: CheckContext) -> CheckResult:
    """Runs all sub-checks; each adds its numbers to the evidence and yields its issues."""
    evidence: dict[str, Any] = {}
    parts: tuple[SubCheck, ...] = (
        _saved_image_issues,
        _overshoot_issues,
        _epsilon_use_issues,
        _replay_issues,
        _rerun_issues,
        _overlap_issues,
    )
    issues = [remark for part in parts for remark in part(context, evidence)]
    overlap = (
        "no test image was trained on" if context.training_hashes is not None else "training images were not available"
    )
    passed = f"the saved images lie in the ball and [0, 1] and are classified alike on replay; {overlap}"
    return CheckResult(CHECK_ID, *worst_status(issues, passed), evidence)


# ---- the saved images


def _saved_image_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    clean, worst = context.target.images.cpu(), 0.0
    for name, outcome in context.result.outcomes.items():
        outside = max_violation(_round_trip(outcome.images), clean, context.config.ball)
        worst = max(worst, outside)
        if outside > FLOAT_TOLERANCE * max(1.0, context.config.ball.epsilon):
            yield ("fail", f"the saved images of {name} leave the ball or [0, 1] by {outside:.2g}")
    evidence["outside"] = round(worst, 9)


def _round_trip(images_NCHW: Tensor) -> Tensor:
    """Returns the images as read back from a file."""
    data = images_NCHW.numpy().astype("<f4").tobytes()
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(images_NCHW.shape).copy())


def max_violation(points_NCHW: Tensor, images_NCHW: Tensor, ball: Ball) -> float:
    """Returns the largest distance of a point outside the ball or [0, 1], infinite for NaN, 0 if all are inside."""
    if not points_NCHW.isfinite().all():
        return float("inf")
    of_box = torch.maximum(-points_NCHW, points_NCHW - 1).amax()
    of_ball = _distances(points_NCHW, images_NCHW, ball).amax() - ball.epsilon
    return max(0.0, float(of_box), float(of_ball))


def _distances(points_NCHW: Tensor, images_NCHW: Tensor, ball: Ball) -> Tensor:
    """Returns the distance of each point to its image (N,), in the ball's norm and in float64."""
    return perturbation_norm(points_NCHW.double() - images_NCHW.double(), ball.norm)


def _overshoot_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    overshoot = {name: outcome.overshoot for name, outcome in context.result.outcomes.items() if outcome.overshoot}
    evidence["overshoot"] = overshoot
    for name, share in overshoot.items():
        where = f"{name} on {percent(share)} of its images"
        if _stays_in_ball(context, name):
            yield (
                "warn",
                f"{where}: the attack left [0, 1] and was projected back, so it did not optimise what is evaluated",
            )
        else:
            why = (
                "the attack left the ball and was projected back: its epsilon is in other units (after normalisation?)"
            )
            yield "fail" if share > MAX_OVERSHOOT_SHARE else "warn", f"{where}: {why}"


def _stays_in_ball(context: CheckContext, name: str) -> bool:
    """Whether the attack itself returns a few images inside the ball, though possibly outside [0, 1]."""
    attack, rows, ball = context.attacks.get(name), _first_correct(context), context.config.ball
    if attack is None or not len(rows) or registry.transfer_sources(attack):
        return False
    images, labels = context.target.images[rows], context.target.labels[rows]
    draws = ImageStreams(context.config.seed, f"check-{CHECK_ID}-{name}", rows)
    try:
        with engine.attack_mode(context.target.model, "float32") as frozen:
            points = registry.bind(attack, {})(frozen, images, labels, ball=ball, draws=draws).detach()
    except Exception as error:  # a user's model or attack may raise anything
        error_message(error)  # raises out-of-memory errors
        return False
    return bool((_distances(points, images, ball) <= ball.epsilon + BALL_TOLERANCE).all())


def _first_correct(context: CheckContext) -> Tensor:
    """Returns positions (n,) of the first correctly classified images, sum(PART_SIZES) at most."""
    right_N = context.result.clean_logits.argmax(dim=1) == context.result.labels
    return right_N.nonzero().squeeze(1)[: sum(PART_SIZES)]


def _epsilon_use_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    """Attacks that should reach the boundary of the ball, but did not, though the model survived on some images."""
    used: dict[str, float] = {}
    ball, clean = context.config.ball, context.target.images.cpu()
    for name, outcome in context.result.outcomes.items():
        attacked = outcome.attacked
        if (
            not ball.epsilon
            or not (outcome.correct & attacked).any()
            or not _should_reach_boundary(context.attacks.get(name), ball)
        ):
            continue
        corners = 1 - clean[attacked].round()  # of the box, which may lie inside the ball
        reachable = _distances(corners, clean[attacked], ball).max().clamp_max(ball.epsilon)
        used[name] = round(float(_distances(outcome.images[attacked], clean[attacked], ball).max() / reachable), 6)
        if used[name] < MIN_USED_SHARE[ball.norm]:
            # an idle built-in attack found no gradient: a fault of the model, covered by the check `gradients`
            idle = not used[name] and not isinstance(context.attacks[name], Custom)
            yield "warn" if idle else "fail", _underused(name, used[name])
    evidence["used_of_epsilon"] = used


def _should_reach_boundary(attack: AttackSettings | None, ball: Ball) -> bool:
    if isinstance(attack, Fgsm):  # the box shortens a single L2 step
        return ball.norm == "linf"
    return isinstance(attack, Pgd | ApgdCe | ApgdT | Custom)


def _underused(name: str, share: float) -> str:
    if not share:
        return f"{name} changes no pixel: its gradient is zero, or it does nothing"
    return f"{name} uses only {percent(share)} of epsilon, as if epsilon were applied after normalisation"


def _replay_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    """Classifies some saved images of each attack again."""
    rows_by_attack = {
        name: outcome.attacked.nonzero().squeeze(1)[: context.settings.images]
        for name, outcome in context.result.outcomes.items()
        if outcome.attacked.any()
    }
    differs = {
        name: int(_replay_differs(context, context.result.outcomes[name], rows).sum())
        for name, rows in rows_by_attack.items()
    }
    evidence["replayed"], evidence["replay_differs"] = sum(map(len, rows_by_attack.values())), sum(differs.values())
    if any(differs.values()):
        yield (
            "fail",
            f"{evidence['replay_differs']} of {evidence['replayed']} saved images are classified differently on replay "
            f"({', '.join(name for name, count in differs.items() if count)}): they are not the images that were "
            "evaluated, or the model is not deterministic",
        )


def _replay_differs(context: CheckContext, outcome: AttackOutcome, rows: Tensor) -> Tensor:
    """Where the class or the correctness differs from the record (n,) bool, except for ties."""
    logits = inference.predict(
        context.target.model, outcome.images[rows].to(context.target.images), DECISION_BATCH
    ).cpu()
    predicted, labels = outcome.predicted[rows], context.result.labels[rows]
    wrongly_counted = outcome.correct[rows] != (predicted == labels)
    return wrongly_counted | ((logits.argmax(1) != predicted) & ~_ties(logits, predicted))


def _ties(logits_nK: Tensor, predicted_n: Tensor) -> Tensor:
    """Where the predicted class has the largest logit within rounding (n,) bool."""
    gap = logits_nK.amax(dim=1) - logits_nK.gather(1, predicted_n[:, None]).squeeze(1)
    return gap <= TIE_TOLERANCE * logits_nK.abs().amax()


# ---- attacked again


def _rerun_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    """Attacks a few images again: with epsilon 0, then in one batch and in several."""
    rows = _first_correct(context)
    evidence["changed_without_epsilon"], evidence["changed_in_parts"] = {}, {}
    for name, attack in _repeatable(context).items() if len(rows) else ():
        try:
            yield from _zero_epsilon_issues(context, name, attack, rows, evidence["changed_without_epsilon"])
            yield from _batch_size_issues(context, name, attack, rows, evidence["changed_in_parts"])
        except Exception as error:  # a user's model or attack may raise anything
            yield ("warn", f"{name} raises on a small batch ({error_message(error)})")


def _repeatable(context: CheckContext) -> dict[str, AttackSettings]:
    """Returns the custom attacks, and one built-in attack with `settings.steps` steps."""
    own = {name: attack for name, attack in context.attacks.items() if isinstance(attack, Custom)}
    built_in = [
        (name, attack) for name, attack in context.attacks.items() if isinstance(attack, Pgd | ApgdCe | ApgdT | Fgsm)
    ]
    iterative = [(name, attack) for name, attack in built_in if not isinstance(attack, Fgsm)] or built_in
    return own | {name: _shortened(attack, context.settings.steps) for name, attack in iterative[:1]}


def _shortened(attack: AttackSettings, steps: int) -> AttackSettings:
    limits = {"steps": steps, "restarts": 1, "targets": 1}
    return attack.model_copy(
        update={key: min(most, getattr(attack, key)) for key, most in limits.items() if hasattr(attack, key)}
    )


def _zero_epsilon_issues(
    context: CheckContext, name: str, attack: AttackSettings, rows: Tensor, changed: dict[str, int]
) -> Iterator[Issue]:
    adversarial = _attack_rows(context, name, attack, rows, context.config.ball.resized(0.0))
    clean = context.result.clean_logits[rows]
    decisions = inference.predict(context.target.model, adversarial.images, DECISION_BATCH).cpu().argmax(1)
    moved = int((adversarial.overshoot > BALL_TOLERANCE).sum())
    changed[name] = int(((decisions != clean.argmax(1)) & ~_ties(clean, decisions)).sum())
    if changed[name]:
        yield ("fail", f"at epsilon 0, {name} changes {changed[name]} of {len(rows)} clean decisions")
    if moved:
        yield (
            "fail",
            f"at epsilon 0, {name} still changes {moved} of {len(rows)} images: it ignores the given epsilon",
        )


def _batch_size_issues(
    context: CheckContext, name: str, attack: AttackSettings, rows: Tensor, changed: dict[str, int]
) -> Iterator[Issue]:
    ball = context.config.ball
    together = _attack_rows(context, name, attack, rows, ball).images
    sizes = list(PART_SIZES) if len(rows) == sum(PART_SIZES) else [1] * len(rows)
    parts = torch.cat([_attack_rows(context, name, attack, part, ball).images for part in torch.split(rows, sizes)])
    first, second = (
        inference.predict(context.target.model, points, DECISION_BATCH).cpu() for points in (together, parts)
    )
    differs = (first.argmax(1) != second.argmax(1)) & ~_ties(first, second.argmax(1))
    changed[name] = int(differs.sum())
    if changed[name]:
        # a single change may be rounding that grew over the steps
        yield (
            "fail" if changed[name] > len(rows) // 4 else "warn",
            f"{changed[name]} of {len(rows)} images are classified differently after {name} in batches of other sizes: "
            "its result depends on the batch",
        )


def _attack_rows(
    context: CheckContext, name: str, attack: AttackSettings, rows: Tensor, ball: Ball
) -> engine.AttackResult:
    """Attacks the images at `rows` in float32, so that precision does not affect the comparison."""
    images, labels = context.target.images[rows], context.target.labels[rows]
    draws = ImageStreams(context.config.seed, f"check-{CHECK_ID}-{name}", rows)
    attack_fn = registry.bind(attack, {})
    return engine.run_attack(
        context.target.model, images, labels, attack_fn, ball=ball, draws=draws, precision="float32"
    )


# ---- overlap with the training data


def content_hashes(images_uint8_NCHW: Tensor) -> list[str]:
    """Returns the sha256 of every image's size and pixels; images are uint8 (N, C, H, W)."""
    assert images_uint8_NCHW.dtype == torch.uint8
    size = "x".join(map(str, images_uint8_NCHW.shape[1:])).encode()
    return [hashlib.sha256(size + b":" + image.tobytes()).hexdigest() for image in images_uint8_NCHW.cpu().numpy()]


def _overlap_issues(context: CheckContext, evidence: dict[str, Any]) -> Iterator[Issue]:
    evidence["leaked"] = None
    if context.training_hashes is None:
        return
    hashes = content_hashes((context.target.images * 255).round().to(torch.uint8))
    overlapping, total = sum(hash_ in context.training_hashes for hash_ in hashes), len(hashes)
    evidence["leaked"] = overlapping
    if overlapping:
        few = overlapping <= max(2, MAX_DUPLICATE_SHARE * total)
        cause = "probably duplicates within the data set" if few else "the test set is not held out"
        yield (
            "warn" if few else "fail",
            f"{overlapping} of {total} test images also occur in the training data: {cause}",
        )
