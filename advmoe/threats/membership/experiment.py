"""The membership audit: how well each network's training images are recognised from its outputs.

Members are training images; non-members come from the attacker's pool and the test split. Shadow models are trained
with the pipeline's recipes on random halves of all three splits, so that every image is a member of half of them.

Shapes: N audited images, C channel, H/W pixels, K classes, S shadow models, U images that shadows are trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import pgd
from advmoe.core import console, paths
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split, image_digests
from advmoe.models import classifiers, inference
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.checkpoints.workdir import open_workdir
from advmoe.runtime.machine import derive_seed, device, generator
from advmoe.runtime.parallel import parallel_map
from advmoe.threats.experiment import OutputPaths, load_or_compute, print_outputs
from advmoe.threats.membership import report
from advmoe.threats.membership.attacks import calibrated_scores, confidence_scores, lira_scores, loss_scores
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.metrics import Scores, auc_difference, balanced_subsets, evaluate_scores
from advmoe.threats.membership.report import Row
from advmoe.threats.victim_training import VictimRecipes, VictimSpec, train_victims
from advmoe.training.job_key import model_fingerprint

BATCH_SIZE = 200  # images of a forward pass
CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclass(frozen=True)
class MembershipExperiment:
    """All inputs of the audit."""

    section: MembershipSection
    recipes: VictimRecipes


@dataclass(frozen=True)
class Audit:
    """The audited images: `split`, whether each is a member (N,), and its position (N,) in `universe`, the images that
    shadow models are trained on.
    """

    split: Split
    is_member: Tensor
    position: Tensor
    universe: Split


def run_experiment(experiment: MembershipExperiment, outputs: OutputPaths) -> None:
    """Runs the audit, writes its results and prints them; continues from the checkpoints of an interrupted run.

    Raises UserError for victims that cannot be audited.
    """
    facts = (experiment.section, experiment.recipes, dataset.load(paths.DATASET).sha256)
    with open_workdir("membership", *facts) as checkpoint_dir:
        _run_and_write(replace(experiment, recipes=replace(experiment.recipes, checkpoint_dir=checkpoint_dir)), outputs)


def _run_and_write(experiment: MembershipExperiment, outputs: OutputPaths) -> None:
    rows, audit = run(experiment)
    members = int(audit.is_member.sum())
    about = {"epsilon": experiment.recipes.epsilon, "members": members, "others": len(audit.split) - members}
    report.write(rows, about, outputs.metrics, outputs.runs)
    report.show(rows, about)
    print_outputs(outputs)


def run(experiment: MembershipExperiment) -> tuple[list[Row], Audit]:
    """Runs the audit; returns one row per victim, score and kind of query, and the audited images."""
    audit = draw_audit(dataset.load(paths.DATASET), experiment.recipes.seed)
    victims = list(experiment.section.victims)
    log_probs_of = dict(zip(victims, parallel_map(partial(_victim_log_probs, experiment, audit), victims), strict=True))
    scores = {victim: _membership_scores(experiment, audit, victim, log_probs_of[victim]) for victim in victims}
    against, seed, rows = experiment.section.against, experiment.recipes.seed, []
    for victim, by_test in scores.items():
        for test, victim_scores in by_test.items():
            other = None if victim == against else scores[against].get(test)
            difference = None if other is None else auc_difference(victim_scores, other, seed)
            result = evaluate_scores(victim_scores, seed)
            rows.append(Row(victim, *test, experiment.section.victims[victim], result, difference))
    return rows, audit


def draw_audit(data: Dataset, seed: int) -> Audit:
    """Draws the audited images: in each class as many members as non-members.

    Raises UserError when there are none.
    """
    train, others = data["train"], _concatenate(data["pool"], data["test"])
    known = set(image_digests(train.images))  # a duplicate of a training image is a member, whatever its split
    others = _select_rows(
        others, torch.tensor([digest not in known for digest in image_digests(others.images)], dtype=torch.bool)
    )
    inside, outside = balanced_subsets(train.labels, others.labels, generator(seed, "membership", "audit"))
    universe = _concatenate(train, others)
    position = torch.cat([inside, outside + len(train)])
    is_member = torch.arange(len(position)) < len(inside)
    return Audit(_select_rows(universe, position), is_member, position, universe)


def _concatenate(first: Split, second: Split) -> Split:
    pairs = zip((first.images, first.labels, first.index), (second.images, second.labels, second.index), strict=True)
    return Split(*(torch.cat(pair) for pair in pairs))


def _select_rows(split: Split, rows: Tensor) -> Split:
    return Split(split.images[rows], split.labels[rows], split.index[rows])


LogProbs = Mapping[str, Tensor]  # log-probabilities (N, K) by kind of query


def _victim_log_probs(experiment: MembershipExperiment, audit: Audit, victim: str) -> LogProbs:
    """Returns a victim's log-probabilities, see `cached_log_probs`."""
    return cached_log_probs(classifiers.load(paths.model(victim)).model, experiment, audit)


def cached_log_probs(model: nn.Module, experiment: MembershipExperiment, audit: Audit) -> LogProbs:
    """Loads or computes a network's log-probabilities on the audited images, clean and attacked on this network."""
    return load_or_compute(
        experiment.recipes.checkpoint_dir,
        "log-probs",
        (model_fingerprint(model),),
        lambda: Checkpoint(_compute_log_probs(model.to(device()), experiment, audit), {}),
        # in this order, which differs from that in the file
        lambda checkpoint: {kind: checkpoint.tensors[kind] for kind in (CLEAN, ADVERSARIAL)},
    )


def _compute_log_probs(model: nn.Module, experiment: MembershipExperiment, audit: Audit) -> LogProbs:
    pixels, labels = audit.split.pixels().to(device()), audit.split.labels.to(device())
    adversarial = engine.attack_without_early_stop(
        model,
        pixels,
        labels,
        partial(pgd, settings=experiment.section.attack),
        ball=LInf(experiment.recipes.epsilon),
        seed=derive_seed(experiment.recipes.seed, "membership"),
        purpose=experiment.section.attack.kind,
        precision=experiment.recipes.pretrain.precision,
        batch_size=BATCH_SIZE,
    )
    return {CLEAN: log_probs(model, pixels), ADVERSARIAL: log_probs(model, adversarial)}


def log_probs(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """Returns a network's log-probabilities (N, K) in double precision on the CPU."""
    return functional.log_softmax(inference.predict(model, pixels_NCHW, BATCH_SIZE).double(), dim=1).cpu()


def _membership_scores(
    experiment: MembershipExperiment, audit: Audit, victim: str, log_probs_of: LogProbs
) -> dict[tuple[str, str], Scores]:
    """Returns membership scores of the audited images by (score, kind of query)."""
    labels = audit.split.labels
    scores = {("loss", kind): loss_scores(log_probs_NK, labels) for kind, log_probs_NK in log_probs_of.items()}
    if experiment.section.victims[victim]:
        is_training_SU, shadows = train_shadows(experiment, audit, victim)
        is_training_SN = is_training_SU[:, audit.position]
        shadow_log_probs = parallel_map(partial(cached_log_probs, experiment=experiment, audit=audit), shadows)
        for kind, log_probs_NK in log_probs_of.items():
            victim_N = confidence_scores(log_probs_NK, labels)
            shadow_SN = torch.stack([confidence_scores(shadow[kind], labels) for shadow in shadow_log_probs])
            in_SN, out_SN = (shadow_SN.where(mask_SN, torch.nan) for mask_SN in (is_training_SN, ~is_training_SN))
            scores["calibrated", kind] = calibrated_scores(victim_N, out_SN)
            scores["LiRA", kind] = lira_scores(victim_N, in_SN, out_SN)
    return {test: Scores(values_N[audit.is_member], values_N[~audit.is_member]) for test, values_N in scores.items()}


def train_shadows(experiment: MembershipExperiment, audit: Audit, victim: str) -> tuple[Tensor, Sequence[nn.Module]]:
    """Trains shadow models with the victim's recipe on random halves of the universe.

    Returns which images each shadow was trained on (S, U), and the shadow models.
    """
    count, recipes = experiment.section.victims[victim], experiment.recipes
    console.info(f"{victim}: {count} shadow models")
    is_training_SU = random_halves(count, len(audit.universe), generator(recipes.seed, "membership", "halves"))
    half_splits = [_select_rows(audit.universe, is_training_U.nonzero().squeeze(1)) for is_training_U in is_training_SU]
    seeds = [experiment.section.shadow_seed + number for number in range(count)]
    specs = [
        VictimSpec(victim, recipes.with_seed_offset(seed), half) for seed, half in zip(seeds, half_splits, strict=True)
    ]
    return is_training_SU, [trained.model for trained in train_victims(specs)]


def random_halves(count: int, images: int, stream: torch.Generator) -> Tensor:
    """Returns random halves of the images and their complements as masks (S, U); every image is in half of them."""
    is_training_SU = torch.zeros(count, images, dtype=torch.bool)
    for number in range(0, count, 2):
        is_training_SU[number, torch.randperm(images, generator=stream)[: images // 2]] = True
        is_training_SU[number + 1] = ~is_training_SU[number]
    return is_training_SU
