"""PyAV: the default back end and the reference for the others."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.data.media.backends.base import Backend, Convert
from mmllm.data.media.backends.pyav_walk import Walk
from mmllm.data.media.containers import count_packets, header_count, open_container, picture_stream
from mmllm.data.media.damage import Damage
from mmllm.data.media.limits import DEFAULTS, Limits
from mmllm.data.media.types import Probe

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

SEEK_FRAMES = 600
"""A gap between two wanted frames wider than this is jumped over if the file has no index of its key frames."""
MARGIN, WIDE_MARGIN = 4, 16
"""A jump aims this many frames early, then this many: indexes are in decoding time, which B-frames shift."""
GAIN = 12
"""A jump pays if it saves this many frames; it costs the decoder's threads a fresh start."""
SMALL_PIXELS = 16_000_000
"""Up to this many pixels in all frames together, one thread is faster than starting several."""
JUMPS = ("mp4", "matroska")
"""Containers whose index can be trusted to mark only true key frames as such."""
SKIPS = ("h264", "hevc")
"""Decoders that can skip frames that no others need, from one packet to the next."""
SPARSE = 8
"""If fewer than one in this many frames is wanted, skipping frames pays."""
KEEP_BEFORE, KEEP_AFTER = 2.5, 0.5
"""Frames around a wanted moment within which none is skipped."""
DAMAGED_PACKETS = 1000
"""After this many undecodable packets we give up."""


class _Missed(Exception):
    """A jump landed after the wanted frame, or that frame may have been skipped; read again the simple way."""


@register("backend", "pyav")
class PyAVBackend(Backend):
    """One forward pass over the wanted moments.

    It jumps to a key frame if one lies ahead, skips frames that are neither wanted nor needed by others, and converts
    only wanted pictures to RGB.
    """

    package = "av"
    tells_damage = True

    def __init__(self, path: str, limits: Limits = DEFAULTS) -> None:
        super().__init__(path, limits)
        import av
        from av.video.reformatter import VideoReformatter

        # one for all frames: a frame's own would rebuild its tables each time
        self._reformatter = VideoReformatter()
        self._container: av.container.InputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._first: av.VideoFrame | None = None
        self._ahead: Iterator[av.VideoFrame] | None = None
        self._fresh = False
        self._damage = Damage()
        # moments between which frames may be skipped
        self._only: list[float] = []
        # several threads for one small picture cost more than they save; not available before version 17
        self._scaling = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> PyAVBackend:
        """Open a video or GIF; the first frame is decoded, as only frames tell their rotation."""
        self = cls(path, limits)
        try:
            self._start()
            frames, rate = header_count(self._stream)
            if not frames:
                frames, rate = count_packets(self._container, self._stream, path)
                self._start()
            limits.check_duration(path, frames / rate)
            self._ahead = self._decoded()
            self._first = next(self._ahead, None)
            if self._first is None:
                hint = "play it elsewhere; copy or download it again if it is damaged there too"
                size = "" if self._stream.width and self._stream.height else ", its header gives no valid size"
                raise UserError(path, f"no frame of this video can be decoded{size}", hint=hint)
            self._fresh = True
            self._origin = self._first.pts or 0
            self._tick = float(self._stream.time_base)
            # half a tick absorbs the rounding of time stamps (1 ms in webm), and stays far below a frame
            self.slack = min(self._tick * 0.5, 0.1 / rate) + 1e-9
            # avi stores no display times: with B-frames they come out shuffled
            self.format = self._container.format.name
            shuffled = self.format == "avi" and self._stream.codec_context.has_b_frames
            self._counted = bool(shuffled or self._first.pts is None)
            self._clock = None if self._counted else self._seconds
            self.turns = round(self._first.rotation / 90) % 4
            size = (self._first.height, self._first.width)
            kind = "gif" if self.format == "gif" else "video"
            self.probe = Probe(kind, frames, rate, *(size[::-1] if self.turns % 2 else size))
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        """Open the file at its start, with one thread for a small one; refuse pictures that are too large."""
        self._close_container()
        self._container = open_container(self.path, self.limits)
        self._stream = stream = picture_stream(self._container, self.path)
        self._damage.restart()
        self._damage.packets = 0
        self.limits.check_picture(self.path, stream.height, stream.width)
        # the stream's own values may differ from its container's, and change midway
        stream.codec_context.options = {"max_pixels": str(int(self.limits.pixels))}
        small = 0 < stream.width * stream.height * stream.frames <= SMALL_PIXELS
        stream.thread_type = "NONE" if small else "AUTO"
        if small:
            stream.codec_context.thread_count = 1

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Frames from here on in display order; damaged packets are noted and skipped."""
        import av

        packets, context, packet = self._container.demux(self._stream), self._stream.codec_context, None
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                if packet.is_corrupt:
                    self._damage.lose(packet.pts)
                if self._only and packet.pts is not None:
                    context.skip_frame = "DEFAULT" if self._near(packet.pts) else "NONREF"
                yield from packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError):
                self._damage.lose(None if packet is None else packet.pts)
                self._damage.packets += 1
                if self._damage.packets > DAMAGED_PACKETS:
                    return

    def _near(self, pts: int) -> bool:
        """Whether the frame of this time stamp may be on screen at a wanted moment."""
        moment, step = self._seconds(pts), 1 / self.probe.fps
        index = bisect_left(self._only, moment - KEEP_AFTER * step)
        return index < len(self._only) and self._only[index] < moment + KEEP_BEFORE * step

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """See :class:`Backend`. ``missing`` counts the moments after the end of what decodes."""
        order = sorted(range(len(times)), key=times.__getitem__)
        wanted = [times[index] for index in order]
        sparse = len(wanted) * SPARSE < (wanted[-1] - wanted[0]) * self.probe.fps
        ways = [(True, False), (False, False)]
        if self._counted:
            del ways[0]
        elif sparse and self._stream.codec_context.name in SKIPS:
            ways.insert(0, (True, True))
        walk = Walk(wanted, convert)
        for jump, skip in ways:
            self._only = wanted if skip else []
            try:
                self._walk(walk, jump)
                break
            except _Missed:
                log.debug("%s: reading it again (jump %s, skip %s)", self.path, jump, skip)
        if self._damage.packets:
            log.warning("%s: damage while decoding, %d packet(s) skipped", self.path, self._damage.packets)
        self.corrupt = self._damage.spans()
        values: list[Any] = [None] * len(times)
        for index, value in zip(order, walk.found, strict=True):
            values[index] = value
        return values

    def _walk(self, walk: Walk, jump: bool) -> None:
        """Add the values at the moments that ``walk`` lacks.

        Raises:
            _Missed: a frame may not be the wanted one; what was found so far is right.
        """
        walk.restart(self._from_start(), 1 / self.probe.fps)
        while not walk.done:
            frame = next(walk.ahead, None)
            if frame is None:
                break
            before, walk.now = walk.now, self._time(frame, walk.now, walk.shown)
            due = walk.due(self.slack)
            if due and walk.shown is None and walk.margin == MARGIN:
                # the key frame is shown just after the moment
                walk.now = before
                self._jump(walk, WIDE_MARGIN)
                continue
            if due:
                self._take_due(walk, due, before)
            walk.show(frame, before)
            self._damage.passes(frame, walk.now, self._clock)
            if jump and walk.looks():
                margin = self._margin(walk.now, walk.next)
                if margin is not None:
                    self._jump(walk, margin)
        self._close_damage(walk)
        self._take_rest(walk)

    def _jump(self, walk: Walk, margin: int) -> None:
        walk.margin, walk.shown, walk.ahead = margin, None, self._sought(walk.next, margin)

    def _take_due(self, walk: Walk, due: int, before: float) -> None:
        """The frame on screen until ``walk.now`` is the one at ``due`` moments."""
        last = walk.wanted[len(walk.found) + due - 1]
        if walk.shown is None or (self._only and last - before > 1.5 / self.probe.fps):
            raise _Missed
        self._damage.take(walk.shown, before, walk.now, self._clock)
        walk.found += [self._value(walk.shown, walk.convert)] * due

    def _close_damage(self, walk: Walk) -> None:
        """Read on until it is known where damage ends."""
        for frame in islice(walk.ahead, MARGIN if self._damage.open_end else 0):
            walk.now = self._time(frame, walk.now, walk.shown)
            self._damage.passes(frame, walk.now, self._clock)
            if not self._damage.open_end:
                break

    def _take_rest(self, walk: Walk) -> None:
        """The last frame is the one at the moments that are left; those behind its end are missing."""
        rest = walk.wanted[len(walk.found) :]
        if rest and (walk.shown is None or (self._only and rest[-1] - walk.now > 1.5 / self.probe.fps)):
            raise _Missed
        self.missing, self.last = 0, walk.now
        if rest:
            end = walk.now + max(walk.longest, (walk.shown.duration or 0) * self._tick) - self.slack
            if not self._only:
                self.missing = sum(moment >= end for moment in rest)
            self._damage.take(walk.shown, walk.now, walk.now, self._clock)
            walk.found += [self._value(walk.shown, walk.convert)] * len(rest)

    def _margin(self, now: float, moment: float) -> int | None:
        """Number of frames early that a jump to a moment should aim for; None if jumping does not pay."""
        # the index of key frames can be read since version 17
        entries = getattr(self._stream, "index_entries", None)
        if not entries or not any(name in self.format for name in JUMPS):
            return WIDE_MARGIN if moment - now > SEEK_FRAMES / self.probe.fps else None
        if moment - now <= (GAIN + MARGIN) / self.probe.fps:
            return None
        # the index of an mp4 is in decoding time, but a jump aims at display time
        delay = max(0, self._origin - entries[0].timestamp)
        index = entries.search_timestamp(self._aim(moment, MARGIN) - delay)
        key = entries[max(0, index)].timestamp + delay - self._origin
        pays = index >= 0 and key * self._tick > now + GAIN / self.probe.fps
        return MARGIN if pays else None

    def _aim(self, moment: float, margin: int) -> int:
        """Where to look for the key frame from which a moment (seconds) is reached; in the stream's time."""
        return int(max(0.0, moment - margin / self.probe.fps) / self._tick) + self._origin

    def _from_start(self) -> Iterator[av.VideoFrame]:
        """Decoded frames from the first one; the file is reopened unless it is still at its first frame."""
        if not self._fresh:
            self._start()
            return self._decoded()
        self._fresh, ahead, self._ahead = False, self._ahead, None
        return chain([self._first], ahead)

    def _sought(self, moment: float, margin: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame before the moment (seconds).

        Those stored after it but shown before it are left out: they need frames from before the jump.
        """
        import av

        try:
            self._damage.restart()
            self._container.seek(self._aim(moment, margin), stream=self._stream)
        except (av.error.FFmpegError, OSError) as error:
            raise _Missed from error
        return dropwhile(lambda frame: not frame.key_frame, self._decoded())

    def _seconds(self, pts: int) -> float:
        """Seconds since the first frame."""
        return (pts - self._origin) * self._tick

    def _time(self, frame: av.VideoFrame, now: float, shown: av.VideoFrame | None) -> float:
        """Seconds since the first frame; counted if the time stamps are unusable."""
        if frame.pts is not None and not self._counted:
            return self._seconds(frame.pts)
        if shown is None and frame is not self._first and not self._counted:
            raise _Missed
        return 0.0 if shown is None else now + 1 / self.probe.fps

    def _value(self, frame: av.VideoFrame, convert: Convert | None) -> Any:
        """RGB uint8 ``[H, W, 3]``, upright and in the size of the first frame; or what ``convert`` makes of it."""
        size = {"width": self._first.width, "height": self._first.height}
        picture = self._reformatter.reformat(frame, format="rgb24", **size, **self._scaling).to_ndarray()
        if self.turns:
            picture = np.rot90(picture, self.turns)
        return convert(picture) if convert else picture

    def close(self) -> None:
        """Release the file, and the decoder's buffers, which our generator would keep until garbage collection."""
        self._ahead = self._first = None
        self._close_container()

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
