"""Damage inside a video: which frames it reaches, and how it is reported or handled."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

OnDamage = Literal["error", "warn"]
"""What to do with a clip with damaged frames: refuse it, or read it with a warning."""
Spans = tuple[tuple[float, float], ...]
"""(first, last) seconds, ascending and disjoint."""
Clock = Callable[[int], float]
"""Converts the time stamps of a stream to seconds since its first frame."""
SHOWN = 5
"""Number of spans named in a message."""
INTRA, BIDIRECTIONAL = 1, 3
"""FFmpeg's types of pictures that are predicted from no other, and from others on both sides."""


class Damage:
    """Follows the frames of one decoder in display order and notes which of the frames taken may be damaged.

    A frame may be damaged if the decoder flags it or any frame back to the last key frame: errors in a frame carry over
    to those predicted from it, including the B-frames shown just before it. A packet that does not decode, or that the
    container flags, counts like a flagged frame.

    Attributes:
        packets: number of packets that did not decode since the decoder started at the beginning of the file.
    """

    def __init__(self) -> None:
        self.packets = 0
        self._taken: list[tuple[float, float]] = []
        self.restart()

    def restart(self) -> None:
        """The decoder continues somewhere else, at a key frame."""
        self._since: float | None = None
        self._last = -math.inf
        self._lost: list[int | None] = []
        # B-frames taken since the last frame of another type
        self._between: list[float] = []

    @property
    def open_end(self) -> bool:
        """Whether the last frame taken may be predicted from one that has not been shown yet."""
        return bool(self._between)

    def lose(self, pts: int | None) -> None:
        """A packet with this time stamp does not decode, or is flagged."""
        self._lost.append(pts)

    def passes(self, frame: av.VideoFrame, now: float, clock: Clock | None) -> None:
        """A frame is shown, at this time in seconds."""
        self._settle(now, clock)
        # damage is not ended by a key frame without intra coding (gradual refresh), nor by one before the loss
        if self._since is not None and now > self._last and frame.key_frame and frame.pict_type == INTRA:
            self._since, self._last = None, -math.inf
        if frame.is_corrupt:
            self._note(now)
            for moment in self._between:
                self._note(moment)
                self.take(frame, moment, now, clock)
        if self._between and frame.pict_type != BIDIRECTIONAL:
            self._between = []

    def take(self, frame: av.VideoFrame, moment: float, now: float, clock: Clock | None) -> None:
        """The frame shown at this moment is taken; the decoder has reached the moment `now` (seconds)."""
        self._settle(now, clock)
        if self._since is not None:
            self._taken.append((max(0.0, min(self._since, moment)), moment))
        elif frame.pict_type == BIDIRECTIONAL:
            self._between.append(moment)

    def _settle(self, now: float, clock: Clock | None) -> None:
        """Note the moments of lost packets, which are unknown until that of a file's first frame is known."""
        for pts in self._lost:
            self._note(now if pts is None or clock is None else clock(pts))
        self._lost.clear()

    def _note(self, moment: float) -> None:
        self._since = moment if self._since is None else min(self._since, moment)
        self._last = max(self._last, moment)

    def spans(self) -> Spans:
        """The seconds from where damage begins to the last taken frame that it may reach; forgotten afterwards."""
        merged: list[tuple[float, float]] = []
        for start, end in sorted(self._taken):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        self._taken = []
        return tuple(merged)


def check_choice(corrupt: str, backend: str, tells: bool) -> None:
    """Refuse an unknown choice, and `error` where the back end cannot detect damage.

    Raises:
        UserError: names the choices, or the alternative.
    """
    if corrupt not in get_args(OnDamage):
        raise UserError("corrupt", "unknown choice", expected="error or warn", got=corrupt)
    if corrupt == "error" and not tells:
        what = f"the back end {backend} does not detect damaged frames, so it cannot refuse any"
        raise UserError("corrupt error", what, hint="--backend pyav, or --corrupt warn")


def judge(where: str, spans: Spans, corrupt: OnDamage) -> None:
    """Warn about damaged frames, or refuse the clip.

    Raises:
        UserError: there are some, and `corrupt` is `error`.
    """
    if not spans:
        return
    if corrupt == "error":
        hint = "--corrupt warn to use them as they are, or make the file again"
        raise UserError(where, f"the video is damaged, {_reach(spans)}", hint=hint)
    log.warning("%s", describe(where, spans))


def describe(where: str, spans: Spans) -> str:
    """One line that names the file and the seconds."""
    return f"{where}: the video is damaged, {_reach(spans)}"


def _reach(spans: Sequence[tuple[float, float]]) -> str:
    texts = [f"{start:.2f}" if start == end else f"{start:.2f}-{end:.2f}" for start, end in spans[:SHOWN]]
    rest = f" and {len(spans) - SHOWN} more spans" if len(spans) > SHOWN else ""
    return f"which may reach the frames at {', '.join(texts)} s{rest}"
