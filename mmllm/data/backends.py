"""Decoders behind one small interface. PyAV is the default and the reference for the others.

A back end is asked for moments (seconds since the first frame) and gives for each the last frame that is on screen
then: the last with ``pts - pts0 <= t``. Index ``i`` means the moment ``i / fps``, which in a file of constant frame
rate is exactly the i-th frame in display order.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.data.containers import count_packets, header_count, open_container, picture_stream
from mmllm.data.media import Probe

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

SEEK_FRAMES = 600
"""A wider gap than this between two wanted frames is jumped over; below, decoding on is as fast and simpler."""
SEEK_MARGIN = 16
"""A jump aims this many frames early: indexes are ordered by decoding time, which B-frames shift."""
SMALL_PIXELS = 16_000_000
"""Up to this many pixels in all frames together one thread is faster than starting several."""


class BackendFailure(Exception):
    """An optional back end cannot read this file; the reader falls back to PyAV and says so."""


class Backend:
    """One open media file: ``probe``, ``read`` in any order with repeats, ``close``; a context manager.

    Attributes:
        probe: what the header says.
        missing: how many moments of the last read lie behind everything that could be decoded; the last decoded
            frame stands in for them.
        last: seconds of that last decoded frame, where ``missing`` is not 0.
    """

    probe: Probe
    missing: int = 0
    last: float = 0.0

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str, fps: float | None = None) -> Self:
        """Open a file or folder and read its header.

        Args:
            path: an existing local path.
            fps: frames per second of a folder of frames; other back ends ignore it.

        Raises:
            UserError: it cannot be opened.
        """
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames at indices in ``[0, probe.frames)``: uint8 ``[H, W, 3]`` each; equal indices share an array."""
        return self.read_times([index / self.probe.fps for index in indices])

    def read_times(self, times: Sequence[float]) -> list[np.ndarray]:
        """Frames on screen at these moments (seconds since the first frame): uint8 ``[H, W, 3]`` each."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the file go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _SeekMissed(Exception):
    """A jump landed behind the wanted frame; read again without jumping."""


class PyAVBackend(Backend):
    """The reference: one forward pass over the wanted moments, jumping over wide gaps."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        self._container: av.container.InputContainer | None = None
        self._stream: av.VideoStream
        self._first: av.VideoFrame | None = None
        self._fresh = False

    @classmethod
    def open(cls, path: str, fps: float | None = None) -> PyAVBackend:
        """Open a video or GIF; the first frame is decoded, as only frames say how they are rotated."""
        self = cls(path)
        self._start()
        try:
            frames, rate = header_count(self._stream)
            if not frames:
                frames, rate = count_packets(self._container, self._stream, path)
                self._start()
            self._ahead = self._decoded()
            self._first = next(self._ahead, None)
            if self._first is None:
                hint = "play it elsewhere; copy or download it again if it is damaged there too"
                raise UserError(path, "no frame of this video can be decoded", hint=hint)
            self._fresh = True
            self._origin = self._first.pts or 0
            self._tick = float(self._stream.time_base)
            # half a tick takes up the rounding of time stamps (1 ms in webm), and stays far below a frame
            self.slack = min(self._tick * 0.5, 0.1 / rate) + 1e-9
            # avi stores no display times: with B-frames they come out shuffled
            self.format = self._container.format.name
            shuffled = self.format == "avi" and self._stream.codec_context.has_b_frames
            self._counted = bool(shuffled or self._first.pts is None)
            self._turns = round(self._first.rotation / 90) % 4
            size = (self._first.height, self._first.width)
            kind = "gif" if self.format == "gif" else "video"
            self.probe = Probe(kind, frames, rate, *(size[::-1] if self._turns % 2 else size))
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        """Open the file at its start, with one thread for a small one."""
        self.close()
        self._container = open_container(self.path)
        self._stream = stream = picture_stream(self._container, self.path)
        self._damaged = 0
        small = 0 < stream.width * stream.height * stream.frames <= SMALL_PIXELS
        stream.thread_type = "NONE" if small else "AUTO"
        if small:
            stream.codec_context.thread_count = 1

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Frames from here on in display order; damaged packets are counted and left out."""
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                yield from packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError):
                self._damaged += 1
                if self._damaged > 1000:
                    return

    def read_times(self, times: Sequence[float]) -> list[np.ndarray]:
        """See :class:`Backend`. ``missing`` counts the moments behind the end of what decodes."""
        order = sorted(range(len(times)), key=times.__getitem__)
        wanted = [times[place] for place in order]
        try:
            found = self._walk(wanted, float("inf") if self._counted else SEEK_FRAMES / self.probe.fps)
        except _SeekMissed:
            found = self._walk(wanted, float("inf"))
        if self._damaged:
            log.warning("%s: damage while decoding, %d packet(s) skipped", self.path, self._damaged)
        frames: list[np.ndarray] = [found[0]] * len(times)
        for place, frame in zip(order, found, strict=True):
            frames[place] = frame
        return frames

    def _walk(self, wanted: list[float], jump: float) -> list[np.ndarray]:
        """Frames at ascending moments; gaps of more than ``jump`` seconds are sought over."""
        ahead = self._from_start()
        found: list[np.ndarray] = []
        shown, now, longest, sought = None, 0.0, 1 / self.probe.fps, -1
        while len(found) < len(wanted):
            frame = next(ahead, None)
            if frame is None:
                break
            before, now = now, self._time(frame, now, shown)
            due = bisect_left(wanted, now - self.slack, len(found)) - len(found)
            if due:
                if shown is None:
                    raise _SeekMissed
                found += [self._picture(shown)] * due
            if shown is not None:
                longest = max(longest, now - before)
            shown = frame
            if len(found) < len(wanted) and wanted[len(found)] - now > jump and sought < len(found):
                sought, shown, ahead = len(found), None, self._sought(wanted[len(found)])
        rest = len(wanted) - len(found)
        if rest and shown is None:
            raise _SeekMissed
        end = now + max(longest, (shown.duration or 0) * self._tick) - self.slack
        self.missing, self.last = sum(moment >= end for moment in wanted[len(found) :]), now
        return found + [self._picture(shown)] * rest if rest else found

    def _from_start(self) -> Iterator[av.VideoFrame]:
        """Decoded frames from the first one; the file is opened anew unless it still stands at its first frame."""
        if not self._fresh:
            self._start()
            return self._decoded()
        self._fresh = False
        return chain([self._first], self._ahead)

    def _sought(self, moment: float) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame before the moment (seconds)."""
        import av

        try:
            start = max(0.0, moment - SEEK_MARGIN / self.probe.fps)
            self._container.seek(int(start / self._tick) + self._origin, stream=self._stream)
        except (av.error.FFmpegError, OSError) as error:
            raise _SeekMissed from error
        return self._decoded()

    def _time(self, frame: av.VideoFrame, now: float, shown: av.VideoFrame | None) -> float:
        """Seconds since the first frame; counted where the time stamps are no good."""
        if frame.pts is not None and not self._counted:
            return (frame.pts - self._origin) * self._tick
        if shown is None and frame is not self._first and not self._counted:
            raise _SeekMissed
        return 0.0 if shown is None else now + 1 / self.probe.fps

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB uint8 ``[H, W, 3]``, upright and of the size of the first frame."""
        # One reformatter for all frames: a frame's own would set up its tables anew each time.
        size = {"width": self._first.width, "height": self._first.height}
        picture = self._reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
        return np.rot90(picture, self._turns) if self._turns else picture

    def close(self) -> None:
        """Let the file go."""
        if self._container is not None:
            self._container.close()
            self._container = None
