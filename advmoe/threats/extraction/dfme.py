"""DFME, data-free model extraction: a generator, trained with estimated gradients, makes the queries (Truong et al.
2021, "Data-Free Model Extraction", arXiv 2011.14779).

The generator maximises the disagreement of surrogate and victim, the surrogate minimises it. The victim provides no
gradients, so the generator's are estimated by forward differences in random directions, each of which costs one more
query per image. Victims receive uint8 images, so the differences are whole pixel levels: a smaller step would be
rounded away. Differences to the paper: random signs instead of normal directions, constant learning rates, and the
evaluated surrogate is trained on all queries afterwards, by the recipe of every other attack.

Shapes: B batch, C channel, H/W pixels, K classes, Z latent numbers.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings
from advmoe.data.dataset import DatasetInfo
from advmoe.runtime.checkpoints.storage import Checkpoint, flatten, load_optimizer_state, optimizer_state, unflatten
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.transfer_set import TransferSet, concatenate, query

TINY = 1e-7  # lower bound of probabilities in logarithms
GENERATOR_LR, SURROGATE_LR = 1e-4, 0.1  # as in the paper
MOMENTUM, DECAY = 0.9, 5e-4


class Dfme(Settings):
    """Settings. A round: one batch for the generator, with `directions` differences of `step` pixel levels, and
    `learning` batches for the surrogate, all of `batch_size` images; `latent`: dimension of the generator's input;
    `width`: its channels.
    """

    kind: Literal["dfme"]
    batch_size: Annotated[int, Field(ge=2)]
    latent: PositiveInt
    width: PositiveInt
    directions: PositiveInt
    step: PositiveInt
    learning: PositiveInt


class Generator(nn.Module):
    """Maps latent vectors (B, Z) to images (B, C, H, W) in [0, 1]: a linear layer and two upsampling blocks."""

    def __init__(self, settings: Dfme, facts: DatasetInfo) -> None:
        super().__init__()
        self.base_shape = (settings.width, -(-facts.height // 4), -(-facts.width // 4))
        self.size = (facts.height, facts.width)
        width = settings.width
        self.project = nn.Linear(settings.latent, self.base_shape[0] * self.base_shape[1] * self.base_shape[2])
        self.paint = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2 or 1, 3, padding=1),
            nn.BatchNorm2d(width // 2 or 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2 or 1, facts.channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent_BZ: Tensor) -> Tensor:
        images: Tensor = self.paint(self.project(latent_BZ).unflatten(1, self.base_shape))
        return images[:, :, : self.size[0], : self.size[1]]


def dfme(settings: Dfme, context: AttackContext) -> TransferSet:
    """Returns all queries of whole rounds within the budget. Raises UserError when it does not cover one round."""
    per_round = settings.batch_size * (settings.directions + 1 + settings.learning)
    if context.oracle.budget < per_round:
        raise UserError(
            f"a budget of {context.oracle.budget} queries does not cover one round, which takes {per_round}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=context.stream)))
        generator = Generator(settings, context.facts)
    trainer = _DfmeTrainer(settings, context, generator.to(device()))
    with context.checkpointing(trainer) as on_step_end:
        while context.oracle.remaining >= per_round:
            trainer.update_generator()
            for _ in range(settings.learning):
                trainer.update_surrogate()
            on_step_end()
    assert trainer.transfer_set is not None
    return trainer.transfer_set


class _DfmeTrainer:
    """Trains generator and surrogate in turn and collects all queries."""

    def __init__(self, settings: Dfme, context: AttackContext, generator: Generator) -> None:
        self.settings, self.oracle, self.stream, self.generator = settings, context.oracle, context.stream, generator
        self.surrogate = context.build_surrogate().eval()
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), GENERATOR_LR)
        self.surrogate_optimizer = torch.optim.SGD(
            self.surrogate.parameters(), SURROGATE_LR, momentum=MOMENTUM, weight_decay=DECAY
        )
        self.transfer_set: TransferSet | None = None

    # ---- resumable at the end of a round, see `advmoe.runtime.checkpoints.manager`

    @property
    def position(self) -> tuple[int, ...]:
        """The number of queries sent."""
        return (self.oracle.used,)

    @property
    def progress(self) -> str:
        """The same in words."""
        return f"{self.oracle.used} queries"

    def checkpoint(self) -> Checkpoint:
        """Returns the complete state; the oracle's query log follows from the transfer set."""
        assert self.transfer_set is not None
        parts = {
            "generator": self.generator.state_dict(),
            "surrogate": self.surrogate.state_dict(),
            "generator steps": optimizer_state(self.generator_optimizer),
            "surrogate steps": optimizer_state(self.surrogate_optimizer),
            "known": vars(self.transfer_set),
            "stream": {"state": self.stream.get_state()},
        }
        return Checkpoint(flatten(parts), {})

    def load(self, snapshot: Checkpoint) -> None:
        """Restores a state, including the oracle's query log."""
        parts = unflatten(snapshot.tensors)
        self.generator.load_state_dict(parts["generator"])
        self.surrogate.load_state_dict(parts["surrogate"])
        load_optimizer_state(self.generator_optimizer, parts["generator steps"])
        load_optimizer_state(self.surrogate_optimizer, parts["surrogate steps"])
        self.transfer_set = TransferSet(**parts["known"])
        self.oracle.record_queries(self.transfer_set.images)
        self.stream.set_state(parts["stream"]["state"])

    # ---- the two updates of a round

    def update_generator(self) -> None:
        """Makes one ascent step on the L1 distance of logits, with its estimated gradient in the pixels."""
        images = self.generator(self._latent())
        with torch.no_grad():
            levels = _to_levels(images)
            base = self._disagreement(levels)
            gradient = torch.zeros_like(images)
            for _ in range(self.settings.directions):
                moved, change = self._perturb(levels)
                slope = (self._disagreement(moved) - base) / change.square().sum(dim=(1, 2, 3)).clamp_min(TINY)
                gradient += slope[:, None, None, None] * change
            gradient *= images[0].numel() / self.settings.directions
        self.generator_optimizer.zero_grad(set_to_none=True)
        images.backward(-gradient / len(images))
        self.generator_optimizer.step()

    def _perturb(self, levels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images moved by `step` levels along random signs, clipped to [0, 255], and the change in [-1, 1]."""
        signs = torch.randint(0, 2, levels_BCHW.shape, generator=self.stream).to(levels_BCHW.device) * 2 - 1
        moved = (levels_BCHW.int() + self.settings.step * signs).clamp(0, PIXEL_LEVELS)
        return moved.to(torch.uint8), (moved - levels_BCHW.int()).float() / PIXEL_LEVELS

    def update_surrogate(self) -> None:
        """Makes one step towards the victim's answers to a new batch of generated images."""
        with torch.no_grad():
            images = _to_levels(self.generator(self._latent()))
        answers = self._query(images)
        self.surrogate.train()
        self.surrogate_optimizer.zero_grad(set_to_none=True)
        logits = self.surrogate(images.float() / PIXEL_LEVELS)
        loss = functional.l1_loss(_centered(functional.log_softmax(logits, dim=1)), _logits_from_probabilities(answers))
        loss.backward()  # type: ignore[no-untyped-call]
        self.surrogate_optimizer.step()
        self.surrogate.eval()

    def _disagreement(self, levels_BCHW: Tensor) -> Tensor:
        logits = _centered(functional.log_softmax(self.surrogate(levels_BCHW.float() / PIXEL_LEVELS), dim=1))
        return (logits - _logits_from_probabilities(self._query(levels_BCHW))).abs().sum(dim=1)

    def _query(self, images: Tensor) -> Tensor:
        new = query(self.oracle, images.cpu())
        self.transfer_set = new if self.transfer_set is None else concatenate(self.transfer_set, new)
        return new.answers.to(images.device)

    def _latent(self) -> Tensor:
        return torch.randn(self.settings.batch_size, self.settings.latent, generator=self.stream).to(device())


def _to_levels(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW * PIXEL_LEVELS).round().to(torch.uint8)


def _logits_from_probabilities(answers_BK: Tensor) -> Tensor:
    """Returns mean-free logits (B, K) that give these probabilities, as in the paper."""
    return _centered(answers_BK.clamp_min(TINY).log())


def _centered(logits_BK: Tensor) -> Tensor:
    return logits_BK - logits_BK.mean(dim=1, keepdim=True)
