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
        place = bisect_left(self._only, moment - KEEP_AFTER * step)
        return place < len(self._only) and self._only[place] < moment + KEEP_BEFORE * step

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """See :class:`Backend`. ``missing`` counts the moments after the end of what decodes."""
        order = sorted(range(len(times)), key=times.__getitem__)
        wanted = [times[place] for place in order]
        sparse = len(wanted) * SPARSE < (wanted[-1] - wanted[0]) * self.probe.fps
        ways = [(True, False), (False, False)]
        if self._counted:
            del ways[0]
        elif sparse and self._stream.codec_context.name in SKIPS:
            ways.insert(0, (True, True))
        found: list[Any] = []
        for jump, skip in ways:
            self._only = wanted if skip else []
            try:
                self._walk(wanted, found, convert, jump)
                break
            except _Missed:
                log.debug("%s: reading it again (jump %s, skip %s)", self.path, jump, skip)
        if self._damage.packets:
            log.warning("%s: damage while decoding, %d packet(s) skipped", self.path, self._damage.packets)
        self.corrupt = self._damage.spans()
        values: list[Any] = [None] * len(times)
        for place, value in zip(order, found, strict=True):
            values[place] = value
        return values

    def _walk(self, wanted: list[float], found: list[Any], convert: Convert | None, jump: bool) -> None:
        """Append to ``found`` the values for the ascending moments that it lacks.

        Raises:
            _Missed: a frame may not be the wanted one; what was found so far is right.
        """
        ahead, step = self._from_start(), 1 / self.probe.fps
        shown, now, longest, looked, margin = None, 0.0, step, -1, None
        clock = None if self._counted else self._seconds
        while len(found) < len(wanted):
            frame = next(ahead, None)
            if frame is None:
                break
            before, now = now, self._time(frame, now, shown)
            due = bisect_left(wanted, now - self.slack, len(found)) - len(found)
            if due and shown is None and margin == MARGIN:
                # the key frame is shown just after the moment
                margin, now = WIDE_MARGIN, before
                ahead = self._sought(wanted[len(found)], margin)
                continue
            if due:
                if shown is None or (self._only and wanted[len(found) + due - 1] - before > 1.5 * step):
                    raise _Missed
                self._damage.take(shown, before, now, clock)
                found += [self._value(shown, convert)] * due
            if shown is not None:
                longest = max(longest, now - before)
            shown = frame
            self._damage.passes(frame, now, clock)
            if jump and looked < len(found) < len(wanted):
                looked = len(found)
                margin = self._margin(now, wanted[looked])
                if margin is not None:
                    shown, ahead = None, self._sought(wanted[looked], margin)
        for frame in islice(ahead, MARGIN if self._damage.open_end else 0):
            now = self._time(frame, now, shown)
            self._damage.passes(frame, now, clock)
            if not self._damage.open_end:
                break
        rest = len(wanted) - len(found)
        if rest and (shown is None or (self._only and wanted[-1] - now > 1.5 * step)):
            raise _Missed
        self.missing, self.last = 0, now
        if rest:
            end = now + max(longest, (shown.duration or 0) * self._tick) - self.slack
            if not self._only:
                self.missing = sum(moment >= end for moment in wanted[len(found) :])
            self._damage.take(shown, now, now, clock)
            found += [self._value(shown, convert)] * rest

    def _margin(self, now: float, moment: float) -> int | None:
        """Number of frames early that a jump to a moment should aim for; None if jumping does not pay."""
        # the index of key frames can be read since version 17
        index = getattr(self._stream, "index_entries", None)
        if not index or not any(name in self.format for name in JUMPS):
            return WIDE_MARGIN if moment - now > SEEK_FRAMES / self.probe.fps else None
        if moment - now <= (GAIN + MARGIN) / self.probe.fps:
            return None
        # the index of an mp4 is in decoding time, but a jump aims at display time
        delay = max(0, self._origin - index[0].timestamp)
        place = index.search_timestamp(self._aim(moment, MARGIN) - delay)
        key = index[max(0, place)].timestamp + delay - self._origin
        pays = place >= 0 and key * self._tick > now + GAIN / self.probe.fps
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
