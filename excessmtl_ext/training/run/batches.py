"""The batches of a run: its processes' parts, the reading by worker processes, held-out clean batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from excessmtl_ext.data import Batch, Split
from excessmtl_ext.data.seeding import seeded_generator
from excessmtl_ext.training.run.config import TrainConfig


class Part(NamedTuple):
    """What one process has of a batch.

    Attributes:
        batch: Its samples.
        is_own: False where the batch has fewer samples than there are processes, and this one's stands in for none.
    """

    batch: Batch
    is_own: bool


class BatchesOfSplit(Dataset[Batch]):
    """The batches of one epoch as worker processes read them."""

    def __init__(self, split: Split, indices: Sequence[Tensor], epoch: int) -> None:
        self.split, self.indices, self.epoch = split, indices, epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.split.batch(self.indices[index], epoch=self.epoch)


class HeldOutBatches:
    """Clean batches that a method sees and the optimizer does not, one per step, in a seeded order per pass."""

    def __init__(self, clean_train: Split, indices: Tensor, config: TrainConfig) -> None:
        self.clean_train, self.indices, self.seed = clean_train, indices, config.seed
        self.batch_size = min(config.batch_size, len(indices))

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, so that a resumed run sees the same."""
        steps_per_pass = len(self.indices) // self.batch_size
        number, position = divmod(step, steps_per_pass)
        order = torch.randperm(
            len(self.indices), generator=seeded_generator(self.seed, "held_out_order", number)
        )
        start = position * self.batch_size
        return self.clean_train.batch(self.indices[order[start : start + self.batch_size]])
