"""The order in which a stage sees its samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Sample numbers of an epoch: shuffled by seed and epoch, cut to whole batches.

    The cut comes after the shuffle, so that no sample is left out for good. The length is the same for every
    micro-batch and number of processes, and so are the steps of an epoch.

    Args:
        samples: how many there are; fewer than a batch make one small batch.
        batch: samples of one step over all processes.
    """

    def __init__(self, samples: int, batch: int, seed: int) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0
        self.length = samples // batch * batch or samples

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is asked for next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.samples, generator=generator)[: self.length].tolist())
