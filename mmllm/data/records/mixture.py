"""Several sources as one sequence: one after the other, a part of one, or mixed by weight.

All of it is a pure function of the index, so it does not matter which worker or process requests a sample, in which
order, or after how many resumptions.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from itertools import accumulate, islice

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import Sample

ROUNDS = 6
MASK = (1 << 64) - 1


class Joined(Sequence):
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Sequence[Sample]]) -> None:
        self.sources = list(sources)
        self.ends = list(accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        source = bisect_right(self.ends, index)
        return self.sources[source][index - (self.ends[source - 1] if source else 0)]


class Subset(Sequence):
    """Some samples of a source: `count` from `start` on, in order or drawn without repeats.

    Args:
        seed: of the draw; None = in the order of the source.
    """

    def __init__(self, source: Sequence[Sample], start: int, count: int, seed: int | None = None) -> None:
        self.source, self.start, self.count, self.seed = source, start, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index = range(self.count)[index]
        if self.seed is not None:
            index = permuted(index, len(self.source) - self.start, self.seed)
        return self.source[self.start + index]


class Mixture(Sequence):
    """Sources mixed by weight.

    Every prefix of the mixture contains each source's share to within one sample, and a source repeats a sample only
    when all its others were taken; each pass over a source has its own order.

    Args:
        sources: what is mixed.
        weights: shares, relative to each other.
        length: total number of samples; default: as many as the sources have together.
        seed: of the orders.

    Raises:
        UserError: weights that are not positive numbers, or too few of them.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Sample]],
        weights: Sequence[float],
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(sources) != len(weights) or not all(is_positive(weight) for weight in weights):
            raise UserError("weights", "not a positive number for each source", got=list(weights))
        self.sources, self.seed = list(sources), seed
        self.length = sum(map(len, self.sources)) if length is None else length
        shares = [Fraction(weight).limit_denominator(10**6) for weight in weights]
        common = math.lcm(*(share.denominator for share in shares))
        whole = [max(1, int(share * common)) for share in shares]
        divisor = math.gcd(*whole)
        # the order of the sources is periodic, with the sum of the weights as its period
        self.weights = [weight // divisor for weight in whole]
        self.period = sum(self.weights)
        self.turn, self.number, taken = array("i"), array("q"), [0] * len(self.sources)
        for source in islice(interleave(self.weights), min(self.period, self.length)):
            self.turn.append(source)
            self.number.append(taken[source])
            taken[source] += 1

    def __len__(self) -> int:
        return self.length

    def locate(self, index: int) -> tuple[int, int]:
        """(source, index in it) of a sample."""
        periods, slot = divmod(range(self.length)[index], self.period)
        source = self.turn[slot]
        number = periods * self.weights[source] + self.number[slot]
        turns, item = divmod(number, len(self.sources[source]))
        return source, permuted(item, len(self.sources[source]), mixed(mixed(self.seed, source), turns))

    def __getitem__(self, index: int) -> Sample:
        source, item = self.locate(index)
        return self.sources[source][item]


def interleave(weights: Sequence[int]) -> Iterator[int]:
    """Indices of the sources for one period; every prefix contains each source's share to within one sample.

    For that, the j-th sample of a source with share p must have a position in [floor(j / p), ceil((j + 1) / p)). Taking
    the earliest deadline among the samples that are due meets all of them (Steiner and Yeomans, Level schedules
    for mixed-model, just-in-time processes, 1993).
    """
    period = sum(weights)
    waiting = [(0, source, 0) for source in range(len(weights))]
    heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, number = heappop(waiting)
            deadline = -(-(number + 1) * period // weights[source])
            heappush(ready, (deadline, source, number))
        _, source, number = heappop(ready)
        if number + 1 < weights[source]:
            heappush(waiting, ((number + 1) * period // weights[source], source, number + 1))
        yield source


def permuted(index: int, size: int, key: int) -> int:
    """The position of `index` in a permutation of `range(size)` that is fixed by `key`; nothing is stored.

    A Feistel network permutes the next power of four; a result outside the range is fed through it again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mixed(mixed(key, turn), right) & mask)
        index = left << half | right
        if index < size:
            return index


def mixed(key: int, value: int) -> int:
    """Two numbers hashed to one of 64 bits in which every bit depends on all of theirs."""
    state = (key * 0x9E3779B97F4A7C15 + value + 0xD1B54A32D192ED03) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor & MASK
    return state ^ state >> 31


def is_positive(weight: object) -> bool:
    """Whether this is a finite number above zero."""
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
