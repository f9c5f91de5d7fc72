"""Attacks training batches: draws one attack per batch, and runs it micro-batch by micro-batch.

Shapes: B batch, C channel, H/W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.attacks import engine
from advmoe.attacks.engine import PassCount
from advmoe.attacks.random_streams import MicroBatchStream
from advmoe.runtime import distributed
from advmoe.training.batch_attacks import BatchAttack, draw_attack
from advmoe.training.job import TrainingJob
from advmoe.training.microbatches import MIN_MICRO_BATCH, MicroBatch, split_batch
from advmoe.training.trainer_state import TrainerState


class BatchCrafter:
    """Attacks the batches of a training job; `min_size`: smallest micro-batch in images. The random streams and the
    pass counter are those of `state`.
    """

    def __init__(
        self, model: nn.Module, job: TrainingJob, state: TrainerState, min_size: int = MIN_MICRO_BATCH
    ) -> None:
        self.model, self.job, self.state, self.min_size = model, job, state, min_size

    def craft(self, images_BCHW: Tensor, labels_B: Tensor) -> list[MicroBatch]:
        """Returns this process's micro-batches, attacked in eval mode with the weights before the step."""
        attack, passes = draw_attack(self.job.adversary, self.job.epsilon, self.state.adversary), PassCount()
        stream_start = self.state.noise.get_state()
        micro_batches = []
        for rows in self._local_rows(len(labels_B)):
            self.state.noise.set_state(stream_start)  # every micro-batch draws for the whole batch, and takes its own
            micro_batches.append(self._micro_batch(images_BCHW, labels_B, rows, attack, passes))
        self._synchronise(passes)
        return [micro_batch for micro_batch in micro_batches if len(micro_batch.labels)]

    def _local_rows(self, count: int) -> Sequence[Tensor]:
        """Positions of this process's micro-batches; one without images where there are fewer than processes, because
        it still takes part in the sums over all processes.
        """
        rows = split_batch(count, self.job.config.micro_batch, distributed.world_size(), self.min_size)
        return distributed.shard(rows) or [torch.arange(0)]

    def _micro_batch(
        self, images_BCHW: Tensor, labels_B: Tensor, rows: Tensor, attack: BatchAttack | None, passes: PassCount
    ) -> MicroBatch:
        index = rows.to(labels_B.device)
        clean, labels = images_BCHW[index], labels_B[index]
        stream = MicroBatchStream(self.state.noise, len(labels_B), rows)
        attacked = clean
        if attack is not None:
            attacked = engine.attack_batch(
                self.model,
                clean,
                labels,
                attack.function,
                ball=attack.ball,
                draws=stream,
                precision=self.job.config.precision,
                passes=passes,
            )
        return MicroBatch(clean, attacked, labels, len(labels) / len(labels_B))

    def _synchronise(self, passes: PassCount) -> None:
        """Brings the noise stream to the same position in all processes, and counts the passes of all of them."""
        if distributed.is_distributed():  # a process without images may not have drawn; rank 0 always has one
            self.state.noise.set_state(distributed.run_on_rank0(self.state.noise.get_state))
        forward, backward = distributed.all_reduce_sum(torch.tensor([passes.forward, passes.backward])).tolist()
        self.state.passes.forward += forward
        self.state.passes.backward += backward
