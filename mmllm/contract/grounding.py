"""Places and moments in a medium, and the vocabulary of coordinates in which a model reads and writes them.

Source: LLaVA-ST (Li et al. 2025, arXiv 2501.08282): one token for each bin of time, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from torch import Tensor

from mmllm.contract.arguments import Within

Axis = Literal["time", "height", "width"]
AXES: tuple[Axis, ...] = ("time", "height", "width")
NAMES: dict[Axis, str] = {"time": "TEMP", "height": "HEIGHT", "width": "WIDTH"}
"""What the tokens of an axis are called: `<TEMP-012>`."""
AXIS_OF: dict[str, Axis] = {name: axis for axis, name in NAMES.items()}
SIDES: tuple[Axis, ...] = ("width", "height", "width", "height")
"""The axes of a box's sides: left, top, right, bottom."""
EXACT = 1e-6
"""A place that is nearer to a bin than this part of one is at the bin."""
Bins = Annotated[int, Within(least=2, most=1000)]


@dataclass(frozen=True)
class Box:
    """A rectangle in a frame.

    Attributes:
        x0, y0: its upper left corner, as shares of width and height.
        x1, y1: its lower right corner.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """A share of the frame; 0 where the corners are the wrong way round."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 where neither has an area."""
        both = Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area
        union = self.area + other.area - both
        return both / union if union > 0 else 0.0


@dataclass(frozen=True)
class TimeSpan:
    """A part of a clip.

    Attributes:
        start, end: seconds, or shares of the clip where a model says so.
    """

    start: float
    end: float

    def iou(self, other: TimeSpan) -> float:
        """Intersection over union; two equal moments are the same, however short."""
        both = max(0.0, min(self.end, other.end) - max(self.start, other.start))
        union = max(0.0, self.end - self.start) + max(0.0, other.end - other.start) - both
        return both / union if union > 0 else float(self == other)


@dataclass(frozen=True)
class Tube:
    """A thing's way through a clip: where it is, moment by moment.

    Attributes:
        boxes: (moment, box) in the order of time; moments in the unit of a `TimeSpan`.
    """

    boxes: tuple[tuple[float, Box], ...]

    @property
    def span(self) -> TimeSpan:
        """From the first to the last moment; nothing at 0 for an empty tube."""
        return TimeSpan(self.boxes[0][0], self.boxes[-1][0]) if self.boxes else TimeSpan(0.0, 0.0)


@dataclass(frozen=True)
class Coordinates:
    """Which token stands for which bin: ids `first`, `first + 1`, ... in the order of time, height and width.

    The ids are those of the tokenizer, so they may lie among the rows that an LLM's table has to spare, or behind it.
    A row is a token's number among them, from 0.

    Args:
        type: "coordinates".
        time, height, width: bins of each axis.
        first: id of the first token; None = not known yet.
    """

    type: Literal["coordinates"] = "coordinates"
    time: Bins = 100
    height: Bins = 100
    width: Bins = 100
    first: Annotated[int, Within(least=0)] | None = None

    def __len__(self) -> int:
        return self.time + self.height + self.width

    def bins(self, axis: Axis) -> int:
        """Of an axis."""
        return getattr(self, axis)

    def offset(self, axis: Axis) -> int:
        """The first row of an axis."""
        return sum(self.bins(before) for before in AXES[: AXES.index(axis)])

    def tokens(self) -> Iterator[str]:
        """All tokens, row by row."""
        for axis in AXES:
            for number in range(self.bins(axis)):
                yield self.token(axis, number)

    @staticmethod
    def token(axis: Axis, number: int) -> str:
        """How a bin is written."""
        return f"<{NAMES[axis]}-{number:03d}>"

    def place(self, row: int) -> tuple[Axis, float]:
        """(axis, share in 0..1) of a row."""
        for axis in AXES:
            if row < self.bins(axis):
                return axis, row / (self.bins(axis) - 1)
            row -= self.bins(axis)
        raise IndexError(row)

    def rows(self, axis: Axis, share: float) -> tuple[int, int, float]:
        """(lower row, upper row, how far between them) of a share of the axis, which is clipped to 0..1."""
        at = min(max(share, 0.0), 1.0) * (self.bins(axis) - 1)
        first, nearest = self.offset(axis), round(at)
        if abs(at - nearest) < EXACT:
            return first + nearest, first + nearest, 0.0
        low = math.floor(at)
        return first + low, first + low + 1, at - low

    def nearest(self, axis: Axis, share: float) -> int:
        """The row nearest to a share of the axis."""
        low, high, ratio = self.rows(axis, share)
        return high if ratio >= 0.5 else low

    def written(self, axis: Axis, share: float) -> str:
        """The token nearest to a share of the axis."""
        return self.token(axis, self.nearest(axis, share) - self.offset(axis))

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row of each token, -1 for a token that is none of these."""
        rows = ids - self.first
        return rows.masked_fill((rows < 0) | (rows >= len(self)), -1)


class Tables(NamedTuple):
    """What the tables hold, for one forward.

    Attributes:
        inputs: [rows, D], what enters the LLM for a token.
        outputs: [rows, D], what its logit is the product with.
        layout: which rows are whose.
    """

    inputs: Tensor
    outputs: Tensor
    layout: Coordinates

    def aligned(self, axis: Axis) -> Tensor:
        """[bins, D]: the mean of what a bin is read and written as, for positions of visual tokens."""
        first = self.layout.offset(axis)
        rows = slice(first, first + self.layout.bins(axis))
        return (self.inputs[rows] + self.outputs[rows]) / 2
