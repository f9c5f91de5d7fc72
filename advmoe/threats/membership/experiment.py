"""How much each network gives away of its training images.

Members are training images; the others come from the attacker's pool and the test split. Shadow models are trained by
the pipeline's own recipes on random halves of all three, so that of every image half of them know nothing.

Shapes: N audited images, C channel, H/W pixels, K classes, S shadow models, U images that shadows are drawn from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from advmoe.attacks import engine
from advmoe.attacks.ball import LInf
from advmoe.attacks.pgd import pgd
from advmoe.core import console, paths
from advmoe.data import dataset
from advmoe.data.dataset import Dataset, Split, digests
from advmoe.models import classifiers, inference
from advmoe.runtime.checkpoints import storage, workdir
from advmoe.runtime.checkpoints.storage import Checkpoint
from advmoe.runtime.machine import derive_seed, device, generator
from advmoe.runtime.parallel import parallel_map
from advmoe.threats.extraction.victims import file_of
from advmoe.threats.membership import report
from advmoe.threats.membership.attacks import (
    Scores,
    balanced,
    calibrated_scores,
    confidence_scores,
    gap,
    leak,
    lira_scores,
    loss_scores,
)
from advmoe.threats.membership.config import MembershipSection
from advmoe.threats.membership.report import Row
from advmoe.threats.victim_training import VictimRecipes, VictimSpec, train_victims
from advmoe.training.job_key import model_fingerprint

BATCH = 200
CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclass(frozen=True)
class MembershipExperiment:
    """Everything that the audit starts from."""

    section: MembershipSection
    recipes: VictimRecipes


@dataclass(frozen=True)
class Audit:
    """The audited images: `split`, whether each is a member (N,), and its position (N,) in `universe`, which shadows
    are drawn from.
    """

    split: Split
    is_member: Tensor
    position: Tensor
    universe: Split


@dataclass(frozen=True)
class OutputPaths:
    """Where the results go: the headline, and every number with its interval."""

    metrics: Path
    runs: Path


def run_experiment(case: MembershipExperiment, places: OutputPaths) -> None:
    """Run the audit, write it down and show it; what was done before a kill is taken over.

    Raises UserError for what cannot be.
    """
    with workdir.open_workdir("membership", case.section, case.recipes, dataset.load(paths.DATASET).sha256) as shelf:
        _conduct(replace(case, recipes=replace(case.recipes, shelf=shelf)), places)


def _conduct(case: MembershipExperiment, places: OutputPaths) -> None:
    rows, audit = run(case)
    members = int(audit.is_member.sum())
    about = {"epsilon": case.recipes.epsilon, "members": members, "others": len(audit.split) - members}
    report.write(rows, about, places.metrics, places.runs)
    report.show(rows, about)
    console.say(f"numbers: {places.metrics}, {places.runs}")


def run(case: MembershipExperiment) -> tuple[list[Row], Audit]:
    """Every victim, score and kind of query."""
    audit = draw(dataset.load(paths.DATASET), case.recipes.seed)
    victims = list(case.section.victims)
    found = dict(zip(victims, parallel_map(partial(_asked, case, audit), victims), strict=True))
    scores = {victim: _scores(case, audit, victim, found[victim]) for victim in victims}
    rows = []
    for victim, by_test in scores.items():
        for test, mine in by_test.items():
            other = None if victim == case.section.against else scores[case.section.against].get(test)
            beyond = None if other is None else gap(mine, other, case.recipes.seed)
            rows.append(Row(victim, *test, case.section.victims[victim], leak(mine, case.recipes.seed), beyond))
    return rows, audit


def draw(data: Dataset, seed: int) -> Audit:
    """Who is audited: as many members of each class as others. Raises UserError when there are none."""
    train, others = data["train"], _joined(data["pool"], data["test"])
    known = set(digests(train.images))  # what the source holds twice is a member, whatever split it is in
    others = _rows(others, torch.tensor([digest not in known for digest in digests(others.images)], dtype=torch.bool))
    inside, outside = balanced(train.labels, others.labels, generator(seed, "membership", "audit"))
    universe = _joined(train, others)
    position = torch.cat([inside, outside + len(train)])
    is_member = torch.arange(len(position)) < len(inside)
    return Audit(_rows(universe, position), is_member, position, universe)


def _joined(first: Split, second: Split) -> Split:
    pairs = zip((first.images, first.labels, first.index), (second.images, second.labels, second.index), strict=True)
    return Split(*(torch.cat(pair) for pair in pairs))


def _rows(split: Split, rows: Tensor) -> Split:
    return Split(split.images[rows], split.labels[rows], split.index[rows])


Told = Mapping[str, Tensor]  # by kind of query: log-probabilities (N, K)


def _asked(case: MembershipExperiment, audit: Audit, victim: str) -> Told:
    """What a victim answers."""
    return told(classifiers.load(file_of(victim)).model, case, audit)


def told(model: nn.Module, case: MembershipExperiment, audit: Audit) -> Told:
    """What a network answers about the audited images, clean and each attacked on this network itself; what it was
    asked before a kill it is not asked again.
    """
    file = workdir.checkpoint_path(case.recipes.shelf, "told", model_fingerprint(model))
    return storage.load_or_compute(
        file,
        lambda: Checkpoint(_told(model.to(device()), case, audit), {}),
        lambda found: {kind: found.tensors[kind] for kind in (CLEAN, ADVERSARIAL)},  # a file has an order of its own
    )


def _told(model: nn.Module, case: MembershipExperiment, audit: Audit) -> Told:
    pixels, labels = audit.split.pixels().to(device()), audit.split.labels.to(device())
    attacked = engine.attack_without_early_stop(
        model,
        pixels,
        labels,
        partial(pgd, settings=case.section.attack),
        ball=LInf(case.recipes.epsilon),
        seed=derive_seed(case.recipes.seed, "membership"),
        purpose=case.section.attack.kind,
        precision=case.recipes.pretrain.precision,
        batch_size=BATCH,
    )
    return {CLEAN: log_probs(model, pixels), ADVERSARIAL: log_probs(model, attacked)}


def log_probs(model: nn.Module, pixels_NCHW: Tensor) -> Tensor:
    """A network's log-probabilities (N, K), on the CPU."""
    return functional.log_softmax(inference.predict(model, pixels_NCHW, BATCH).double(), dim=1).cpu()


def _scores(case: MembershipExperiment, audit: Audit, victim: str, answers: Told) -> dict[tuple[str, str], Scores]:
    """By score and kind of query."""
    labels = audit.split.labels
    found = {("loss", kind): loss_scores(each, labels) for kind, each in answers.items()}
    if case.section.victims[victim]:
        knows_SU, shadows = train_shadows(case, audit, victim)
        knows_SN = knows_SU[:, audit.position]
        theirs = parallel_map(partial(told, case=case, audit=audit), shadows)
        for kind, each in answers.items():
            mine_N = confidence_scores(each, labels)
            shadow_SN = torch.stack([confidence_scores(shadow[kind], labels) for shadow in theirs])
            with_SN, without_SN = (shadow_SN.where(side, torch.nan) for side in (knows_SN, ~knows_SN))
            found["calibrated", kind] = calibrated_scores(mine_N, without_SN)
            found["LiRA", kind] = lira_scores(mine_N, with_SN, without_SN)
    return {test: Scores(each[audit.is_member], each[~audit.is_member]) for test, each in found.items()}


def train_shadows(case: MembershipExperiment, audit: Audit, victim: str) -> tuple[Tensor, Sequence[nn.Module]]:
    """Which image of the universe each shadow learned (S, U), and the shadows: trained as the victim was."""
    count, recipes = case.section.victims[victim], case.recipes
    console.say(f"{victim}: {count} shadow models")
    knows_SU = halves(count, len(audit.universe), generator(recipes.seed, "membership", "halves"))
    learned = [_rows(audit.universe, knows_U.nonzero().squeeze(1)) for knows_U in knows_SU]
    seeds = [case.section.shadow_seed + number for number in range(count)]
    orders = [VictimSpec(victim, recipes.under(seed), half) for seed, half in zip(seeds, learned, strict=True)]
    return knows_SU, [trained.model for trained in train_victims(orders)]


def halves(count: int, images: int, stream: torch.Generator) -> Tensor:
    """Random halves and their complements (S, U): every image is in exactly half of them."""
    knows = torch.zeros(count, images, dtype=torch.bool)
    for number in range(0, count, 2):
        knows[number, torch.randperm(images, generator=stream)[: images // 2]] = True
        knows[number + 1] = ~knows[number]
    return knows
