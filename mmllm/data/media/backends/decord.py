"""decord as an optional back end that returns the same frames as PyAV."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.contract.registry import register
from mmllm.data.media.backends.base import Backend, BackendFailure, Convert
from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.containers import count_stored
from mmllm.data.media.limits import DEFAULTS, Limits

if TYPE_CHECKING:
    import decord

TRIED = ("mp4", "matroska", "avi")
"""Containers in which decord decodes every frame; in transport streams it drops some, even when read from the start."""
MANY_SECONDS = 1e9
"""Upper limit of a valid time stamp; a single broken one cannot be told by its order."""
CHUNK_BYTES = 16 << 20
"""The amount that is decoded at a time."""


@register("backend", "decord")
class DecordBackend(Backend):
    """Random access where that gives the right frames, otherwise one pass from the start.

    decord's random access silently returns wrong frames where its time stamps are not finite and increasing (some avi
    files), and where frames are stored after a key frame but shown before it (open GOP, usual in HEVC). It may hang
    where a file lacks frames that its header lists. The header is PyAV's, so that the number of frames does not depend
    on the back end.
    """

    package = "decord"
    header_by = "pyav"

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> DecordBackend:
        """Open a video.

        Raises:
            UserError: PyAV cannot open it either.
            BackendFailure: decord is not installed, or fails on this file.
        """
        self = cls(path, limits)
        with PyAVBackend.open(path, fps, limits) as reference:
            self.probe, self.slack, container = reference.probe, reference.slack, reference.format
            lying = reference.turns % 2
        if not any(name in container for name in TRIED):
            raise BackendFailure(f"decord is not reliable in {container} files")
        if lying:
            raise BackendFailure("decord cannot rotate pictures by 90 degrees")
        try:
            importlib.import_module("decord")
        except ImportError as error:
            raise BackendFailure("decord is not installed") from error
        except OSError as error:
            raise BackendFailure(f"decord does not load ({error})") from error
        stored, leading = count_stored(path, limits)
        if stored < self.probe.frames:
            raise BackendFailure(
                f"frames are missing ({stored} of {self.probe.frames} are stored), and decord may hang"
            )
        with _failures("open"):
            self._reader = self._open_reader()
            spans = self._reader.get_frame_timestamp(range(len(self._reader)))
        stamps = np.asarray(spans, np.float64)[:, 0]
        sane = np.isfinite(stamps).all() and (np.diff(stamps) > 0).all() and abs(stamps[0]) < MANY_SECONDS
        direct = sane and len(stamps) == self.probe.frames and not leading
        self._stamps = stamps - stamps[0] if direct else None
        return self

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """See :class:`Backend`.

        Raises:
            BackendFailure: decord fails while decoding; ``convert`` may already have been called.
        """
        # decord's time stamps are float32
        moments = np.asarray(times, np.float64) * (1 + 2.0**-22) + self.slack
        read = self._sequential if self._stamps is None else self._random
        values, stamps = read(moments, convert or (lambda picture: picture))
        self.last = float(stamps[-1])
        step = max(1 / self.probe.fps, float(np.diff(stamps).max(initial=0.0)))
        self.missing = int((moments >= self.last + step).sum())
        return values

    def close(self) -> None:
        """Release the file."""
        self._reader = None

    def _open_reader(self) -> decord.VideoReader:
        """A new decord reader at the start of the file."""
        import decord

        return decord.VideoReader(self.path, ctx=decord.cpu(0))

    def _random(self, moments: np.ndarray, keep: Convert) -> tuple[list[Any], np.ndarray]:
        """Values by random access, each picture decoded once; and all time stamps (seconds)."""
        indices = np.maximum(np.searchsorted(self._stamps, moments, side="right") - 1, 0)
        unique, back = np.unique(indices, return_inverse=True)
        step = max(1, CHUNK_BYTES // (self.probe.height * self.probe.width * 3))
        values: list[Any] = []
        for start in range(0, len(unique), step):
            with _failures("decode"):
                batch = self._reader.get_batch(unique[start : start + step].tolist()).asnumpy()
            self._check_shape(batch.shape[1:])
            values += [keep(picture) for picture in batch]
        return [values[index] for index in back.tolist()], self._stamps

    def _sequential(self, moments: np.ndarray, keep: Convert) -> tuple[list[Any], np.ndarray]:
        """Values in one pass from the start, at constant rate; and the time stamps implied by it."""
        indices = np.floor(moments * self.probe.fps).astype(int).tolist()
        reader = self._reader if self._reader is not None else self._open_reader()
        self._reader = None
        wanted, values, last = set(indices), {}, max(indices)
        for count in range(min(len(reader), last + 1)):
            with _failures("decode"):
                picture = reader.next()
                picture = picture.asnumpy() if count in wanted or count == len(reader) - 1 else None
            if picture is not None:
                self._check_shape(picture.shape)
                values[count] = keep(picture)
        return [values[min(index, count)] for index in indices], np.arange(count + 1) / self.probe.fps

    def _check_shape(self, found: tuple[int, ...]) -> None:
        """Refuse pictures whose size differs from the header's."""
        shape = (self.probe.height, self.probe.width, 3)
        if tuple(found) != shape:
            raise BackendFailure(f"decord gives frames of shape {tuple(found)} instead of {shape}")


@contextmanager
def _failures(verb: str) -> Iterator[None]:
    """Turn decord's errors into :class:`BackendFailure`; they carry a stack trace, whose first line says enough."""
    import decord

    try:
        yield
    except (decord.DECORDError, OSError, RuntimeError, AssertionError, StopIteration) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BackendFailure(f"decord cannot {verb} it ({reason})") from error
