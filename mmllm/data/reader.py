"""Reading media: probe a header, decode the frames a sampler asks for, and say plainly what is wrong with a file."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mmllm.contract.errors import UserError, nearest
from mmllm.data.backends import Backend, BackendFailure, PyAVBackend
from mmllm.data.decord_backend import DecordBackend
from mmllm.data.media import VIDEO_SUFFIXES, Clip, MediaRef, Probe, kind_of
from mmllm.data.sampling import Sampling
from mmllm.data.stills import FolderBackend, ImageBackend

log = logging.getLogger(__name__)

BACKENDS: dict[str, type[Backend]] = {"pyav": PyAVBackend, "decord": DecordBackend}
"""name -> back end for video files; images, GIFs and folders have one back end each."""

MISSING_SHARE = 0.05
"""Share of the frames asked for that may be missing at the end of a file."""


def probe(ref: MediaRef, backend: str = "pyav") -> Probe:
    """Read the header of a media file or folder.

    Raises:
        UserError: it is missing, empty, not what it should be, or the bounds of ``ref`` do not fit it.
    """
    _check_backend(backend)
    # a header does not depend on the back end, and PyAV reads it fastest
    with VideoReader(ref) as reader:
        return reader.probe


def read_media(ref: MediaRef, sampling: Sampling, backend: str = "pyav") -> Clip:
    """Read the frames that ``sampling`` takes of ``ref``: a clip of uint8 ``[T, H, W, 3]``.

    Raises:
        UserError: see :class:`VideoReader`.
    """
    with VideoReader(ref, backend) as reader:
        return reader.read(sampling)


class VideoReader:
    """One open video, image or folder of frames; a context manager.

    Args:
        ref: what to read.
        backend: ``"pyav"`` (the reference) or ``"decord"``; only for video files.

    Raises:
        UserError: unknown back end; a file that is missing, empty, damaged, or not what it should be; bounds that do
            not fit the file.
    """

    def __init__(self, ref: MediaRef, backend: str = "pyav") -> None:
        _check_backend(backend)
        self.ref = ref
        try:
            kind = _check_path(ref)
        except OSError as error:
            hint = "check the path and its permissions"
            raise UserError(ref.path[:200], f"the path cannot be read ({error.strerror})", hint=hint) from error
        opener = {"image": ImageBackend, "folder": FolderBackend, "gif": PyAVBackend}.get(kind, BACKENDS[backend])
        try:
            self._backend = opener.open(ref.path, ref.fps)
        except BackendFailure as failure:
            self._fall_back(failure)
        try:
            _check_bound(ref, self.probe)
        except UserError:
            self.close()
            raise

    @property
    def probe(self) -> Probe:
        """The header."""
        return self._backend.probe

    def read(self, sampling: Sampling) -> Clip:
        """Frames of the part that is meant (``ref.start`` to ``ref.end``), as many as ``sampling.count`` says.

        Returns:
            ``frames`` uint8 ``[T, H, W, 3]``, ``times`` float64 ``[T]`` in seconds since the start of the file.

        Raises:
            UserError: too many of them are missing at the end of the file.
        """
        return self.read_indices(sampling.indices(self.probe, self.ref.start, self.ref.end))

    def read_indices(self, indices: Sequence[int]) -> Clip:
        """Frames ``[T, H, W, 3]`` at indices in ``[0, probe.frames)`` of the file, in any order, with repeats.

        Raises:
            UserError: an index outside the file, none at all, or too many missing.
        """
        for index in indices:
            if not 0 <= index < self.probe.frames:
                raise UserError(
                    self.ref.describe(), "no such frame", expected=f"0 to {self.probe.frames - 1}", got=index
                )
        return self._deliver([index / self.probe.fps for index in indices])

    def read_times(self, times: Sequence[float]) -> Clip:
        """The frames ``[T, H, W, 3]`` on screen at these seconds since the start of the file, in any order.

        Raises:
            UserError: a moment outside the file, none at all, or too many missing.
        """
        for moment in times:
            if not 0 <= moment <= self.probe.duration:
                span = f"0 to {self.probe.duration:.3f} seconds"
                raise UserError(self.ref.describe(), "no such moment", expected=span, got=moment)
        return self._deliver([float(moment) for moment in times])

    def _deliver(self, times: list[float]) -> Clip:
        """Read, judge what is missing at the end, and stack."""
        if not times:
            raise UserError(self.ref.describe(), "no frames asked for", hint="at least one index or time")
        try:
            frames = self._backend.read_times(times)
        except BackendFailure as failure:
            self._fall_back(failure)
            frames = self._backend.read_times(times)
        missing = self._backend.missing
        if missing:
            self._judge_missing(missing, times)
        return Clip(np.stack(frames), np.asarray(times, np.float64), missing)

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
        """Go on with PyAV and say so."""
        log.warning("%s: %s; reading it with pyav instead", self.ref.describe(), failure)
        self._backend = PyAVBackend.open(self.ref.path)

    def close(self) -> None:
        """Let the file go."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _check_backend(name: str) -> None:
    """Raise for an unknown back end."""
    if name not in BACKENDS:
        raise UserError("backend", f"unknown back end {name!r}", hint=nearest(str(name), list(BACKENDS)))


def _check_path(ref: MediaRef) -> str:
    """The kind of the path, once it exists, holds something and suits the item."""
    path = Path(ref.path)
    if not path.exists():
        near = get_close_matches(
            path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        hint = str(path.with_name(near[0])) if near else "check the path and the folder it starts from"
        raise UserError(ref.path, f"no such file or folder ({ref.kind} item)", hint=hint)
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(ref.path, "the file is empty (0 bytes)", hint="copy or download it again")
    kind = kind_of(ref.path)
    if ref.fps is not None and kind != "folder":
        raise UserError(ref.path, "fps is for folders of frames, a file has its own", hint="drop fps from this item")
    if ref.kind == "video":
        return kind
    if kind == "folder" or path.suffix.lower() in VIDEO_SUFFIXES or (kind == "gif" and _is_animated(ref.path)):
        what = "folder" if kind == "folder" else "video"
        hint = '{"type": "video"} for a video or a folder of frames'
        raise UserError(ref.path, f"an image item names a {what}", expected="an image", hint=hint)
    return "image"


def _is_animated(path: str) -> bool:
    """Whether a GIF has more than one frame."""
    with PyAVBackend.open(path) as backend:
        return backend.probe.frames > 1


def _check_bound(ref: MediaRef, header: Probe) -> None:
    """Raise where the bounds of an item hold nothing of its file; an end behind the file is clamped, and logged."""
    if ref.start is None and ref.end is None:
        return
    where, length = ref.describe(), f"{header.duration:.3f} s"
    if header.kind == "image":
        raise UserError(where, "an image has no start and end", hint="drop them")
    start = 0.0 if ref.start is None else ref.start
    if not 0 <= start < math.inf or (ref.end is not None and not ref.end < math.inf):
        raise UserError(where, "bad bound", expected="seconds >= 0", got=f"{ref.start} to {ref.end}")
    if ref.end is not None and ref.end <= start:
        what = "zero length" if ref.end == start else "negative length"
        raise UserError(
            where, f"the bound has {what}", expected="an end behind the start", hint="correct start and end"
        )
    if start >= header.duration:
        hint = "correct start and end, they are seconds"
        raise UserError(
            where,
            "the bound starts after the end of the clip",
            expected=f"a start below {length}",
            got=f"{start:g} s",
            hint=hint,
        )
    if ref.end is not None and ref.end > header.duration:
        log.info("%s: the bound ends after the clip (%s) and is cut there", where, length)
