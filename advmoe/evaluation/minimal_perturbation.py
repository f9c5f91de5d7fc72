"""The smallest epsilon at which each image falls: robust accuracy at every radius from one run.

Shapes: N images, C channel, H/W pixels.
"""

import torch
from torch import Tensor

from advmoe.attacks import engine
from advmoe.attacks.ball import length
from advmoe.attacks.fab import FabT, closest
from advmoe.attacks.random_streams import ImageDraws
from advmoe.core import console
from advmoe.evaluation.batch_size import in_batches
from advmoe.evaluation.harness import DECISION_BATCH, EvaluationConfig, EvaluationResult, EvaluationTarget, batch_size
from advmoe.models import inference
from advmoe.runtime import distributed
from advmoe.statistics.decisions import CLEAN


def minimal_epsilons(
    target: EvaluationTarget, settings: FabT, measured: EvaluationResult, terms: EvaluationConfig
) -> Tensor:
    """Upper bounds (N,) on the distance, in the norm of the terms' ball, to the closest misclassified image.

    From FAB and from whatever the evaluation's other attacks found; 0 where the clean image is wrong, inf where nothing
    was found. Every point was classified in float32.
    """
    norm = terms.ball.norm
    bounds = torch.full((len(target.labels),), torch.inf)
    bounds[~measured.correct[CLEAN]] = 0
    clean = target.images.cpu()
    for outcome in measured.outcomes.values():
        fell = outcome.attacked & ~outcome.correct
        bounds[fell] = torch.minimum(bounds[fell], length(outcome.images[fell] - clean[fell], norm))
    rows = measured.correct[CLEAN].nonzero().squeeze(1)
    if not len(rows):
        return bounds
    size = batch_size(target, terms, len(rows))
    own = torch.cat([rows[:0], *distributed.shard(torch.split(rows, size))])
    with console.Progress(f"{target.name}: minimal epsilon", len(own)) as progress:
        for batch, points in in_batches(lambda batch: _closest(target, settings, batch, terms), own, size):
            wrong = inference.predict(target.model, points, DECISION_BATCH).argmax(1) != target.labels[batch]
            found = torch.where(wrong.cpu(), length(points.cpu() - clean[batch], norm), torch.inf)
            bounds[batch] = torch.minimum(bounds[batch], found)
            progress.advance(len(batch), f"{int(wrong.sum())} found")
    return torch.stack(distributed.all_gather(bounds)).amin(dim=0)


def _closest(target: EvaluationTarget, settings: FabT, rows: Tensor, terms: EvaluationConfig) -> Tensor:
    draws = ImageDraws(terms.seed, "minimal-epsilon", rows)
    # bfloat16 logits are too coarse to tell how far a boundary is
    with engine.attack_mode(target.model, "float32") as cheap:

        def fooled(points: Tensor, labels: Tensor) -> Tensor:
            return inference.predict(target.model, points, DECISION_BATCH).argmax(1) != labels

        images, labels = target.images[rows], target.labels[rows]
        points, _ = closest(cheap, images, labels, norm=terms.ball.norm, settings=settings, draws=draws, fooled=fooled)
    return points.clamp(0, 1)
