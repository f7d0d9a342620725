"""What PyAV's one pass over a file knows on its way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmllm.data.media.backends.base import Convert

if TYPE_CHECKING:
    import av


@dataclass
class Walk:
    """A pass over frames in display order that picks those on screen at ascending moments.

    Attributes:
        wanted: the moments, in seconds.
        convert: what is called with each picked picture.
        found: the values at the first moments.
        ahead: the frames that come.
        shown: the frame on screen, None before the first one and behind a jump.
        now: when it came on screen.
        longest: longest time that a frame stayed.
        margin: how many frames early the last jump aimed, None before the first one.
    """

    wanted: list[float]
    convert: Convert | None
    found: list[Any] = field(default_factory=list)
    ahead: Iterator[av.VideoFrame] = field(default_factory=lambda: iter(()))
    shown: av.VideoFrame | None = None
    now: float = 0.0
    longest: float = 0.0
    margin: int | None = None
    _looked: int = -1

    def restart(self, ahead: Iterator[av.VideoFrame], step: float) -> None:
        """Begin anew at the first frame; what was found stays."""
        self.ahead, self.shown, self.now, self.longest, self.margin, self._looked = ahead, None, 0.0, step, None, -1

    @property
    def done(self) -> bool:
        """Whether nothing is wanted any more."""
        return len(self.found) == len(self.wanted)

    @property
    def next(self) -> float:
        """The first moment that is still wanted."""
        return self.wanted[len(self.found)]

    def due(self, slack: float) -> int:
        """How many moments lie before the frame that comes now."""
        return bisect_left(self.wanted, self.now - slack, len(self.found)) - len(self.found)

    def show(self, frame: av.VideoFrame, before: float) -> None:
        """This frame comes on screen; the one before it was there since ``before``."""
        if self.shown is not None:
            self.longest = max(self.longest, self.now - before)
        self.shown = frame

    def looks(self) -> bool:
        """Whether to look for a jump: once for each moment that becomes the next one."""
        if self.done or self._looked == len(self.found):
            return False
        self._looked = len(self.found)
        return True
