"""The harness: every attack on every image, and nobody's word taken for a success.

Whatever an attack returns is projected into the ball and the box and classified again in float32 and eval mode, in
padded batches of one fixed size. Random draws are seeded by the image's position, so a decision depends neither on the
batch size nor on which other images are left. Finished batches are kept on disk: a killed run goes on where it was.
Several processes attack a batch each at a time, and all know what was found.

Shapes: N images, b images of one batch, C channel, H/W pixels, K classes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from advmoe.attacks import engine, registry
from advmoe.attacks.ball import Ball
from advmoe.attacks.custom import Custom
from advmoe.attacks.engine import PassCount
from advmoe.attacks.interface import AttackFn
from advmoe.attacks.random_streams import ImageDraws
from advmoe.attacks.registry import AnyAttack
from advmoe.core import console
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import UserError
from advmoe.core.user_code import digest
from advmoe.evaluation.batch_size import fitting_batch, in_batches
from advmoe.evaluation.batch_store import BatchStore, FinishedBatch
from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.workdir import environment_fingerprint
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Share

DECISION_BATCH = 120  # images of every deciding forward pass; a constant, because kernels round by batch size
OUTSIDE = 1e-4  # of the pixel range: further outside the ball than this is no rounding; an 8-bit level is 4e-3


@dataclass(frozen=True)
class EvaluationTarget:
    """What is attacked: a model in eval mode and its images (N, C, H, W) and labels (N,), all on one device.

    `sources`: other networks for transfer attacks, by name. `identity`: what besides weights and class name tells this
    model from others (a file's hash), for the resuming of killed runs.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    sources: Mapping[str, nn.Module] = field(default_factory=dict)
    identity: str = ""

    @property
    def has_gate(self) -> bool:
        """Whether gate-aware attacks find what they attack."""
        return isinstance(self.model, MixtureOfExperts)


@dataclass(frozen=True)
class EvaluationConfig:
    """The terms an evaluation is made on.

    `batch_size`: images an attack takes at once, None for what fits the memory. `drop_fallen`: images that fell to an
    earlier attack are spared the later ones, which then report what is left after them. `limits`: attacks, by name,
    that meet only the first so many images.
    """

    ball: Ball
    seed: int
    precision: Precision
    batch_size: int | None
    drop_fallen: bool
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One attack on N images, on the CPU.

    `attacked`: who met it (right when clean, not dropped). `correct`: who is right after it; an image that was dropped
    is not. `predicted`: classes on `images` (N, C, H, W), which are the clean ones where nothing was attacked.
    `overshoot`: share of the attacked images for which the attack itself left the ball or the box. `limit`: only so
    many images were to meet it, the rest count neither for nor against it.
    """

    attacked: Tensor
    correct: Tensor
    predicted: Tensor
    images: Tensor
    overshoot: float
    forward: int
    backward: int
    seconds: float
    limit: int


@dataclass(frozen=True)
class EvaluationResult:
    """What a model did: float32 logits (N, K) on the clean images, labels, and the outcome of each attack in order."""

    clean_logits: Tensor
    labels: Tensor
    outcomes: dict[str, Outcome]

    @property
    def correct(self) -> dict[str, Tensor]:
        """Per image (N,) bool: `clean`, each attack, and `worst`, the worst case over all of them."""
        clean = self.clean_logits.argmax(1) == self.labels
        each = {CLEAN: clean, **{name: outcome.correct for name, outcome in self.outcomes.items()}}
        return {**each, WORST: torch.stack(list(each.values())).all(dim=0)}

    def over(self, attacks: Sequence[str]) -> Tensor:
        """Per image (N,) bool: right when clean and under all of these attacks."""
        correct = self.correct
        return torch.stack([correct[CLEAN], *(correct[name] for name in attacks)]).all(dim=0)

    def shares(self) -> dict[str, Share]:
        """Accuracies with intervals, each over the images that were to meet the attack."""
        limits = {name: outcome.limit for name, outcome in self.outcomes.items()}
        return {name: Share.of(correct[: limits.get(name)]) for name, correct in self.correct.items()}


def evaluate(target: EvaluationTarget, attacks: Mapping[str, AnyAttack], terms: EvaluationConfig) -> EvaluationResult:
    """Run the attacks in order.

    Raises UserError for a model that cannot be evaluated (NaN, not one logit per class), an attack that does not fit
    it, an epsilon of 0, and when an attack of the user's own raises.
    """
    if terms.ball.epsilon == 0:
        raise UserError("epsilon 0 leaves an attack nothing to change; clean accuracy is reported beside every attack")
    for name, attack in attacks.items():
        check_fit(name, attack, target)
    logits = inference.predict(target.model, target.images, DECISION_BATCH)
    check_logits(target, logits)
    standing = logits.argmax(1) == target.labels
    outcomes: dict[str, Outcome] = {}
    for name, attack in attacks.items():
        outcomes[name] = outcome = _meet(target, name, attack, terms, standing)
        if terms.drop_fallen:
            standing = standing & outcome.correct.to(standing.device)
    return EvaluationResult(logits.cpu(), target.labels.cpu(), outcomes)


def clear_resume_state(target: EvaluationTarget, attacks: Mapping[str, AnyAttack], terms: EvaluationConfig) -> None:
    """Drop what was kept for resuming: the results are on record. Of several processes the first does it."""
    if not distributed.is_rank0():
        return
    for name, attack in attacks.items():
        _store(target, name, attack, terms).clear()


def check_fit(name: str, attack: AnyAttack, target: EvaluationTarget) -> None:
    """Raises UserError when the attack needs what the target has not."""
    if registry.ENTRIES[type(attack)].needs_gate and not target.has_gate:
        raise UserError(
            f"attack {name}: {target.name} has no gate; {attack.kind} attacks mixtures of this project only"
        )
    missing = [source for source in registry.sources_of(attack) if source not in target.sources]
    if missing:
        raise UserError(f"attack {name}: {target.name} comes without a network '{missing[0]}' to transfer from")


def check_logits(target: EvaluationTarget, logits: Tensor) -> None:
    """Raises UserError for what is no classifier's output."""
    if logits.ndim != 2 or len(logits) != len(target.images):
        raise UserError(f"{target.name}: must map images to logits (B, K), but gave shape {tuple(logits.shape)}")
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(dim=1)).sum())
        raise UserError(f"{target.name}: NaN or infinite logits on {bad} of {len(logits)} clean images")
    if logits.shape[1] < 2 or int(target.labels.max()) >= logits.shape[1]:
        raise UserError(
            f"{target.name}: outputs {logits.shape[1]} classes, but labels go up to {int(target.labels.max())}"
        )


def _meet(target: EvaluationTarget, name: str, attack: AnyAttack, terms: EvaluationConfig, standing: Tensor) -> Outcome:
    """One attack on the images still standing."""
    limit = min(terms.limits.get(name, len(standing)), len(standing))
    met = standing & (torch.arange(len(standing), device=standing.device) < limit)
    images = target.images.clone()
    outside = torch.zeros_like(standing)
    forward, backward, seconds = 0, 0, 0.0
    for part in _parts(target, name, attack, terms, met, _store(target, name, attack, terms)):
        rows = part.rows.to(images.device)
        images[rows], outside[rows] = part.images.to(images), part.overshoot.to(outside)
        forward, backward, seconds = forward + part.forward, backward + part.backward, seconds + part.seconds
    images = torch.where(met[:, None, None, None], images, target.images)
    predicted = inference.predict(target.model, images, DECISION_BATCH).argmax(1)
    return Outcome(
        attacked=met.cpu(),
        correct=(standing & (predicted == target.labels)).cpu(),
        predicted=predicted.cpu(),
        images=images.cpu(),
        overshoot=round(float(outside[met].float().mean()), 6) if met.any() else 0.0,
        forward=forward,
        backward=backward,
        seconds=round(seconds, 2),
        limit=limit,
    )


def _parts(
    target: EvaluationTarget, name: str, attack: AnyAttack, terms: EvaluationConfig, wanted: Tensor, store: BatchStore
) -> Iterator[FinishedBatch]:
    """What was finished before, then the rest of the `wanted` (N,), kept as it comes."""
    distributed.require_same(target.name, store.place.folder.name)
    done = torch.zeros_like(wanted)
    for part in distributed.run_on_rank0(lambda: store.parts(target.images, terms.ball)):
        done[part.rows.to(done.device)] = True
        yield part
    rows = (wanted & ~done).nonzero().squeeze(1).cpu()
    if done.any():
        console.say(f"{target.name}: {name}: {int(done.sum())} images taken over from the run that was stopped")
    if not len(rows):
        return
    size = batch_size(target, terms, len(rows))
    fallen = 0
    with console.Progress(f"{target.name}: {name}", len(rows)) as progress:
        while len(rows):
            parts = _next_parts(target, name, attack, terms, torch.split(rows, size)[: distributed.world_size()])
            size = max(len(part.rows) for part in parts)  # smaller, where memory ran out
            for part in parts:
                if distributed.is_rank0():
                    store.add(part)
                changed = inference.predict(target.model, part.images.to(target.images), DECISION_BATCH).argmax(1)
                fallen += int((changed != target.labels[part.rows]).sum())
                progress.advance(len(part.rows), f"{fallen} fallen")
                yield part
            rows = rows[sum(len(part.rows) for part in parts) :]


def batch_size(target: EvaluationTarget, terms: EvaluationConfig, count: int) -> int:
    """Of a batch; the same for all processes, and small enough that each has its share of `count` images."""
    size = terms.batch_size or -distributed.all_reduce_max(-fitting_batch(target.model, target.images))
    return min(size, -(-count // distributed.world_size()))


def _next_parts(
    target: EvaluationTarget, name: str, attack: AnyAttack, terms: EvaluationConfig, batches: Sequence[Tensor]
) -> list[FinishedBatch]:
    """These batches attacked, one by each process."""
    attacked = partial(_batch, target, name, attack, terms)
    own = [part for batch in distributed.shard(batches) for _, part in in_batches(attacked, batch, len(batch))]
    return [part for parts in distributed.all_gather(own) for part in parts]


def _batch(
    target: EvaluationTarget, name: str, attack: AnyAttack, terms: EvaluationConfig, rows: Tensor
) -> FinishedBatch:
    started, passes = time.monotonic(), PassCount()
    images, labels = target.images[rows], target.labels[rows]
    precision: Precision = "float32" if registry.ENTRIES[type(attack)].full_precision else terms.precision
    with bound(target, attack, precision, passes) as craft:
        struck = engine.run_attack(
            target.model,
            images,
            labels,
            craft,
            ball=terms.ball,
            draws=ImageDraws(terms.seed, name, rows),
            precision=precision,
            passes=passes,
        )
    return FinishedBatch(
        rows,
        struck.images.cpu(),
        (struck.overshoot > OUTSIDE).cpu(),
        passes.forward,
        passes.backward,
        time.monotonic() - started,
    )


@contextmanager
def bound(
    target: EvaluationTarget, attack: AnyAttack, precision: Precision, passes: PassCount | None = None
) -> Iterator[AttackFn]:
    """The attack as a function, its networks to transfer from made ready."""
    with ExitStack() as stack:
        sources = {
            name: stack.enter_context(engine.attack_mode(target.sources[name], precision, passes))
            for name in registry.sources_of(attack)
        }
        yield registry.bind(attack, sources)


def _store(target: EvaluationTarget, name: str, attack: AnyAttack, terms: EvaluationConfig) -> BatchStore:
    sources = {source: hash_tensors(target.sources[source].state_dict()) for source in registry.sources_of(attack)}
    return BatchStore(
        {
            "model": [type(target.model).__qualname__, target.identity, hash_tensors(target.model.state_dict())],
            "images": hash_tensors({"images": target.images, "labels": target.labels}),
            "attack": [
                name,
                attack.model_dump(mode="json"),
                digest(attack.function) if isinstance(attack, Custom) else "",
            ],
            "ball": [terms.ball.norm, terms.ball.epsilon],
            "terms": [terms.seed, terms.precision],
            "circumstances": environment_fingerprint(),
            "sources": sources,
        }
    )
