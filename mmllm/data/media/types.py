"""What is read: the reference to a media file, what its header says, and the decoded clip."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np

from mmllm.contract.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv"}
)
FOLDER_FPS = 3.0
"""Frames per second of a folder of frames unless given (as in MVBench's folders)."""


@dataclass(frozen=True)
class MediaRef:
    """One video or image, and the requested part of it.

    Args:
        kind: what the item is, ``"video"`` or ``"image"``.
        path: a local file, or a folder of frames for a video.
        start: first second requested, since the start of the file; None = the beginning.
        end: last second requested; None = the end.
        fps: frames per second of a folder of frames (default 3.0); not for files.

    Raises:
        UserError: unknown kind, remote address, or bounds on an image.
    """

    kind: Literal["video", "image"]
    path: str
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        """Refuse what can be refused without touching the file."""
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.kind not in ("video", "image"):
            raise UserError(self.path, "unknown kind of media", expected="video or image", got=self.kind)
        _refuse_remote(self.path)
        if not self.path:
            raise UserError(f"{self.kind} item", "the path is empty", hint="name a file")
        if self.kind == "image" and (self.start is not None or self.end is not None):
            raise UserError(self.path, "an image has no start and end", hint="drop them, or make it a video item")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(self.path, "bad fps", expected="a positive number", got=self.fps)

    @classmethod
    def parse(cls, kind: Literal["video", "image"], text: str) -> MediaRef:
        """Read a path with an optional media fragment: ``clip.mp4#t=3,8``, ``#t=3``, ``#t=,8`` (seconds).

        Raises:
            UserError: bad fragment, remote address, or a fragment on an image.
        """
        _refuse_remote(text)
        if text.startswith("file://"):
            text = unquote(text.removeprefix("file://"))
        path, mark, fragment = text.rpartition("#")
        # a '#' inside a file or folder name is not a fragment: clip#1.mp4, take#2/a.mp4
        in_name = "/" in fragment or ("=" not in fragment and re.search(r"\.[A-Za-z]\w*$", fragment))
        if not mark or in_name:
            return cls(kind, text)
        start, end = _parse_seconds(text, fragment)
        return cls(kind, path, start, end)

    def describe(self) -> str:
        """A short name for messages: the path as given, with its bounds (``clip.mp4#t=3,8``)."""
        if self.start is None and self.end is None:
            return self.path
        start = "" if self.start is None else f"{self.start:g}"
        end = "" if self.end is None else f",{self.end:g}"
        return f"{self.path}#t={start}{end}"


@dataclass(frozen=True)
class Probe:
    """What the header says, before decoding.

    Args:
        kind: ``"video"``, ``"gif"``, ``"folder"`` or ``"image"``.
        frames: number of frames (1 for an image).
        fps: average frames per second (1.0 for an image).
        height: pixels, after rotation.
        width: pixels, after rotation.
    """

    kind: str
    frames: int
    fps: float
    height: int
    width: int

    @property
    def duration(self) -> float:
        """Seconds: frames / fps."""
        return self.frames / self.fps


@dataclass
class Clip:
    """Decoded frames.

    Args:
        frames: uint8 ``[T, H, W, 3]``, RGB; if a converter was given, the list of its T values.
        times: float64 ``[T]``, the moment requested for each frame, in seconds since the start of the *file*.
        repeated: number of frames at the end that stand in for frames the file lacks.
        corrupt: (first, last) seconds of the file within which frames that were taken may be damaged, as far as the
            decoder can tell; ascending and disjoint.
    """

    frames: np.ndarray | list[Any]
    times: np.ndarray
    repeated: int = 0
    corrupt: tuple[tuple[float, float], ...] = ()


def kind_of(path: str) -> str:
    """``"folder"``, ``"gif"``, ``"image"`` or ``"video"`` (anything else), by the kind of path alone."""
    if Path(path).is_dir():
        return "folder"
    suffix = Path(path).suffix.lower()
    if suffix == ".gif":
        return "gif"
    return "image" if suffix in IMAGE_SUFFIXES else "video"


def _refuse_remote(text: str) -> None:
    """Raise for anything that is not a local path."""
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text)
    if (scheme and scheme[1].lower() != "file") or text.startswith("data:"):
        raise UserError(text[:200], "remote media are not read", expected="a local path", hint="download it first")


def _parse_seconds(text: str, fragment: str) -> tuple[float | None, float | None]:
    """``t=3,8`` to (3.0, 8.0); either side may be left out, not both."""
    body = re.fullmatch(r"t=(?:npt:)?([^,]*)(?:,([^,]*))?", fragment)
    sides: list[float | None] = []
    for side in body.groups() if body else ():
        if side and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", side):
            body = None
            break
        sides.append(float(side) if side else None)
    if body is None or sides == [None, None] or body[2] == "":
        hint = "clip.mp4#t=3,8 (seconds), clip.mp4#t=3 or clip.mp4#t=,8"
        raise UserError(text, "bad media fragment", got=f"#{fragment}", hint=hint)
    return sides[0], sides[1]
