"""Data-free extraction: a generator makes the queries, its gradient is estimated from answers (Truong et al. 2021,
"Data-Free Model Extraction", arXiv 2011.14779).

The generator looks for images on which surrogate and victim disagree, the surrogate learns the victim's answers to
them. The victim gives no gradients, so the generator's are estimated by forward differences in random directions, each
of which is one more query per image. A victim sees whole pixel levels, so the differences are taken in levels as well:
a smaller step would be rounded away. Not from the paper: random signs in place of normal directions, constant rates,
and that the surrogate that is judged learns from all probes afterwards, by the recipe of every other attack.

Shapes: B batch, C channel, H/W pixels, K classes, Z latent numbers.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError
from advmoe.core.settings import PIXEL_LEVELS, PositiveInt, Settings
from advmoe.data.dataset import Facts
from advmoe.runtime.checkpoints.storage import Checkpoint, flatten, load_optimizer_state, optimizer_state, unflatten
from advmoe.runtime.machine import device
from advmoe.threats.extraction.context import AttackContext
from advmoe.threats.extraction.transfer_set import TransferSet, asked, joined

TINY = 1e-7  # of probabilities whose logarithm is taken
GENERATOR_LR, SURROGATE_LR = 1e-4, 0.1  # as in the paper
MOMENTUM, DECAY = 0.9, 5e-4


class Dfme(Settings):
    """A round: one batch for the generator, with `directions` differences of `step` pixel levels, and `learning`
    batches for the surrogate, all of `batch_size` images from `latent` normal numbers.
    """

    kind: Literal["dfme"]
    batch_size: Annotated[int, Field(ge=2)]
    latent: PositiveInt
    width: PositiveInt
    directions: PositiveInt
    step: PositiveInt
    learning: PositiveInt


class Generator(nn.Module):
    """Latent numbers (B, Z) -> images (B, C, H, W) in [0, 1]: a linear layer and two rounds of upsampling."""

    def __init__(self, settings: Dfme, facts: Facts) -> None:
        super().__init__()
        self.small = (settings.width, -(-facts.height // 4), -(-facts.width // 4))
        self.size = (facts.height, facts.width)
        width = settings.width
        self.project = nn.Linear(settings.latent, self.small[0] * self.small[1] * self.small[2])
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
        painted: Tensor = self.paint(self.project(latent_BZ).unflatten(1, self.small))
        return painted[:, :, : self.size[0], : self.size[1]]


def dfme(settings: Dfme, tools: AttackContext) -> TransferSet:
    """Every image that was asked, with its answer. Raises UserError when the budget does not cover one round."""
    round_of = settings.batch_size * (settings.directions + 1 + settings.learning)
    if tools.oracle.budget < round_of:
        raise UserError(f"a budget of {tools.oracle.budget} queries does not cover one round, which takes {round_of}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=tools.stream)))
        generator = Generator(settings, tools.facts)
    thief = _Thief(settings, tools, generator.to(device()))
    with tools.keep(thief) as look:
        while tools.oracle.left >= round_of:
            thief.improve_generator()
            for _ in range(settings.learning):
                thief.improve_surrogate()
            look()
    assert thief.known is not None
    return thief.known


class _Thief:
    """Generator, surrogate, and all that was asked so far."""

    def __init__(self, settings: Dfme, tools: AttackContext, generator: Generator) -> None:
        self.settings, self.oracle, self.stream, self.generator = settings, tools.oracle, tools.stream, generator
        self.surrogate = tools.fresh().eval()
        self.generator_steps = torch.optim.Adam(generator.parameters(), GENERATOR_LR)
        self.surrogate_steps = torch.optim.SGD(
            self.surrogate.parameters(), SURROGATE_LR, momentum=MOMENTUM, weight_decay=DECAY
        )
        self.known: TransferSet | None = None

    # ---- to be killed and go on, to the last bit the same; asked for when a round is over

    @property
    def position(self) -> tuple[int, ...]:
        """How many queries were asked."""
        return (self.oracle.used,)

    @property
    def progress(self) -> str:
        """The same in words."""
        return f"{self.oracle.used} queries"

    def state(self) -> Checkpoint:
        """All of it; what was asked is also what the oracle counted."""
        assert self.known is not None
        parts = {
            "generator": self.generator.state_dict(),
            "surrogate": self.surrogate.state_dict(),
            "generator steps": optimizer_state(self.generator_steps),
            "surrogate steps": optimizer_state(self.surrogate_steps),
            "known": vars(self.known),
            "stream": {"state": self.stream.get_state()},
        }
        return Checkpoint(flatten(parts), {})

    def restore(self, snapshot: Checkpoint) -> None:
        """Be as at that moment."""
        parts = unflatten(snapshot.tensors)
        self.generator.load_state_dict(parts["generator"])
        self.surrogate.load_state_dict(parts["surrogate"])
        load_optimizer_state(self.generator_steps, parts["generator steps"])
        load_optimizer_state(self.surrogate_steps, parts["surrogate steps"])
        self.known = TransferSet(**parts["known"])
        self.oracle.recall(self.known.images)
        self.stream.set_state(parts["stream"]["state"])

    # ---- the two sides of a round

    def improve_generator(self) -> None:
        """Towards disagreement: ascend the L1 distance of logits along its estimated gradient in the pixels."""
        images = self.generator(self._latent())
        with torch.no_grad():
            levels = _levels(images)
            here = self._disagreement(levels)
            slope = torch.zeros_like(images)
            for _ in range(self.settings.directions):
                moved, taken = self._moved(levels)
                rise = (self._disagreement(moved) - here) / taken.square().sum(dim=(1, 2, 3)).clamp_min(TINY)
                slope += rise[:, None, None, None] * taken
            slope *= images[0].numel() / self.settings.directions
        self.generator_steps.zero_grad(set_to_none=True)
        images.backward(-slope / len(images))
        self.generator_steps.step()

    def _moved(self, levels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images some levels further along random signs, as far as the pixel range goes, and the change in [-1, 1]."""
        signs = torch.randint(0, 2, levels_BCHW.shape, generator=self.stream).to(levels_BCHW.device) * 2 - 1
        moved = (levels_BCHW.int() + self.settings.step * signs).clamp(0, PIXEL_LEVELS)
        return moved.to(torch.uint8), (moved - levels_BCHW.int()).float() / PIXEL_LEVELS

    def improve_surrogate(self) -> None:
        """One step towards the victim's answers to fresh images."""
        with torch.no_grad():
            images = _levels(self.generator(self._latent()))
        answers = self._ask(images)
        self.surrogate.train()
        self.surrogate_steps.zero_grad(set_to_none=True)
        logits = self.surrogate(images.float() / PIXEL_LEVELS)
        loss = functional.l1_loss(_centred(functional.log_softmax(logits, dim=1)), _logits(answers))
        loss.backward()  # type: ignore[no-untyped-call]
        self.surrogate_steps.step()
        self.surrogate.eval()

    def _disagreement(self, levels_BCHW: Tensor) -> Tensor:
        logits = _centred(functional.log_softmax(self.surrogate(levels_BCHW.float() / PIXEL_LEVELS), dim=1))
        return (logits - _logits(self._ask(levels_BCHW))).abs().sum(dim=1)

    def _ask(self, images: Tensor) -> Tensor:
        new = asked(self.oracle, images.cpu())
        self.known = new if self.known is None else joined(self.known, new)
        return new.answers.to(images.device)

    def _latent(self) -> Tensor:
        return torch.randn(self.settings.batch_size, self.settings.latent, generator=self.stream).to(device())


def _levels(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW * PIXEL_LEVELS).round().to(torch.uint8)


def _logits(answers_BK: Tensor) -> Tensor:
    """Logits from probabilities, up to their mean (B, K): the paper's recovery."""
    return _centred(answers_BK.clamp_min(TINY).log())


def _centred(logits_BK: Tensor) -> Tensor:
    return logits_BK - logits_BK.mean(dim=1, keepdim=True)
