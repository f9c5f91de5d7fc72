"""The evaluation harness: runs every attack on every image and classifies the results.

Every returned image is projected into the ball and [0, 1] and classified again in float32 and eval mode, in padded
batches of one fixed size; an attack's own success flag is ignored. Random draws are seeded by the image's position, so
a decision depends neither on the batch size nor on which other images are attacked. Finished batches are saved, so that
a killed run can resume. With several processes, each attacks one batch at a time and all gather the results.

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
from advmoe.attacks.random_streams import ImageStreams
from advmoe.attacks.registry import AttackSettings
from advmoe.core import console
from advmoe.core.artifacts import hash_tensors
from advmoe.core.errors import UserError
from advmoe.core.user_code import file_digest
from advmoe.evaluation.batch_size import estimate_batch_size, map_batches
from advmoe.evaluation.batch_store import BatchStore, FinishedBatch
from advmoe.models import inference
from advmoe.models.inference import Precision
from advmoe.models.mixture import MixtureOfExperts
from advmoe.runtime import distributed
from advmoe.runtime.checkpoints.workdir import environment_fingerprint
from advmoe.statistics.decisions import CLEAN, WORST
from advmoe.statistics.intervals import Proportion

DECISION_BATCH = 120  # images per classifying forward pass; constant, because rounding depends on it
BALL_TOLERANCE = 1e-4  # in pixel units: more is not rounding; an 8-bit level is 4e-3


@dataclass(frozen=True)
class EvaluationTarget:
    """The model under evaluation in eval mode, images (N, C, H, W) and labels (N,), all on one device.

    `sources`: other networks for transfer attacks, by name. `identity`: a hash that identifies the model, together with
    its weights and class name, when a run resumes.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    sources: Mapping[str, nn.Module] = field(default_factory=dict)
    identity: str = ""

    @property
    def has_gate(self) -> bool:
        """Whether gate-aware attacks can be run on the model."""
        return isinstance(self.model, MixtureOfExperts)


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    `batch_size`: images per batch of an attack, None to fit the free memory. `drop_fallen`: skip images that an earlier
    attack fooled, so that each attack reports the accuracy after all attacks so far. `limits`: by attack name, the
    number of leading images it runs on.
    """

    ball: Ball
    seed: int
    precision: Precision
    batch_size: int | None
    drop_fallen: bool
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackOutcome:
    """Result of one attack on N images, on the CPU.

    `attacked` (N,) bool: the images that were attacked (correct when clean, not dropped). `correct` (N,) bool:
    correctly classified after the attack; False for dropped images. `images` (N, C, H, W): adversarial, or clean where
    not attacked; `predicted` (N,): their classes. `overshoot`: share of attacked images that the attack returned
    outside the ball or [0, 1]. `forward`, `backward`: passes, in images. `limit`: only the first `limit` images are
    attacked and counted.
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
    """Clean float32 logits (N, K), labels (N,), and the outcome of each attack, in order."""

    clean_logits: Tensor
    labels: Tensor
    outcomes: dict[str, AttackOutcome]

    @property
    def correct(self) -> dict[str, Tensor]:
        """Correct classification per image (N,) bool: `clean`, under each attack, and `worst`, under all of them."""
        clean = self.clean_logits.argmax(1) == self.labels
        correct = {CLEAN: clean, **{name: outcome.correct for name, outcome in self.outcomes.items()}}
        return {**correct, WORST: torch.stack(list(correct.values())).all(dim=0)}

    def correct_under(self, attacks: Sequence[str]) -> Tensor:
        """Per image (N,) bool: correctly classified when clean and under all of the given attacks."""
        correct = self.correct
        return torch.stack([correct[CLEAN], *(correct[name] for name in attacks)]).all(dim=0)

    def accuracies(self) -> dict[str, Proportion]:
        """Accuracies with intervals: clean, per attack and worst case, each over the images within its limit."""
        limits = {name: outcome.limit for name, outcome in self.outcomes.items()}
        return {name: Proportion.from_mask(correct[: limits.get(name)]) for name, correct in self.correct.items()}


def evaluate(
    target: EvaluationTarget, attacks: Mapping[str, AttackSettings], config: EvaluationConfig
) -> EvaluationResult:
    """Runs the attacks in order and returns the result.

    Raises UserError for a model that cannot be evaluated (NaN, not one logit per class), an attack that does not fit
    the model, an epsilon of 0, and when a user-defined attack raises.
    """
    if config.ball.epsilon == 0:
        raise UserError("epsilon must be greater than 0; clean accuracy is always reported")
    for name, attack in attacks.items():
        check_attack(name, attack, target)
    logits = inference.predict(target.model, target.images, DECISION_BATCH)
    check_logits(target, logits)
    remaining = logits.argmax(1) == target.labels
    outcomes: dict[str, AttackOutcome] = {}
    for name, attack in attacks.items():
        outcomes[name] = outcome = _run_attack(target, name, attack, config, remaining)
        if config.drop_fallen:
            remaining = remaining & outcome.correct.to(remaining.device)
    return EvaluationResult(logits.cpu(), target.labels.cpu(), outcomes)


def clear_resume_state(
    target: EvaluationTarget, attacks: Mapping[str, AttackSettings], config: EvaluationConfig
) -> None:
    """Deletes the saved batches of these attacks, on rank 0. Call it when the results are written."""
    if not distributed.is_rank0():
        return
    for name, attack in attacks.items():
        _store(target, name, attack, config).clear()


def check_attack(name: str, attack: AttackSettings, target: EvaluationTarget) -> None:
    """Raises UserError if the attack needs a gate or source networks that the target lacks."""
    if registry.REGISTRY[type(attack)].needs_gate and not target.has_gate:
        raise UserError(
            f"attack {name}: {target.name} has no gate; {attack.kind} attacks only mixtures of this project"
        )
    missing = [source for source in registry.transfer_sources(attack) if source not in target.sources]
    if missing:
        raise UserError(f"attack {name}: {target.name} has no source network '{missing[0]}' to transfer from")


def check_logits(target: EvaluationTarget, logits: Tensor) -> None:
    """Raises UserError if the clean logits are not finite, not (N, K), or have too few classes."""
    if logits.ndim != 2 or len(logits) != len(target.images):
        raise UserError(f"{target.name}: must map images to logits (B, K), but returned shape {tuple(logits.shape)}")
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(dim=1)).sum())
        raise UserError(f"{target.name}: NaN or infinite logits on {bad} of {len(logits)} clean images")
    if logits.shape[1] < 2 or int(target.labels.max()) >= logits.shape[1]:
        raise UserError(
            f"{target.name}: outputs {logits.shape[1]} classes, but labels go up to {int(target.labels.max())}"
        )


def _run_attack(
    target: EvaluationTarget, name: str, attack: AttackSettings, config: EvaluationConfig, remaining: Tensor
) -> AttackOutcome:
    """Runs one attack on the `remaining` images (N,) bool within its limit."""
    limit = min(config.limits.get(name, len(remaining)), len(remaining))
    attacked = remaining & (torch.arange(len(remaining), device=remaining.device) < limit)
    images = target.images.clone()
    outside = torch.zeros_like(remaining)
    forward, backward, seconds = 0, 0, 0.0
    for batch in _attacked_batches(target, name, attack, config, attacked, _store(target, name, attack, config)):
        rows = batch.rows.to(images.device)
        images[rows], outside[rows] = batch.images.to(images), batch.overshoot.to(outside)
        forward, backward, seconds = forward + batch.forward, backward + batch.backward, seconds + batch.seconds
    images = torch.where(attacked[:, None, None, None], images, target.images)
    predicted = inference.predict(target.model, images, DECISION_BATCH).argmax(1)
    return AttackOutcome(
        attacked=attacked.cpu(),
        correct=(remaining & (predicted == target.labels)).cpu(),
        predicted=predicted.cpu(),
        images=images.cpu(),
        overshoot=round(float(outside[attacked].float().mean()), 6) if attacked.any() else 0.0,
        forward=forward,
        backward=backward,
        seconds=round(seconds, 2),
        limit=limit,
    )


def _attacked_batches(
    target: EvaluationTarget,
    name: str,
    attack: AttackSettings,
    config: EvaluationConfig,
    wanted: Tensor,
    store: BatchStore,
) -> Iterator[FinishedBatch]:
    """Yields saved batches, then attacks and saves the rest of the `wanted` images (N,) bool."""
    distributed.require_same(target.name, store.work_dir.folder.name)
    done = torch.zeros_like(wanted)
    for batch in distributed.run_on_rank0(lambda: store.load(target.images, config.ball)):
        done[batch.rows.to(done.device)] = True
        yield batch
    rows = (wanted & ~done).nonzero().squeeze(1).cpu()
    if done.any():
        console.info(f"{target.name}: {name}: {int(done.sum())} images resumed from the interrupted run")
    if not len(rows):
        return
    size = choose_batch_size(target, config, len(rows))
    misclassified = 0
    with console.Progress(f"{target.name}: {name}", len(rows)) as progress:
        while len(rows):
            batches = _attack_next_batches(
                target, name, attack, config, torch.split(rows, size)[: distributed.world_size()]
            )
            size = max(len(batch.rows) for batch in batches)  # smaller after an out-of-memory error
            for batch in batches:
                if distributed.is_rank0():
                    store.add(batch)
                predicted = inference.predict(target.model, batch.images.to(target.images), DECISION_BATCH).argmax(1)
                misclassified += int((predicted != target.labels[batch.rows]).sum())
                progress.advance(len(batch.rows), f"{misclassified} misclassified")
                yield batch
            rows = rows[sum(len(batch.rows) for batch in batches) :]


def choose_batch_size(target: EvaluationTarget, config: EvaluationConfig, count: int) -> int:
    """Returns the batch size, the same on all ranks and at most `count` divided by the number of ranks, rounded up."""
    size = config.batch_size or -distributed.all_reduce_max(-estimate_batch_size(target.model, target.images))
    return min(size, -(-count // distributed.world_size()))


def _attack_next_batches(
    target: EvaluationTarget, name: str, attack: AttackSettings, config: EvaluationConfig, batches: Sequence[Tensor]
) -> list[FinishedBatch]:
    """Attacks the given batches, one per rank, and gathers the results on all ranks."""
    attack_batch = partial(_attack_batch, target, name, attack, config)
    own = [
        finished for batch in distributed.shard(batches) for _, finished in map_batches(attack_batch, batch, len(batch))
    ]
    return [finished for gathered in distributed.all_gather(own) for finished in gathered]


def _attack_batch(
    target: EvaluationTarget, name: str, attack: AttackSettings, config: EvaluationConfig, rows: Tensor
) -> FinishedBatch:
    started, passes = time.monotonic(), PassCount()
    images, labels = target.images[rows], target.labels[rows]
    precision: Precision = "float32" if registry.REGISTRY[type(attack)].full_precision else config.precision
    with bind_attack(target, attack, precision, passes) as attack_fn:
        adversarial = engine.run_attack(
            target.model,
            images,
            labels,
            attack_fn,
            ball=config.ball,
            draws=ImageStreams(config.seed, name, rows),
            precision=precision,
            passes=passes,
        )
    return FinishedBatch(
        rows,
        adversarial.images.cpu(),
        (adversarial.overshoot > BALL_TOLERANCE).cpu(),
        passes.forward,
        passes.backward,
        time.monotonic() - started,
    )


@contextmanager
def bind_attack(
    target: EvaluationTarget, attack: AttackSettings, precision: Precision, passes: PassCount | None = None
) -> Iterator[AttackFn]:
    """Yields the attack as a function, with its source networks in attack mode."""
    with ExitStack() as stack:
        sources = {
            name: stack.enter_context(engine.attack_mode(target.sources[name], precision, passes))
            for name in registry.transfer_sources(attack)
        }
        yield registry.bind(attack, sources)


def _store(target: EvaluationTarget, name: str, attack: AttackSettings, config: EvaluationConfig) -> BatchStore:
    sources = {
        source: hash_tensors(target.sources[source].state_dict()) for source in registry.transfer_sources(attack)
    }
    return BatchStore(
        {
            "model": [type(target.model).__qualname__, target.identity, hash_tensors(target.model.state_dict())],
            "images": hash_tensors({"images": target.images, "labels": target.labels}),
            "attack": [
                name,
                attack.model_dump(mode="json"),
                file_digest(attack.function) if isinstance(attack, Custom) else "",
            ],
            "ball": [config.ball.norm, config.ball.epsilon],
            "terms": [config.seed, config.precision],
            "circumstances": environment_fingerprint(),
            "sources": sources,
        }
    )
