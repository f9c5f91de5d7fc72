"""The smallest epsilon that fools the model on each image: robust accuracy at every radius from one run.

Shapes: N images, C channel, H/W pixels.
"""

import torch
from torch import Tensor

from advmoe.attacks import engine
from advmoe.attacks.ball import perturbation_norm
from advmoe.attacks.fab import FabT, closest_adversarial
from advmoe.attacks.random_streams import ImageStreams
from advmoe.core import console
from advmoe.evaluation.batch_size import map_batches
from advmoe.evaluation.harness import (
    DECISION_BATCH,
    EvaluationConfig,
    EvaluationResult,
    EvaluationTarget,
    choose_batch_size,
)
from advmoe.models import inference
from advmoe.runtime import distributed
from advmoe.statistics.decisions import CLEAN


def minimal_epsilons(
    target: EvaluationTarget, settings: FabT, result: EvaluationResult, config: EvaluationConfig
) -> Tensor:
    """Returns upper bounds (N,) on the distance to the closest adversarial image in the norm of `config.ball`.

    Uses FAB and the adversarial images in `result`; 0 where the clean image is misclassified, inf if no adversarial
    image is known. Every point is classified in float32.
    """
    norm = config.ball.norm
    bounds = torch.full((len(target.labels),), torch.inf)
    bounds[~result.correct[CLEAN]] = 0
    clean = target.images.cpu()
    for outcome in result.outcomes.values():
        misclassified = outcome.attacked & ~outcome.correct
        bounds[misclassified] = torch.minimum(
            bounds[misclassified], perturbation_norm(outcome.images[misclassified] - clean[misclassified], norm)
        )
    rows = result.correct[CLEAN].nonzero().squeeze(1)
    if not len(rows):
        return bounds
    size = choose_batch_size(target, config, len(rows))
    own = torch.cat([rows[:0], *distributed.shard(torch.split(rows, size))])
    with console.Progress(f"{target.name}: minimal epsilon", len(own)) as progress:
        for batch, points in map_batches(
            lambda batch: _closest_misclassified(target, settings, batch, config), own, size
        ):
            wrong = inference.predict(target.model, points, DECISION_BATCH).argmax(1) != target.labels[batch]
            lengths = torch.where(wrong.cpu(), perturbation_norm(points.cpu() - clean[batch], norm), torch.inf)
            bounds[batch] = torch.minimum(bounds[batch], lengths)
            progress.advance(len(batch), f"{int(wrong.sum())} adversarial")
    return torch.stack(distributed.all_gather(bounds)).amin(dim=0)


def _closest_misclassified(target: EvaluationTarget, settings: FabT, rows: Tensor, config: EvaluationConfig) -> Tensor:
    draws = ImageStreams(config.seed, "minimal-epsilon", rows)
    # bfloat16 logits are too coarse to locate the decision boundary
    with engine.attack_mode(target.model, "float32") as frozen:

        def is_adversarial(points: Tensor, labels: Tensor) -> Tensor:
            return inference.predict(target.model, points, DECISION_BATCH).argmax(1) != labels

        images, labels = target.images[rows], target.labels[rows]
        points, _ = closest_adversarial(
            frozen, images, labels, norm=config.ball.norm, settings=settings, draws=draws, is_adversarial=is_adversarial
        )
    return points.clamp(0, 1)
