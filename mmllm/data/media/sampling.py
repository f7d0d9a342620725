"""Which frames are taken: one sampler for training, evaluation and asking."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from mmllm.contract.arguments import Positive, Within
from mmllm.contract.errors import UserError, nearest
from mmllm.data.media.types import Probe

DEFAULT_FRAMES = 8
MOST_FRAMES = 65_536
"""Upper limit of frames per clip in a recipe."""


@dataclass(frozen=True)
class Sampling:
    """How many frames to take and where. The count is known from the header alone.

    Args:
        frames: a fixed number of frames. 8 if neither ``frames`` nor ``fps`` is given.
        fps: frames per second of the requested part; instead of ``frames``.
        max_frames: upper limit of the count.
        sampler: ``"uniform"`` (middle of equal segments), ``"linspace"`` (both ends included, truncated), ``"ends"``
            (likewise, rounded) or ``"midpoints"`` (middles of a rounded grid; short clips are stretched).

    Raises:
        UserError: both given, invalid numbers, or an unknown sampler.
    """

    frames: Annotated[int, Within(least=1, most=MOST_FRAMES)] | None = None
    fps: Positive | None = None
    max_frames: Annotated[int, Within(least=1, most=MOST_FRAMES)] | None = None
    sampler: str = "uniform"

    def __post_init__(self) -> None:
        """Check the values and fill in the default."""
        where = "sampling"
        if self.frames is not None and self.fps is not None:
            raise UserError(where, "frames and fps exclude each other", hint="set one of them to null")
        if self.frames is None and self.fps is None:
            object.__setattr__(self, "frames", min(DEFAULT_FRAMES, self.max_frames or DEFAULT_FRAMES))
        for name in ("frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{where}.{name}", "bad number of frames", expected="a whole number >= 1", got=value)
        if self.fps is not None and not _positive(self.fps):
            raise UserError(f"{where}.fps", "bad rate", expected="a positive number", got=self.fps)
        if self.frames and self.max_frames and self.frames > self.max_frames:
            got = f"frames={self.frames}, max_frames={self.max_frames}"
            raise UserError(where, "more frames than max_frames", got=got, hint="raise max_frames or lower frames")
        if self.sampler not in SAMPLERS:
            hint = nearest(str(self.sampler), list(SAMPLERS))
            raise UserError(f"{where}.sampler", f"unknown sampler {self.sampler!r}", hint=hint)

    def override(
        self,
        frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        sampler: str | None = None,
    ) -> Sampling:
        """This sampling with the given values in place of its own; a limit also applies to a number of frames.

        Raises:
            UserError: both frames and fps, or an unknown sampler.
        """
        if frames is None and fps is None:
            frames, fps = self.frames, self.fps
        if frames is not None:
            frames, most = min(frames, max_frames or frames), None
        else:
            most = max_frames or self.max_frames
        return Sampling(frames, fps, most, sampler or self.sampler)

    def count(self, probe: Probe, start: float | None = None, end: float | None = None) -> int:
        """The number of frames that will be delivered, from the header alone.

        Args:
            probe: the header of the file.
            start: first second requested, or None.
            end: last second requested, or None.
        """
        if probe.kind == "image":
            return 1
        if self.frames is not None:
            return self.frames
        low = min(max(start or 0.0, 0.0), probe.duration)
        high = probe.duration if end is None else min(max(end, low), probe.duration)
        wanted = max(1, round((high - low) * self.fps))
        return min(wanted, self.max_frames or wanted)

    def indices(self, probe: Probe, start: float | None = None, end: float | None = None) -> list[int]:
        """Frame indices in ``[0, probe.frames - 1]``, as many as :meth:`count` says, in the sampler's order.

        Bounds are clamped to the clip; frames repeat if more are requested than exist. Whether a bound makes sense
        is checked by the reader, which knows the file's name.
        """
        number = self.count(probe, start, end)
        # folders follow the reference, which counts files from 1
        first = 1 if probe.kind == "folder" else 0
        last = first + probe.frames - 1
        low = first if start is None else max(first, round(start * probe.fps))
        high = last if end is None else min(round(end * probe.fps), last)
        picked = SAMPLERS[self.sampler](low, high, number)
        return [min(max(index - first, 0), probe.frames - 1) for index in picked]


def _positive(value: object) -> bool:
    """Whether the value is a finite number above zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _uniform(low: int, high: int, number: int) -> list[int]:
    """The middles of equal segments, rounded half to even as the authors' code does."""
    step = (high - low) / number
    return [int(low + step / 2 + round(step * i)) for i in range(number)]


def _linspace(low: int, high: int, number: int) -> list[int]:
    """Evenly spaced with both ends, truncated."""
    # numpy's own arithmetic: a different order of operations truncates some points one lower
    import numpy as np

    return [int(value) for value in np.linspace(low, high, number)]


def _midpoints(low: int, high: int, number: int) -> list[int]:
    """The middles between neighbouring points of a rounded, even grid (LongVLM, ST-LLM); a short clip is stretched."""
    frames = high - low + 1
    if frames < number:
        return [low + index * frames // number for index in range(number)]
    step = (frames - 1) / number
    return [low + (round(step * index) + round(step * (index + 1))) // 2 for index in range(number)]


def _ends(low: int, high: int, number: int) -> list[int]:
    """Evenly spaced with both ends, rounded half to even (LLaVA-ST)."""
    if number == 1:
        return [(low + high) // 2]
    return [low + round(index / (number - 1) * (high - low)) for index in range(number)]


SAMPLERS: dict[str, Callable[[int, int, int], list[int]]] = {
    "uniform": _uniform,
    "linspace": _linspace,
    "midpoints": _midpoints,
    "ends": _ends,
}
"""name -> function(first index, last index, number) giving ``number`` indices."""
