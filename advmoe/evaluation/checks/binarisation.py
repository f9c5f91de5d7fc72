"""Check 9: would these attacks find adversarial examples on *this* model if there were any?

The binarisation test (Zimmermann et al. 2022, arXiv 2206.13991). For each image a binary read-out of the model's own
penultimate features is fitted: one random point on the surface of the ball, a corner in L-inf, against the image and
random points of the inner ball. That point is an adversarial example, known to be there; attacks that do not find it or
another one say nothing about the model. As the authors do, the binary logits are scaled to a range of about 1, so the
test speaks of what lies below the last layer; logits that are out of range are another check's business.

Two things are ours. The plane is the closed form of linear discriminant analysis instead of a logistic regression. And
the planted point is moved on by some random changes, kept where they lead further from the harmless points, because a
small image has so few pixels that a second random point often does as well as the first; no gradient is asked.

Shapes: N images, B batch, S samples, P candidates to plant, C channel, H/W pixels, F features, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import ORDER, TINY, Ball, Norm
from advmoe.attacks.random_streams import BatchDraws, ImageDraws
from advmoe.attacks.registry import AnyAttack
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import Answer, CheckSkippedError, Remark, error_message, percent, run_check
from advmoe.models import inference
from advmoe.runtime.machine import generator

CHECK = "binarisation"
GOOD, POOR = 0.95, 0.8  # share found that passes (the authors' bar), and below which it is a failure
EASY = 0.5  # share found by random points above which finding them proves nothing
FEWEST = 10  # images; a share of fewer cannot be told from 0.95
INNER = 0.95  # of epsilon: how far out the harmless points lie (the authors' eta)
CANDIDATES = 8  # points tried for planting; the one that stands out most is taken
RIDGE = 10.0  # of the mean variance along the samples' axes; with 0.1 the plane fits noise, and good attacks miss 10 %
CLOSENESS = 0.9  # where the plane cuts, between the outermost harmless point (0) and the planted one (1)
KICK = 0.6  # standard deviation of a random change, in units of the planted one's: turns 5 % of the signs


def binarisation(case: CheckContext) -> CheckResult:
    """Plants an adversarial example at each of the first images and lets the case's own attacks look for it."""
    return run_check(CHECK, _answer, case)


def _answer(case: CheckContext) -> Answer:
    suite = {name: attack for name, attack in case.attacks.items() if _searches(attack)}
    if not suite:
        raise CheckSkippedError("not checked", "no white-box attack was run, so there is no gradient search to test")
    binary, rows = _plant(case, _heads(case), _apart(case.target.images[: case.probes.images], case.terms.ball))
    if len(rows) < FEWEST:
        raise CheckSkippedError("not checked", f"an adversarial example could be planted at {len(rows)} images only")
    found, refused = _attack(case, binary, rows, suite)
    if len(refused) == len(suite):
        why = next(iter(refused.values()))
        raise CheckSkippedError("not checked", f"the attacks did not run on the planted problem ({why})")
    random = _random_score(case, binary, rows)
    hits, total = int(found.sum()), len(rows)
    used = [name for name in suite if name not in refused]
    evidence = {"planted": total, "found": hits, "score": hits / total, "random": random, "attacks": used}
    return *_judge(hits, total, random), evidence


def _searches(attack: AnyAttack) -> bool:
    entry = registry.ENTRIES[type(attack)]
    return entry.access in ("white", "own") and not entry.needs_gate


def _heads(case: CheckContext) -> list[nn.Linear]:
    """The last layers: one in a plain network, one for each expert in a mixture."""
    classes = case.measured.clean_logits.shape[1]
    heads = [m for m in case.target.model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        reason = f"the model has no linear layer with {classes} outputs whose input could be read"
        raise CheckSkippedError("not checked", reason)
    return heads


def _judge(hits: int, total: int, random: float) -> Remark:
    beside = f"{hits} of {total} adversarial examples planted in this model (random points: {percent(random)})"
    if hits < GOOD * total:
        why = "its gradients do not lead there, or the attacks are too weak, so images that survive prove little"
        return "warn" if hits >= POOR * total else "fail", f"the attacks found only {beside}: {why}"
    if random > EASY:
        return "not checked", f"the attacks found {beside}: what random points find too is no test"
    return "pass", f"the attacks found {beside}"


# ---- planting


@dataclass(frozen=True)
class ReadOut:
    """A plane in feature space for each image, (N, F) and (N,): above 0 lies the planted point (N, C, H, W)."""

    weights: Tensor
    offsets: Tensor
    points: Tensor


class Binary(nn.Module):
    """The model with its last layer exchanged: pixels (B, C, H, W) -> logits (B, 2) of harmless and planted.

    Every image has a read-out of its own; a point belongs to the nearest image, which no point of its ball can mistake.
    """

    def __init__(
        self, model: nn.Module, heads: list[nn.Linear], images_NCHW: Tensor, planes: ReadOut, norm: Norm
    ) -> None:
        super().__init__()
        self.reader, self.images, self.planes, self.norm = Reader(model, heads), images_NCHW, planes, norm

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BF = self.reader(images_BCHW)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            own_B = distances(images_BCHW.detach(), self.images, self.norm).argmin(dim=1)
            score_B = (features_BF * self.planes.weights[own_B]).sum(dim=1) + self.planes.offsets[own_B]
        return torch.stack([-score_B, score_B], dim=1) / 2


class Reader(nn.Module):
    """The model up to its last layers: pixels (B, C, H, W) -> what those read, side by side, (B, F) in float32."""

    def __init__(self, model: nn.Module, heads: list[nn.Linear]) -> None:
        super().__init__()
        self.model, self.heads = model, heads

    def forward(self, images_BCHW: Tensor) -> Tensor:
        with _overheard(self.heads) as heard:
            self.model(images_BCHW)
        # a layer that is called on something else than the images, pairs of them say, has no features of an image
        return torch.cat([inputs.flatten(1) for inputs in heard if len(inputs) == len(images_BCHW)], dim=1).float()


@contextmanager
def _overheard(heads: list[nn.Linear]) -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []

    def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])

    handles = [head.register_forward_pre_hook(listen) for head in heads]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def distances(points_BCHW: Tensor, images_NCHW: Tensor, norm: Norm) -> Tensor:
    """Between every point and every image (B, N)."""
    apart: Tensor = torch.cdist(points_BCHW.flatten(1).float(), images_NCHW.flatten(1).float(), p=ORDER[norm])
    return apart


def _apart(images_NCHW: Tensor, ball: Ball) -> Tensor:
    """The images (n,) whose balls do not touch, so that a point tells whose it is."""
    apart = distances(images_NCHW, images_NCHW, ball.norm) > 2 * ball.epsilon
    kept: list[int] = []
    for row in range(len(images_NCHW)):
        if apart[row, kept].all():
            kept.append(row)
    return torch.tensor(kept)


def _plant(case: CheckContext, heads: list[nn.Linear], rows: Tensor) -> tuple[Binary, Tensor]:
    """The binary model of the images, and those (n,) at which the planted point holds in the deciding forward pass."""
    model, images = case.target.model, case.target.images[rows]
    try:
        fitted = [_fit(case, heads, row) for row in rows]
    except Exception as error:  # anybody's model, which may raise anything
        raise CheckSkippedError(
            "not checked", f"what the last layer reads cannot be read ({error_message(error)})"
        ) from error
    planes = ReadOut(*(torch.stack(part) for part in zip(*fitted, strict=True)))
    binary = Binary(model, heads, images, planes, case.terms.ball.norm)
    points, scores = _move_on(case, binary)
    binary.planes = ReadOut(planes.weights, planes.offsets - CLOSENESS * scores, points)
    harmless, planted = (_scores(binary, points) for points in (images, points))
    return binary, rows[((harmless < 0) & (planted > 0)).cpu()]


def _fit(case: CheckContext, heads: list[nn.Linear], row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (F,), offset () and planted point (C, H, W) of one image."""
    image, ball = case.target.images[row][None], case.terms.ball
    draws = BatchDraws(generator(case.terms.seed, "check", CHECK, int(row)))
    inner = ball.resized(INNER * ball.epsilon).start(image.expand(case.probes.samples, -1, -1, -1), draws)
    outer = _surface(ball, image.expand(CANDIDATES, -1, -1, -1), draws)
    points = torch.cat([image, inner, outer])
    read = inference.predict(Reader(case.target.model, heads), points, len(points)).double()
    weights, offset, best = separate(read[:-CANDIDATES], read[-CANDIDATES:])
    return weights.float(), offset.float(), outer[best]


def _surface(ball: Ball, images_BCHW: Tensor, draws: BatchDraws) -> Tensor:
    """Random points as far away as the ball allows: corners of the cube, or the sphere."""
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(draws.normal(images_BCHW)), images_BCHW)


def separate(inner_SF: Tensor, outer_PF: Tensor) -> tuple[Tensor, Tensor, int]:
    """The plane through the outermost inner point that leaves one of the outer points furthest outside; which one.

    Weights (F,) = (covariance + ridge)^-1 (outer - mean), solved among the samples, and offset (), with scores in a
    range of 1. Where no outer point can be cut off, none has a score above 0.
    """
    mean_F = inner_SF.mean(dim=0)
    centred_SF, towards_PF = inner_SF - mean_F, outer_PF - mean_F
    gram_SS = centred_SF @ centred_SF.T
    ridge = RIDGE * gram_SS.trace() / min(centred_SF.shape) + TINY
    explained_SP = torch.linalg.solve(gram_SS + ridge * torch.eye(len(gram_SS)).to(gram_SS), centred_SF @ towards_PF.T)
    weights_PF = towards_PF - (centred_SF.T @ explained_SP).T
    harmless_PS, planted_P = weights_PF @ centred_SF.T, (weights_PF * towards_PF).sum(dim=1)
    range_P = (planted_P - harmless_PS.amin(dim=1)).clamp_min(TINY)
    outermost_P = harmless_PS.amax(dim=1) / range_P
    best = int((planted_P / range_P - outermost_P).argmax())
    weights_F = weights_PF[best] / range_P[best]
    return weights_F, -outermost_P[best] - weights_F @ mean_F, best


def _move_on(case: CheckContext, binary: Binary) -> tuple[Tensor, Tensor]:
    """The planted points (N, C, H, W) after as many random changes as a probe has steps, and their scores (N,)."""
    ball, images, points = case.terms.ball, binary.images, binary.planes.points
    draws = BatchDraws(generator(case.terms.seed, "check", CHECK, "move"))
    scores = _scores(binary, points)
    for _ in range(case.probes.steps):
        change = points - images
        kick = KICK * change.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * draws.normal(images)
        moved = ball.project(images + ball.epsilon * ball.steepest(change + kick), images)
        reached = _scores(binary, moved)
        better = reached > scores
        points, scores = torch.where(better[:, None, None, None], moved, points), torch.where(better, reached, scores)
    return points, scores


def _scores(binary: Binary, points_BCHW: Tensor) -> Tensor:
    """How far (B,) beyond the plane, in float32."""
    logits_B2 = inference.predict(binary, points_BCHW, len(points_BCHW))
    return logits_B2[:, 1] - logits_B2[:, 0]


# ---- searching


def _attack(
    case: CheckContext, binary: Binary, rows: Tensor, suite: dict[str, AnyAttack]
) -> tuple[Tensor, dict[str, str]]:
    """Whose planted problem some attack solves (n,), and which attacks did not run, with the reason."""
    found, refused = torch.zeros(len(rows), dtype=torch.bool), dict[str, str]()
    for name, attack in suite.items():
        if found.all():
            break
        left = ~found
        try:
            found[left] = _strike(case, binary, rows[left], name, attack)
        except Exception as error:  # anybody's model or attack, which may raise anything
            refused[name] = error_message(error)
    return found, refused


def _strike(case: CheckContext, binary: Binary, rows: Tensor, name: str, attack: AnyAttack) -> Tensor:
    images = case.target.images[rows]
    harmless = torch.zeros(len(rows), dtype=torch.int64, device=images.device)
    struck = engine.run_attack(
        binary,
        images,
        harmless,
        registry.bind(attack, {}),
        ball=case.terms.ball,
        draws=ImageDraws(case.terms.seed, f"check-{CHECK}-{name}", rows),
        precision=case.terms.precision,
    )
    return (_scores(binary, struck.images) > 0).cpu()


def _random_score(case: CheckContext, binary: Binary, rows: Tensor) -> float:
    """Share of images at which one of as many random points of the surface as a probe has steps would do."""
    images, found = case.target.images[rows], torch.zeros(len(rows), dtype=torch.bool)
    draws = BatchDraws(generator(case.terms.seed, "check", CHECK, "random"))
    for _ in range(case.probes.steps):
        guesses = _surface(case.terms.ball, images, draws)
        found |= (_scores(binary, guesses) > 0).cpu()
    return float(found.float().mean())
