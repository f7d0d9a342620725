"""decord as an optional back end that gives the frames PyAV gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmllm.data.backends import Backend, BackendFailure, PyAVBackend
from mmllm.data.containers import has_leading_frames

if TYPE_CHECKING:
    import decord

TRIED = ("mp4", "matroska", "avi")
"""Containers where decord decodes every frame; in transport streams it drops some, read from the start too."""
MANY_SECONDS = 1e9
"""No time stamp is larger; a lone broken one has no order to tell it by."""


class DecordBackend(Backend):
    """Random access where that gives the right frames, else one pass from the start.

    decord's random access silently returns other frames where its time stamps are not finite and increasing (some avi
    files), and where frames are stored behind a key frame but shown before it (open GOP, usual in HEVC). The header is
    PyAV's, so that the number of frames does not depend on the back end.
    """

    @classmethod
    def open(cls, path: str, fps: float | None = None) -> DecordBackend:
        """Open a video.

        Raises:
            UserError: PyAV cannot open it either.
            BackendFailure: decord is not installed, or fails on this file.
        """
        self = cls(path)
        with PyAVBackend.open(path) as reference:
            self.probe, self.slack, container = reference.probe, reference.slack, reference.format
        if not any(name in container for name in TRIED):
            raise BackendFailure(f"decord is not reliable in {container} files")
        try:
            import decord
        except ImportError as error:
            raise BackendFailure("decord is not installed") from error
        try:
            self._reader = self._open_reader()
            if not len(self._reader):
                raise BackendFailure("decord finds no frame in it")
            spans = self._reader.get_frame_timestamp(range(len(self._reader)))
        except (decord.DECORDError, OSError, RuntimeError) as error:
            raise BackendFailure(f"decord cannot open it ({_first_line(error)})") from error
        stamps = np.asarray(spans, np.float64)[:, 0]
        sane = np.isfinite(stamps).all() and (np.diff(stamps) > 0).all() and abs(stamps[0]) < MANY_SECONDS
        direct = sane and len(stamps) == self.probe.frames and not has_leading_frames(path)
        self._stamps = stamps - stamps[0] if direct else None
        return self

    def read_times(self, times: Sequence[float]) -> list[np.ndarray]:
        """See :class:`Backend`.

        Raises:
            BackendFailure: decord fails while decoding.
        """
        import decord

        # decord's time stamps are float32
        moments = np.asarray(times, np.float64) * (1 + 2.0**-22) + self.slack
        try:
            frames, stamps = self._sequential(moments) if self._stamps is None else self._random(moments)
        except (decord.DECORDError, OSError, RuntimeError, StopIteration) as error:
            raise BackendFailure(f"decord cannot decode it ({_first_line(error)})") from error
        shape = (self.probe.height, self.probe.width, 3)
        if any(frame.shape != shape for frame in frames):
            raise BackendFailure(f"decord gives frames of shape {frames[0].shape} instead of {shape}")
        self.last = float(stamps[-1])
        step = max(1 / self.probe.fps, float(np.diff(stamps).max(initial=0.0)))
        self.missing = int((moments >= self.last + step).sum())
        return frames

    def close(self) -> None:
        """Let the file go."""
        self._reader = None

    def _open_reader(self) -> decord.VideoReader:
        """A new decord reader at the start of the file."""
        import decord

        return decord.VideoReader(self.path, ctx=decord.cpu(0))

    def _random(self, moments: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Frames by random access, each decoded once; and all time stamps (seconds)."""
        places = np.maximum(np.searchsorted(self._stamps, moments, side="right") - 1, 0)
        unique, back = np.unique(places, return_inverse=True)
        batch = self._reader.get_batch(unique.tolist()).asnumpy()
        return [batch[place] for place in back], self._stamps

    def _sequential(self, moments: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Frames in one pass from the start, at constant rate; and the time stamps that follow from it."""
        places = np.floor(moments * self.probe.fps).astype(int)
        reader = self._reader if self._reader is not None else self._open_reader()
        self._reader = None
        wanted, kept, count = set(places.tolist()), {}, 0
        for count in range(min(len(reader), int(places.max()) + 1)):
            frame = reader.next()
            if count in wanted:
                kept[count] = frame.asnumpy()
        if not kept or int(places.max()) > count:
            kept[count] = frame.asnumpy()
        return [kept[min(place, count)] for place in places.tolist()], np.arange(count + 1) / self.probe.fps


def _first_line(error: BaseException) -> str:
    """decord's errors carry a stack; the first line says enough."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
