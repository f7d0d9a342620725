"""Reading media: probe a header, decode the frames a sampler requests, and report plainly what is wrong with a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.registry import parts
from mmllm.data.media.backends.base import Backend, BackendFailure, Convert
from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.backends.stills import FolderBackend, ImageBackend
from mmllm.data.media.damage import OnDamage, check_choice, judge
from mmllm.data.media.limits import DEFAULTS, Limits
from mmllm.data.media.refs import check_bounds, check_path
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import Clip, MediaRef, Probe

log = logging.getLogger(__name__)

MISSING_SHARE = 0.05
"""Share of the requested frames that may be missing at the end of a file."""


def probe(ref: MediaRef, backend: str = "pyav", limits: Limits = DEFAULTS) -> Probe:
    """Read the header of a media file or folder.

    Raises:
        UserError: it is missing, empty, of the wrong kind, above a limit, or the bounds of ``ref`` do not fit it.
    """
    with VideoReader(ref, backend_class(backend).header_by or backend, limits) as reader:
        return reader.probe


def read_media(
    ref: MediaRef,
    sampling: Sampling,
    backend: str = "pyav",
    limits: Limits = DEFAULTS,
    convert: Convert | None = None,
    corrupt: OnDamage = "warn",
) -> Clip:
    """Read the frames that ``sampling`` takes from ``ref``: a clip of uint8 ``[T, H, W, 3]``, or of converted frames.

    Raises:
        UserError: see :class:`VideoReader`.
    """
    with VideoReader(ref, backend, limits, corrupt) as reader:
        return reader.read(sampling, convert)


def backend_class(name: str) -> type[Backend]:
    """The back end registered under a name.

    Raises:
        UserError: there is none; the message suggests the nearest names.
    """
    known = parts("backend")
    if name not in known:
        raise UserError("backend", f"unknown back end {name!r}", hint=nearest(str(name), list(known)))
    return known[name]


class VideoReader:
    """One open video, image or folder of frames; a context manager.

    Args:
        ref: what to read.
        backend: ``"pyav"`` (the reference), ``"decord"`` or the name of a registered one; only for video files.
        limits: caps on the cost of a file, checked against its header. The time limit needs a
            :class:`mmllm.data.media.guard.GuardedReader`.
        corrupt: what to do with a clip if frames taken from it may be damaged, as far as the decoder can tell:
            ``"warn"`` reads it and warns, ``"error"`` refuses it.

    Raises:
        UserError: unknown back end, or one that cannot detect the damage to refuse; a file that is missing,
            empty, damaged, above a limit, or of the wrong kind; bounds that do not fit the file.
    """

    def __init__(
        self, ref: MediaRef, backend: str = "pyav", limits: Limits = DEFAULTS, corrupt: OnDamage = "warn"
    ) -> None:
        opener = backend_class(backend)
        check_choice(corrupt, backend, opener.tells_damage)
        self.ref, self.limits, self.corrupt = ref, limits, corrupt
        try:
            kind = check_path(ref, limits)
            opener = {"image": ImageBackend, "folder": FolderBackend, "gif": PyAVBackend}.get(kind, opener)
            self._backend = opener.open(ref.path, ref.fps, limits)
        except BackendFailure as failure:
            self._fall_back(failure)
        except OSError as error:
            hint = "check the path and its permissions"
            raise UserError(
                ref.path[:200], f"the path cannot be read ({error.strerror or error})", hint=hint
            ) from error
        try:
            check_bounds(ref, self.probe)
        except UserError:
            self.close()
            raise

    @property
    def probe(self) -> Probe:
        """The header."""
        return self._backend.probe

    def read(self, sampling: Sampling, convert: Convert | None = None) -> Clip:
        """Frames of the requested part (``ref.start`` to ``ref.end``), as many as ``sampling.count`` says.

        Args:
            sampling: how many and where.
            convert: called once with each distinct frame, uint8 ``[H, W, 3]``, as it is decoded, so that full-size
                frames need not be held together; it may keep or change its argument.

        Returns:
            ``frames`` uint8 ``[T, H, W, 3]``, or with ``convert`` the list of its T values; ``times`` float64 ``[T]``
            in seconds since the start of the file.

        Raises:
            UserError: too many are missing at the end of the file, some are damaged and damage is to be refused,
                or they are above a limit.
        """
        bounds = (self.ref.start, self.ref.end)
        self.limits.check(self.ref, self.probe, sampling.count(self.probe, *bounds), held=convert is None)
        return self.read_indices(sampling.indices(self.probe, *bounds), convert)

    def read_indices(self, indices: Sequence[int], convert: Convert | None = None) -> Clip:
        """Frames ``[T, H, W, 3]`` at indices in ``[0, probe.frames)`` of the file, in any order, with repeats.

        Raises:
            UserError: an index outside the file, no index, too many frames missing, or a limit exceeded.
        """
        for index in indices:
            if not 0 <= index < self.probe.frames:
                raise UserError(
                    self.ref.describe(), "no such frame", expected=f"0 to {self.probe.frames - 1}", got=index
                )
        return self._deliver([index / self.probe.fps for index in indices], convert)

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> Clip:
        """The frames ``[T, H, W, 3]`` on screen at these seconds since the start of the file, in any order.

        Raises:
            UserError: a moment outside the file, no moment, too many frames missing, or a limit exceeded.
        """
        for moment in times:
            if not 0 <= moment <= self.probe.duration:
                span = f"0 to {self.probe.duration:.3f} seconds"
                raise UserError(self.ref.describe(), "no such moment", expected=span, got=moment)
        return self._deliver([float(moment) for moment in times], convert)

    def _deliver(self, times: list[float], convert: Convert | None) -> Clip:
        """Read the frames, and judge damage and missing frames at the end."""
        if not times:
            raise UserError(self.ref.describe(), "no frames asked for", hint="at least one index or time")
        self.limits.check(self.ref, self.probe, len(times), held=convert is None)
        try:
            frames = self._frames(times, convert)
        except BackendFailure as failure:
            self._fall_back(failure)
            frames = self._frames(times, convert)
        missing = self._backend.missing
        if missing:
            self._judge_missing(missing, times)
        judge(self.ref.describe(), self._backend.corrupt, self.corrupt)
        return Clip(frames, np.asarray(times, np.float64), missing, self._backend.corrupt)

    def _frames(self, times: list[float], convert: Convert | None) -> np.ndarray | list[Any]:
        """The stacked frames, or the list of what ``convert`` makes of them."""
        shape = (self.probe.height, self.probe.width, 3)
        keep = _Stack(len(times), shape) if convert is None else _own(convert)
        if convert is not None and self.probe.kind == "folder":  # files may differ in size
            return self._backend.read_times(times, keep)
        try:
            values = self._backend.read_times(times, _of_shape(shape, keep))
        except _WrongShape as error:
            if self.probe.kind == "folder":
                file, got = self._backend.reading, "x".join(map(str, error.args[0][:2]))
                expected = f"{shape[0]}x{shape[1]} (height x width)"
                what, hint = "the frames of a folder differ in size", "make all frames the size of the first one"
                raise UserError(file, what, expected=expected, got=got, hint=hint) from error
            what = f"the back end gives a picture of shape {error.args[0]} after a header of {shape}"
            raise UserError(self.ref.describe(), what, hint="read it with another back end") from error
        return values if convert is not None else keep.at(values)

    def _judge_missing(self, missing: int, times: list[float]) -> None:
        """Warn of a few missing frames, refuse many."""
        last, asked = self._backend.last, len(times)
        too_many = missing > max(1, int(MISSING_SHARE * asked))
        # a lone frame may be off by one in a header, not by seconds
        lone = missing == asked and max(times) - last > 2.5 / self.probe.fps
        found = f"the file ends at {last:.2f} s although its header says {self.probe.duration:.2f} s"
        if too_many or lone:
            hint = "copy or download it again, it is probably cut off"
            raise UserError(self.ref.describe(), f"{missing} of {asked} frames are missing, {found}", hint=hint)
        text = "%s: %d of %d frames are missing, %s; the last frame is repeated"
        log.warning(text, self.ref.describe(), missing, asked, found)

    def _fall_back(self, failure: BackendFailure) -> None:
        """Continue with PyAV and report it."""
        log.warning("%s: %s; reading it with pyav instead", self.ref.describe(), failure)
        self._backend = PyAVBackend.open(self.ref.path, limits=self.limits)

    def close(self) -> None:
        """Release the file."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _WrongShape(Exception):
    """The size of a picture differs from the header's."""


def _of_shape(shape: tuple[int, ...], keep: Convert) -> Convert:
    """``keep`` after a check of the picture's shape."""

    def checked(picture: np.ndarray) -> Any:
        if picture.shape != shape:
            raise _WrongShape(picture.shape)
        return keep(picture)

    return checked


def _own(convert: Convert) -> Convert:
    """``convert`` on contiguous, writable pictures."""

    def own(picture: np.ndarray) -> Any:
        flags = picture.flags
        return convert(picture if flags.c_contiguous and flags.writeable else picture.copy())

    return own


class _Stack:
    """Pictures copied into one array ``[T, H, W, 3]`` as they come; each is known by its number."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.frames, self.used = np.empty((count, *shape), np.uint8), 0

    def __call__(self, picture: np.ndarray) -> int:
        self.frames[self.used] = picture
        self.used += 1
        return self.used - 1

    def at(self, numbers: list[int]) -> np.ndarray:
        """The pictures with these numbers; nothing is copied if all came in order."""
        return self.frames if numbers == list(range(len(self.frames))) else self.frames[numbers]
