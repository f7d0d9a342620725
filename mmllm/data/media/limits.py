"""The cost limits of one file: checked against its header before anything of that size is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    from mmllm.data.media.types import MediaRef, Probe

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Caps of one read.

    Args:
        frames: frames that one read may request.
        pixels: pixels (height times width) of one frame or image.
        seconds: duration that a header may claim, in seconds.
        megabytes: millions of bytes of decoded frames that one read may hold at a time.
        timeout: seconds per file; enforced by :class:`mmllm.data.media.guard.GuardedReader`, since
            nothing inside a process can stop a decoder that hangs.

    Raises:
        UserError: a limit that is not a positive number.
    """

    frames: int = 4096
    pixels: int = 64_000_000
    seconds: float = 86_400.0
    megabytes: int = 8192
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Refuse meaningless limits."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"limits.{field.name}", "bad limit", expected="a positive number", got=value)

    def check(self, ref: MediaRef, probe: Probe, count: int, held: bool = True) -> None:
        """Refuse a read that would cost too much.

        Args:
            ref: what is read; it is named in the error.
            probe: its header.
            count: number of requested frames.
            held: whether all of them are kept at full size; False if each is converted as it comes.

        Raises:
            UserError: names the figure, the limit it exceeds, and what to do.
        """
        where = ref.describe()
        self.check_picture(where, probe.height, probe.width)
        self.check_duration(where, probe.duration)
        if count > self.frames:
            hint = "ask for fewer (frames, max_frames or a lower fps), or raise Limits(frames=)"
            raise UserError(where, "too many frames asked for", expected=f"at most {self.frames}", got=count, hint=hint)
        size = count * probe.height * probe.width * 3 / MEGABYTE
        if held and size > self.megabytes:
            raise UserError(
                where,
                "the frames would take too much memory",
                expected=f"at most {self.megabytes} MB",
                got=f"{size:.0f} MB ({count} frames of {probe.width}x{probe.height} pixels)",
                hint="ask for fewer frames, make the pictures smaller, or raise Limits(megabytes=)",
            )

    def check_picture(self, where: str, height: int, width: int) -> None:
        """Refuse a picture of too many pixels.

        Raises:
            UserError: states the size.
        """
        if height * width > self.pixels:
            raise UserError(
                where,
                "the header declares a picture that is too large",
                expected=f"at most {self.pixels} pixels",
                got=f"{height * width} pixels ({width}x{height})",
                hint="make the picture smaller, repair the header, or raise Limits(pixels=)",
            )

    def check_duration(self, where: str, seconds: float) -> None:
        """Refuse a header that claims too long a duration.

        Raises:
            UserError: states the duration.
        """
        if not seconds <= self.seconds:
            raise UserError(
                where,
                "the header declares a duration that is too long",
                expected=f"at most {self.seconds:g} s",
                got=f"{seconds:.6g} s",
                hint="cut the video, repair the header (copy the streams into a new file), or raise Limits(seconds=)",
            )


DEFAULTS = Limits()
"""The limits unless others are given."""
