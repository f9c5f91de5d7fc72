"""Check 10: do the images that were saved support what is said of them, and were they the right images?

Ball and box, replay, epsilon 0, batch size, how much of epsilon an attack uses, and test images that were trained on.
Most of it is on the list of Carlini et al. 2019 (arXiv 1902.06705, sections 4 and 5).

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
from advmoe.attacks.ball import Ball, Norm, length
from advmoe.attacks.custom import Custom
from advmoe.attacks.fgsm import Fgsm
from advmoe.attacks.pgd import Pgd
from advmoe.attacks.random_streams import ImageDraws
from advmoe.attacks.registry import AnyAttack
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Remark, error_message, percent, worst_status
from advmoe.evaluation.harness import DECISION_BATCH, OUTSIDE, Outcome
from advmoe.models import inference

CHECK = "plumbing"
PARTS = (1, 2, 5)  # sizes of the batches that a few images are attacked in, after all of them together
TOLERANCE = 1e-6  # of the pixel range: float32 cannot hold image + epsilon exactly
ROUNDING = 1e-4  # of the largest logit: closer to a tie than this, a decision may turn with the kernel
STRAYED = 0.1  # share of attacked images outside the ball that is no accident
SPENT: dict[Norm, float] = {  # of epsilon, that an attack reaches at some image
    "linf": 0.9,  # along signs, in some pixel
    "l2": 0.6,  # the box cuts single long steps, by 0.3 on black images, and nothing else
}
LEAKED = 0.01  # share of test images that were trained on; below it, duplicates that data sets hold themselves

Part = Callable[[CheckContext, dict[str, Any]], Iterator[Remark]]


def consistency(case: CheckContext) -> CheckResult:
    """All parts; each puts its numbers into the evidence and yields what it has to say."""
    evidence: dict[str, Any] = {}
    parts: tuple[Part, ...] = (_inside, _overshoot, _use_of_epsilon, _replay, _attacked_again, _leak)
    remarks = [remark for part in parts for remark in part(case, evidence)]
    leak = "no test image was trained on" if case.training is not None else "training images were not at hand"
    otherwise = f"the saved images lie in ball and box and replay to the same decisions; {leak}"
    return CheckResult(CHECK, *worst_status(remarks, otherwise), evidence)


# ---- the saved images


def _inside(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    clean, worst = case.target.images.cpu(), 0.0
    for name, outcome in case.measured.outcomes.items():
        outside = outside_by(_through_bytes(outcome.images), clean, case.terms.ball)
        worst = max(worst, outside)
        if outside > TOLERANCE * max(1.0, case.terms.ball.epsilon):
            yield ("fail", f"the saved images of {name} leave the ball or [0, 1] by {outside:.2g}")
    evidence["outside"] = round(worst, 9)


def _through_bytes(images_NCHW: Tensor) -> Tensor:
    """As a file would give the images back."""
    data = images_NCHW.numpy().astype("<f4").tobytes()
    return torch.from_numpy(np.frombuffer(data, "<f4").reshape(images_NCHW.shape).copy())


def outside_by(points_NCHW: Tensor, images_NCHW: Tensor, ball: Ball) -> float:
    """How far the worst point is outside of ball or box, infinite for no number, 0 for none."""
    if not points_NCHW.isfinite().all():
        return float("inf")
    of_box = torch.maximum(-points_NCHW, points_NCHW - 1).amax()
    of_ball = _sizes(points_NCHW, images_NCHW, ball).amax() - ball.epsilon
    return max(0.0, float(of_box), float(of_ball))


def _sizes(points_NCHW: Tensor, images_NCHW: Tensor, ball: Ball) -> Tensor:
    """How far each point is from its image (N,), in the ball's norm and in float64."""
    return length(points_NCHW.double() - images_NCHW.double(), ball.norm)


def _overshoot(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    overshoot = {name: outcome.overshoot for name, outcome in case.measured.outcomes.items() if outcome.overshoot}
    evidence["overshoot"] = overshoot
    for name, share in overshoot.items():
        where = f"{name} on {percent(share)} of its images"
        if _heeds_the_ball(case, name):
            yield (
                "warn",
                f"{where}: the attack left [0, 1] and was brought back, so it did not see what it was judged by",
            )
        else:
            why = "the attack left the ball and was brought back: its epsilon is in other units (after normalisation?)"
            yield "fail" if share > STRAYED else "warn", f"{where}: {why}"


def _heeds_the_ball(case: CheckContext, name: str) -> bool:
    """Whether a few images are inside the ball as the attack itself returns them, if perhaps outside [0, 1]."""
    attack, rows, ball = case.attacks.get(name), _few_correct(case), case.terms.ball
    if attack is None or not len(rows) or registry.sources_of(attack):
        return False
    images, labels = case.target.images[rows], case.target.labels[rows]
    draws = ImageDraws(case.terms.seed, f"check-{CHECK}-{name}", rows)
    try:
        with engine.attack_mode(case.target.model, "float32") as cheap:
            found = registry.bind(attack, {})(cheap, images, labels, ball=ball, draws=draws).detach()
    except Exception as error:  # anybody's model or attack, which may raise anything
        error_message(error)  # raises what is nobody's fault
        return False
    return bool((_sizes(found, images, ball) <= ball.epsilon + OUTSIDE).all())


def _few_correct(case: CheckContext) -> Tensor:
    """The first images (n,) that are right when clean, as many as are attacked again."""
    right_N = case.measured.clean_logits.argmax(dim=1) == case.measured.labels
    return right_N.nonzero().squeeze(1)[: sum(PARTS)]


def _use_of_epsilon(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    """Of attacks that go as far as they may and were not done before that: something survived them."""
    used: dict[str, float] = {}
    ball, clean = case.terms.ball, case.target.images.cpu()
    for name, outcome in case.measured.outcomes.items():
        met = outcome.attacked
        if (
            not ball.epsilon
            or not (outcome.correct & met).any()
            or not _goes_to_the_limit(case.attacks.get(name), ball)
        ):
            continue
        corners = 1 - clean[met].round()  # of the box, which may end before the ball does
        reachable = _sizes(corners, clean[met], ball).max().clamp_max(ball.epsilon)
        used[name] = round(float(_sizes(outcome.images[met], clean[met], ball).max() / reachable), 6)
        if used[name] < SPENT[ball.norm]:
            # an idle attack of ours has found no gradient, which is the model's fault and another check's business
            idle = not used[name] and not isinstance(case.attacks[name], Custom)
            yield "warn" if idle else "fail", _underused(name, used[name])
    evidence["used_of_epsilon"] = used


def _goes_to_the_limit(attack: AnyAttack | None, ball: Ball) -> bool:
    if isinstance(attack, Fgsm):  # a single L2 step is cut by the box and never made up for
        return ball.norm == "linf"
    return isinstance(attack, Pgd | ApgdCe | ApgdT | Custom)


def _underused(name: str, share: float) -> str:
    if not share:
        return f"{name} changes nothing: its gradient is zero, or it does not attack"
    return f"{name} uses only {percent(share)} of epsilon, as an epsilon applied after normalisation does"


def _replay(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    """Some saved images of each attack, classified again."""
    asked = {
        name: outcome.attacked.nonzero().squeeze(1)[: case.probes.images]
        for name, outcome in case.measured.outcomes.items()
        if outcome.attacked.any()
    }
    differs = {name: int(_differs(case, case.measured.outcomes[name], rows).sum()) for name, rows in asked.items()}
    evidence["replayed"], evidence["replay_differs"] = sum(map(len, asked.values())), sum(differs.values())
    if any(differs.values()):
        yield (
            "fail",
            f"{evidence['replay_differs']} of {evidence['replayed']} saved images get another decision on replay "
            f"({', '.join(name for name, count in differs.items() if count)}): they are not the images that were "
            "judged, or the model does not answer twice alike",
        )


def _differs(case: CheckContext, outcome: Outcome, rows: Tensor) -> Tensor:
    """Where the decision, or what was concluded from it, is not the one on record (n,); ties aside."""
    logits = inference.predict(case.target.model, outcome.images[rows].to(case.target.images), DECISION_BATCH).cpu()
    predicted, labels = outcome.predicted[rows], case.measured.labels[rows]
    wrongly_counted = outcome.correct[rows] != (predicted == labels)
    return wrongly_counted | ((logits.argmax(1) != predicted) & ~_ties(logits, predicted))


def _ties(logits_nK: Tensor, predicted_n: Tensor) -> Tensor:
    """Where the predicted class is the best within rounding (n,)."""
    gap = logits_nK.amax(dim=1) - logits_nK.gather(1, predicted_n[:, None]).squeeze(1)
    return gap <= ROUNDING * logits_nK.abs().amax()


# ---- attacked again


def _attacked_again(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    """A few images without a budget, then with it: together and in parts."""
    rows = _few_correct(case)
    evidence["changed_without_epsilon"], evidence["changed_in_parts"] = {}, {}
    for name, attack in _repeatable(case).items() if len(rows) else ():
        try:
            yield from _without_budget(case, name, attack, rows, evidence["changed_without_epsilon"])
            yield from _in_parts(case, name, attack, rows, evidence["changed_in_parts"])
        except Exception as error:  # anybody's model or attack, which may raise anything
            yield ("warn", f"{name} fails on a few images ({error_message(error)})")


def _repeatable(case: CheckContext) -> dict[str, AnyAttack]:
    """The user's own attacks, and one of ours with the steps of a probe."""
    own = {name: attack for name, attack in case.attacks.items() if isinstance(attack, Custom)}
    ours = [(name, attack) for name, attack in case.attacks.items() if isinstance(attack, Pgd | ApgdCe | ApgdT | Fgsm)]
    iterative = [(name, attack) for name, attack in ours if not isinstance(attack, Fgsm)] or ours
    return own | {name: _shortened(attack, case.probes.steps) for name, attack in iterative[:1]}


def _shortened(attack: AnyAttack, steps: int) -> AnyAttack:
    limits = {"steps": steps, "restarts": 1, "targets": 1}
    return attack.model_copy(
        update={key: min(most, getattr(attack, key)) for key, most in limits.items() if hasattr(attack, key)}
    )


def _without_budget(
    case: CheckContext, name: str, attack: AnyAttack, rows: Tensor, changed: dict[str, int]
) -> Iterator[Remark]:
    struck = _strike(case, name, attack, rows, case.terms.ball.resized(0.0))
    clean = case.measured.clean_logits[rows]
    decisions = inference.predict(case.target.model, struck.images, DECISION_BATCH).cpu().argmax(1)
    strays = int((struck.overshoot > OUTSIDE).sum())
    changed[name] = int(((decisions != clean.argmax(1)) & ~_ties(clean, decisions)).sum())
    if changed[name]:
        yield ("fail", f"at epsilon 0, {name} changes {changed[name]} of {len(rows)} clean decisions")
    if strays:
        yield ("fail", f"at epsilon 0, {name} still moves {strays} of {len(rows)} images: it has an epsilon of its own")


def _in_parts(
    case: CheckContext, name: str, attack: AnyAttack, rows: Tensor, changed: dict[str, int]
) -> Iterator[Remark]:
    ball = case.terms.ball
    together = _strike(case, name, attack, rows, ball).images
    sizes = list(PARTS) if len(rows) == sum(PARTS) else [1] * len(rows)
    parts = torch.cat([_strike(case, name, attack, part, ball).images for part in torch.split(rows, sizes)])
    first, second = (inference.predict(case.target.model, points, DECISION_BATCH).cpu() for points in (together, parts))
    differs = (first.argmax(1) != second.argmax(1)) & ~_ties(first, second.argmax(1))
    changed[name] = int(differs.sum())
    if changed[name]:
        # one may be rounding that grew along the steps
        yield (
            "fail" if changed[name] > len(rows) // 4 else "warn",
            f"{name} decides {changed[name]} of {len(rows)} images otherwise in batches of other sizes: what "
            "happens to an image depends on the batch",
        )


def _strike(case: CheckContext, name: str, attack: AnyAttack, rows: Tensor, ball: Ball) -> engine.AttackResult:
    """In float32, which rounds least: batches are to be compared, not precisions."""
    images, labels = case.target.images[rows], case.target.labels[rows]
    draws = ImageDraws(case.terms.seed, f"check-{CHECK}-{name}", rows)
    craft = registry.bind(attack, {})
    return engine.run_attack(case.target.model, images, labels, craft, ball=ball, draws=draws, precision="float32")


# ---- leak


def content_hashes(images_uint8_NCHW: Tensor) -> list[str]:
    """sha256 of every image's size and pixels."""
    assert images_uint8_NCHW.dtype == torch.uint8
    size = "x".join(map(str, images_uint8_NCHW.shape[1:])).encode()
    return [hashlib.sha256(size + b":" + image.tobytes()).hexdigest() for image in images_uint8_NCHW.cpu().numpy()]


def _leak(case: CheckContext, evidence: dict[str, Any]) -> Iterator[Remark]:
    evidence["leaked"] = None
    if case.training is None:
        return
    hashes = content_hashes((case.target.images * 255).round().to(torch.uint8))
    leaked, total = sum(one in case.training for one in hashes), len(hashes)
    evidence["leaked"] = leaked
    if leaked:
        few = leaked <= max(2, LEAKED * total)
        why = "duplicates within the data set, if it has no more" if few else "the test set is not held out"
        yield ("warn" if few else "fail", f"{leaked} of {total} test images also occur in the training data: {why}")
