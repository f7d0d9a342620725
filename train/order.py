"""The order in which a stage sees its samples, and what each of them may draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class Turns(Sequence):
    """A stage's samples in all of its epochs: item `epoch * len + index` is (number of a sample, epoch).

    An index says to which epoch it belongs, so that loader workers know it too.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, index = divmod(index, len(self.numbers))
        return self.numbers[index], epoch


def draw_key(seed: int, epoch: int, number: int) -> int:
    """A seed for whatever is drawn about a sample in an epoch, on any number of processes and workers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{number}".encode()).digest()[:7])


class EpochOrder(Sampler[int]):
    """Indices of an epoch's turns (see `Turns`): shuffled by seed and epoch, cut to whole batches.

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
        numbers = torch.randperm(self.samples, generator=generator)[: self.length]
        return iter((numbers + self.epoch * self.samples).tolist())
