"""What an item says of its file, checked against the file: path, kind, bounds."""

from __future__ import annotations

import logging
import math
from difflib import get_close_matches
from pathlib import Path

from mmllm.contract.errors import UserError
from mmllm.data.media.backends.pyav import PyAVBackend
from mmllm.data.media.limits import Limits
from mmllm.data.media.types import VIDEO_SUFFIXES, MediaRef, Probe, kind_of

log = logging.getLogger(__name__)


def check_path(ref: MediaRef, limits: Limits) -> str:
    """The kind of the path, once it exists, holds something and suits the item.

    Raises:
        UserError: it does not.
    """
    path = Path(ref.path)
    if not path.exists():
        near = get_close_matches(
            path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        hint = str(path.with_name(near[0])) if near else "check the path and the folder it starts from"
        raise UserError(ref.path, f"no such file or folder ({ref.kind} item)", hint=hint)
    if not path.is_file() and not path.is_dir():
        raise UserError(ref.path, "neither a file nor a folder", hint="a pipe or a device cannot be read as media")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(ref.path, "the file is empty (0 bytes)", hint="copy or download it again")
    kind = kind_of(ref.path)
    if ref.fps is not None and kind != "folder":
        raise UserError(ref.path, "fps is for folders of frames, a file has its own", hint="drop fps from this item")
    if ref.kind == "video":
        return kind
    if kind == "folder" or path.suffix.lower() in VIDEO_SUFFIXES or (kind == "gif" and _is_animated(ref.path, limits)):
        what = "folder" if kind == "folder" else "video"
        hint = '{"type": "video"} for a video or a folder of frames'
        raise UserError(ref.path, f"an image item names a {what}", expected="an image", hint=hint)
    return "image"


def _is_animated(path: str, limits: Limits) -> bool:
    """Whether a GIF has more than one frame."""
    with PyAVBackend.open(path, limits=limits) as backend:
        return backend.probe.frames > 1


def check_bounds(ref: MediaRef, header: Probe) -> None:
    """See that the bounds of an item hold something of its file; an end behind the file is clamped, and logged.

    Raises:
        UserError: they hold nothing.
    """
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
            where, f"the bound has {what}", expected="an end later than the start", hint="correct start and end"
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
