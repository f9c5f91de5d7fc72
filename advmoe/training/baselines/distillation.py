"""One small network that learns the mixture's answers: what does a ninth of the cost keep of the nine?

Robust soft labels (RSLAD, Zi et al., ICCV 2021, arXiv 2108.07969): on the clean image x and on the attacked one x' the
student learns what the teacher says of x; labels play no part in the loss.

    loss = (1 - alpha) * KL(teacher(x) || student(x)) + alpha * KL(teacher(x) || student(x'))

The paper attacks by climbing the second divergence. Here a batch is attacked as for every other plain network, so that
a student differs from those in what it is told and in nothing else.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

import torch
from torch import Tensor, nn

from advmoe.training.config import TrainingConfig
from advmoe.training.job_key import model_fingerprint
from advmoe.training.single import PlainLearner
from advmoe.training.trades import divergence


class DistillationTask(PlainLearner):
    """Learns from a teacher, which is frozen in place, in eval mode; `alpha` in [0, 1] is the share of the attacked
    images.
    """

    def __init__(self, model: nn.Module, recipe: TrainingConfig, teacher: nn.Module, alpha: float) -> None:
        super().__init__(model, recipe)
        self.teacher = teacher.eval().requires_grad_(False)
        self.taught_by = model_fingerprint(teacher)  # part of the run's identity
        self.alpha = alpha

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Both divergences from the teacher's answer to the clean images, a mean over the batch."""
        del labels_B
        with torch.no_grad():
            told_BK = self.teacher.to(clean_BCHW.device)(clean_BCHW)
        clean, attacked = (divergence(told_BK, self.model(images)).mean() for images in (clean_BCHW, images_BCHW))
        return (1 - self.alpha) * clean + self.alpha * attacked
