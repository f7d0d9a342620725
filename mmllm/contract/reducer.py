"""The base class of reducers: which visual tokens the LLM keeps, at its door and after its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmllm.contract.types import VisualTokens


@dataclass(frozen=True)
class Schedule:
    """What share of the visual tokens each layer reads.

    Attributes:
        door: share that enters the first layer.
        after: for each layer, the share of those that entered the first layer which is kept after it; never rises.
    """

    door: float
    after: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Visual tokens averaged over the layers, as a share of all: the budget that this schedule spends."""
        entering = (1.0, *self.after[:-1])
        return self.door * sum(entering) / len(entering)

    def counts(self, visual: int, protected: int) -> list[int]:
        """Visual tokens kept after each layer, of `visual` that entered the first one beside `protected` others.

        The sum with the others is cut to a whole number, as in AIM's code; it differs from cutting the product where
        the share is no binary fraction.
        """
        return [int(visual * share + protected) - protected for share in self.after]


@dataclass(frozen=True)
class Entered:
    """What a reducer lets through the LLM's door, of one medium.

    Attributes:
        index: [M], ascending: the places that stay.
        values: [M, D], what is read there.
        source: [N], for every token the entry of `index` that it went into; -1 where it was dropped.
    """

    index: Tensor
    values: Tensor
    source: Tensor


class Reducer:
    """Fewer visual tokens, chosen per sample. A load-time setting with no weights of its own.

    Every reducer is given a budget, `keep`: visual tokens averaged over the LLM's layers, as a share of all. It solves
    its own schedule for that.
    """

    kind: ClassVar[str] = ""
    registered_name: ClassVar[str] = ""
    cls_attention: ClassVar[bool] = False
    """Whether tokens shall bring along the attention of the tower's CLS token, as an extra of that name."""
    shrink: float | None = None
    """Share of the side of each frame that the encoders shall read; the tokens then bring along `present`, [B, N] bool:
    the places at which they are, among as many as there would be otherwise."""

    def schedule(self, layers: int) -> Schedule:
        """The shares that this reducer keeps in an LLM of so many layers.

        Raises:
            ValueError: the budget cannot be met; the message says what can.
        """
        raise NotImplementedError

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """At the LLM's door, for one medium [1, N, D]; None = everything enters as it is."""
        return None

    def score(self, q: Tensor, k: Tensor, visual: Tensor, voting: Tensor) -> Tensor:
        """The importance of every token of one sample [n]; the layer keeps the visual ones that score highest.

        Args:
            q: queries [H, n, d] of the layer, after rotation.
            k: keys [H', n, d], not repeated.
            visual: [n] bool.
            voting: [n] bool, tokens that later ones can see; all of them where tokens are really dropped.
        """
        raise NotImplementedError


def frames_of(tokens: VisualTokens) -> list[Sequence[int]]:
    """The frames of one medium, or an image's only one, without separators: by the grid, or as runs of equal time."""
    if tokens.grid is not None and tokens.grid.tokens == tokens.values.shape[1]:
        size = tokens.grid.h * tokens.grid.w
        return [range(start, start + size) for start in range(0, tokens.grid.tokens, size)]
    times, sizes = tokens.positions[0, :, 0].tolist(), tokens.sizes[0].tolist()
    frames: list[list[int]] = []
    before = None
    for place, (time, size) in enumerate(zip(times, sizes, strict=True)):
        if size == 0:
            continue
        if time != before:
            frames.append([])
        frames[-1].append(place)
        before = time
    return frames
