"""The order in which a stage sees its samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Sample indices of an epoch: shuffled by seed and epoch, cut to whole batches.

    The cut comes after the shuffle, so no sample is left out for good. The length, and so the number of steps in an
    epoch, is the same for every micro-batch size and number of processes.

    Args:
        samples: their number; fewer than a batch make one small batch.
        batch: samples per step over all processes.
    """

    def __init__(self, samples: int, batch: int, seed: int) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0
        self.length = samples // batch * batch or samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.samples, generator=generator)[: self.length].tolist())
