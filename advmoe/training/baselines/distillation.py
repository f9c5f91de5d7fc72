"""Distillation: one small network that learns the mixture's outputs at a fraction of its cost.

Robust soft labels (RSLAD, Zi et al., ICCV 2021, arXiv 2108.07969): on the clean image x and on the attacked one x' the
student learns the teacher's output on x; labels are not used in the loss.

    loss = (1 - alpha) * KL(teacher(x) || student(x)) + alpha * KL(teacher(x) || student(x'))

The paper's attack maximises the second divergence. Here a batch is attacked as for every other plain network, so that
a student differs from those only in its loss.

Shapes: B batch, C channel, H/W pixels, K classes.
"""

import torch
from torch import Tensor, nn

from advmoe.training.config import TrainingConfig
from advmoe.training.job_key import model_fingerprint
from advmoe.training.single import PlainTask
from advmoe.training.trades import kl_divergence


class DistillationTask(PlainTask):
    """Trains a student on the outputs of `teacher`, which is frozen in place, in eval mode.

    `alpha` in [0, 1] is the weight of the attacked images.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, teacher: nn.Module, alpha: float) -> None:
        super().__init__(model, config)
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_hash = model_fingerprint(teacher)  # part of the name of the checkpoint
        self.alpha = alpha

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, clean_BCHW: Tensor) -> Tensor:
        """Returns (1 - alpha) * KL on the clean images + alpha * KL on the attacked images, a mean over the batch.

        Both divergences are from the teacher's output on the clean images.
        """
        del labels_B
        with torch.no_grad():
            teacher_logits_BK = self.teacher.to(clean_BCHW.device)(clean_BCHW)
        clean, attacked = (
            kl_divergence(teacher_logits_BK, self.model(images)).mean() for images in (clean_BCHW, images_BCHW)
        )
        return (1 - self.alpha) * clean + self.alpha * attacked
