"""Check 9, binarisation test: the attacks find adversarial examples that are planted in the model.

The binarisation test of Zimmermann et al. 2022, arXiv 2206.13991. For each image a binary read-out of the model's
penultimate features is fitted that separates one random point on the surface of the ball (a corner in L-inf) from the
image and random points of the inner ball. That point is an adversarial example by construction; attacks that find
neither it nor another one prove nothing about the model. As in the paper, the binary logits are scaled to a range of
about 1, so the test covers the layers below the last one; the scale of the logits is covered by the check `gradients`.

There are two differences from the paper. The hyperplane is the closed form of linear discriminant analysis instead of a
logistic regression. And the planted point is refined by random changes, kept where they increase its score, because a
small image has so few pixels that a second random point often scores as well as the first; no gradient is used.

Shapes: N images, B batch, S samples, P candidates to plant, C channel, H/W pixels, F features, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import NORM_ORDER, TINY, Ball, Norm
from advmoe.attacks.random_streams import BatchStream, ImageStreams
from advmoe.attacks.registry import AttackSettings
from advmoe.evaluation.checks.base import CheckContext, CheckResult
from advmoe.evaluation.checks.probe_attacks import (
    CheckOutput,
    CheckSkippedError,
    Issue,
    error_message,
    percent,
    run_check,
)
from advmoe.models import inference
from advmoe.runtime.machine import generator

CHECK_ID = "binarisation"
PASS_SHARE = 0.95  # share of planted examples that the attacks find, from which the check passes (as in the paper)
FAIL_SHARE = 0.8  # and below which it fails
MAX_RANDOM_SHARE = 0.5  # share found by random points above which the test is too easy
MIN_IMAGES = 10  # images; with fewer a share cannot be distinguished from 0.95
INNER_RADIUS = 0.95  # of epsilon: radius of the harmless points (eta in the paper)
CANDIDATES = 8  # random points per image; the best separated one is planted
RIDGE = 10.0  # of the mean variance along the samples' axes; with 0.1 the plane fits noise, and good attacks miss 10 %
BOUNDARY_POSITION = 0.9  # of the plane, between the outermost harmless point (0) and the planted one (1)
MOVE_STD = 0.6  # standard deviation of a random change, relative to the perturbation: flips 5 % of the signs


def binarisation(context: CheckContext) -> CheckResult:
    """Plants an adversarial example at each of the first images and runs the attacks of the evaluation on them."""
    return run_check(CHECK_ID, _check, context)


def _check(context: CheckContext) -> CheckOutput:
    attacks = {name: attack for name, attack in context.attacks.items() if _follows_gradients(attack)}
    if not attacks:
        raise CheckSkippedError("not checked", "no white-box attack was run")
    binary, rows = _plant_examples(
        context,
        _output_layers(context),
        _disjoint_balls(context.target.images[: context.settings.images], context.config.ball),
    )
    if len(rows) < MIN_IMAGES:
        raise CheckSkippedError("not checked", f"an adversarial example could be planted at only {len(rows)} images")
    found, failed = _run_attacks(context, binary, rows, attacks)
    if len(failed) == len(attacks):
        reason = next(iter(failed.values()))
        raise CheckSkippedError("not checked", f"the attacks failed on the binary model ({reason})")
    random = _random_search_share(context, binary, rows)
    count, total = int(found.sum()), len(rows)
    used = [name for name in attacks if name not in failed]
    evidence = {"planted": total, "found": count, "score": count / total, "random": random, "attacks": used}
    return *_status_and_sentence(count, total, random), evidence


def _follows_gradients(attack: AttackSettings) -> bool:
    entry = registry.REGISTRY[type(attack)]
    return entry.access in ("white", "own") and not entry.needs_gate


def _output_layers(context: CheckContext) -> list[nn.Linear]:
    """Returns the last layers: one in a plain network, one per expert in a mixture."""
    classes = context.result.clean_logits.shape[1]
    heads = [m for m in context.target.model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        reason = f"the model has no linear layer with {classes} outputs"
        raise CheckSkippedError("not checked", reason)
    return heads


def _status_and_sentence(count: int, total: int, random: float) -> Issue:
    found = f"{count} of {total} adversarial examples planted in this model (random points: {percent(random)})"
    if count < PASS_SHARE * total:
        reason = "gradients are masked or the attacks are too weak, so surviving images prove little"
        return "warn" if count >= FAIL_SHARE * total else "fail", f"the attacks found only {found}: {reason}"
    if random > MAX_RANDOM_SHARE:
        return "not checked", f"the attacks found {found}: random points find them too, so the test is too easy"
    return "pass", f"the attacks found {found}"


# ---- planting


@dataclass(frozen=True)
class LinearReadOuts:
    """Hyperplanes in feature space, one per image: weights (N, F), offsets (N,), planted points (N, C, H, W)."""

    weights: Tensor
    offsets: Tensor
    points: Tensor


class BinaryClassifier(nn.Module):
    """The model with its last layer replaced: pixels (B, C, H, W) -> logits (B, 2) of harmless and planted.

    Every image has its own read-out; a point belongs to the nearest image, which is unique as the balls are disjoint.
    """

    def __init__(
        self, model: nn.Module, heads: list[nn.Linear], images_NCHW: Tensor, planes: LinearReadOuts, norm: Norm
    ) -> None:
        super().__init__()
        self.reader, self.images, self.planes, self.norm = FeatureExtractor(model, heads), images_NCHW, planes, norm

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BF = self.reader(images_BCHW)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            own_B = distances(images_BCHW.detach(), self.images, self.norm).argmin(dim=1)
            score_B = (features_BF * self.planes.weights[own_B]).sum(dim=1) + self.planes.offsets[own_B]
        return torch.stack([-score_B, score_B], dim=1) / 2


class FeatureExtractor(nn.Module):
    """The model up to its last layers: pixels (B, C, H, W) -> their inputs, concatenated, (B, F) in float32."""

    def __init__(self, model: nn.Module, heads: list[nn.Linear]) -> None:
        super().__init__()
        self.model, self.heads = model, heads

    def forward(self, images_BCHW: Tensor) -> Tensor:
        with _captured_inputs(self.heads) as captured:
            self.model(images_BCHW)
        # a layer whose batch is not the images (pairs of them, for example) has no features of an image
        return torch.cat([inputs.flatten(1) for inputs in captured if len(inputs) == len(images_BCHW)], dim=1).float()


@contextmanager
def _captured_inputs(heads: list[nn.Linear]) -> Iterator[list[Tensor]]:
    captured: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.append(inputs[0])

    handles = [head.register_forward_pre_hook(capture) for head in heads]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def distances(points_BCHW: Tensor, images_NCHW: Tensor, norm: Norm) -> Tensor:
    """Returns the distance of every point to every image (B, N)."""
    apart: Tensor = torch.cdist(points_BCHW.flatten(1).float(), images_NCHW.flatten(1).float(), p=NORM_ORDER[norm])
    return apart


def _disjoint_balls(images_NCHW: Tensor, ball: Ball) -> Tensor:
    """Returns positions (n,) of images whose balls do not intersect."""
    apart = distances(images_NCHW, images_NCHW, ball.norm) > 2 * ball.epsilon
    kept: list[int] = []
    for row in range(len(images_NCHW)):
        if apart[row, kept].all():
            kept.append(row)
    return torch.tensor(kept)


def _plant_examples(context: CheckContext, heads: list[nn.Linear], rows: Tensor) -> tuple[BinaryClassifier, Tensor]:
    """Returns the binary model, and the positions (n,) at which it classifies image and planted point correctly."""
    model, images = context.target.model, context.target.images[rows]
    try:
        fitted = [_fit_read_out(context, heads, row) for row in rows]
    except Exception as error:  # a user's model may raise anything
        raise CheckSkippedError(
            "not checked", f"the input of the last layer cannot be captured ({error_message(error)})"
        ) from error
    planes = LinearReadOuts(*(torch.stack(part) for part in zip(*fitted, strict=True)))
    binary = BinaryClassifier(model, heads, images, planes, context.config.ball.norm)
    points, scores = _refine_planted(context, binary)
    binary.planes = LinearReadOuts(planes.weights, planes.offsets - BOUNDARY_POSITION * scores, points)
    harmless, planted = (_scores(binary, points) for points in (images, points))
    return binary, rows[((harmless < 0) & (planted > 0)).cpu()]


def _fit_read_out(context: CheckContext, heads: list[nn.Linear], row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights (F,), offset () and planted point (C, H, W) of one image."""
    image, ball = context.target.images[row][None], context.config.ball
    draws = BatchStream(generator(context.config.seed, "check", CHECK_ID, int(row)))
    inner = ball.resized(INNER_RADIUS * ball.epsilon).start(image.expand(context.settings.samples, -1, -1, -1), draws)
    outer = _random_surface_points(ball, image.expand(CANDIDATES, -1, -1, -1), draws)
    points = torch.cat([image, inner, outer])
    features = inference.predict(FeatureExtractor(context.target.model, heads), points, len(points)).double()
    weights, offset, best = fit_hyperplane(features[:-CANDIDATES], features[-CANDIDATES:])
    return weights.float(), offset.float(), outer[best]


def _random_surface_points(ball: Ball, images_BCHW: Tensor, draws: BatchStream) -> Tensor:
    """Returns random points on the surface of the ball: corners of the cube, or the sphere."""
    return ball.project(images_BCHW + ball.epsilon * ball.steepest(draws.normal(images_BCHW)), images_BCHW)


def fit_hyperplane(inner_SF: Tensor, outer_PF: Tensor) -> tuple[Tensor, Tensor, int]:
    """Fits the hyperplane through the outermost inner point that separates one of the outer points best.

    Returns weights (F,) = (covariance + ridge)^-1 (outer - mean), solved in the span of the samples, the offset (), and
    the index of the outer point; scores have a range of 1. No outer point scores above 0 if none can be separated.
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


def _refine_planted(context: CheckContext, binary: BinaryClassifier) -> tuple[Tensor, Tensor]:
    """Returns planted points (N, C, H, W) after `settings.steps` random changes, and their scores (N,)."""
    ball, images, points = context.config.ball, binary.images, binary.planes.points
    draws = BatchStream(generator(context.config.seed, "check", CHECK_ID, "move"))
    scores = _scores(binary, points)
    for _ in range(context.settings.steps):
        change = points - images
        noise = MOVE_STD * change.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * draws.normal(images)
        candidates = ball.project(images + ball.epsilon * ball.steepest(change + noise), images)
        new_scores = _scores(binary, candidates)
        better = new_scores > scores
        points, scores = (
            torch.where(better[:, None, None, None], candidates, points),
            torch.where(better, new_scores, scores),
        )
    return points, scores


def _scores(binary: BinaryClassifier, points_BCHW: Tensor) -> Tensor:
    """Returns the score (B,) of each point relative to the plane, in float32."""
    logits_B2 = inference.predict(binary, points_BCHW, len(points_BCHW))
    return logits_B2[:, 1] - logits_B2[:, 0]


# ---- attacking


def _run_attacks(
    context: CheckContext, binary: BinaryClassifier, rows: Tensor, attacks: dict[str, AttackSettings]
) -> tuple[Tensor, dict[str, str]]:
    """Returns where an attack finds an adversarial example (n,) bool, and the attacks that raised, with the reason."""
    found, failed = torch.zeros(len(rows), dtype=torch.bool), dict[str, str]()
    for name, attack in attacks.items():
        if found.all():
            break
        remaining = ~found
        try:
            found[remaining] = _run_one_attack(context, binary, rows[remaining], name, attack)
        except Exception as error:  # a user's model or attack may raise anything
            failed[name] = error_message(error)
    return found, failed


def _run_one_attack(
    context: CheckContext, binary: BinaryClassifier, rows: Tensor, name: str, attack: AttackSettings
) -> Tensor:
    images = context.target.images[rows]
    harmless = torch.zeros(len(rows), dtype=torch.int64, device=images.device)
    adversarial = engine.run_attack(
        binary,
        images,
        harmless,
        registry.bind(attack, {}),
        ball=context.config.ball,
        draws=ImageStreams(context.config.seed, f"check-{CHECK_ID}-{name}", rows),
        precision=context.config.precision,
    )
    return (_scores(binary, adversarial.images) > 0).cpu()


def _random_search_share(context: CheckContext, binary: BinaryClassifier, rows: Tensor) -> float:
    """Returns the share of images at which one of `settings.steps` random points of the surface is adversarial."""
    images, found = context.target.images[rows], torch.zeros(len(rows), dtype=torch.bool)
    draws = BatchStream(generator(context.config.seed, "check", CHECK_ID, "random"))
    for _ in range(context.settings.steps):
        guesses = _random_surface_points(context.config.ball, images, draws)
        found |= (_scores(binary, guesses) > 0).cpu()
    return float(found.float().mean())
