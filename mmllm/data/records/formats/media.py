"""Media of a record as content entries: paths stay paths, bytes become a picture or a file."""

from __future__ import annotations

import hashlib
import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mmllm.contract.errors import UserError
from mmllm.data.records.json_files import short

if TYPE_CHECKING:
    import numpy as np


def media(record: dict[str, Any], kind: str, where: str, root: Path, spill: Path) -> list[dict[str, Any]]:
    """Content entries for what a record has under `image` or `video` (or `images`, `videos`): one or a list.

    A record with one video may bound it by `start` and `end`, in seconds.

    Args:
        kind: "image" or "video".
        root: the folder that paths are relative to.
        spill: where bytes of videos are written.

    Raises:
        UserError: a value that is neither a path nor bytes, bytes that do not decode, or a bound that is not a number.
    """
    key = next((key for key in (kind, f"{kind}s") if record.get(key)), kind)
    values = record.get(key) or []
    values = values if isinstance(values, list) else [values]
    locations = [f"{where}:{key}[{index}]" if len(values) > 1 else f"{where}:{key}" for index in range(len(values))]
    entries = [_entry(kind, value, location, root, spill) for value, location in zip(values, locations, strict=True)]
    bounds = [side for side in ("start", "end") if kind == "video" and entries and record.get(side) is not None]
    if bounds and len(entries) > 1:
        raise UserError(f"{where}:{bounds[0]}", f"one bound for {len(entries)} videos", expected="one video")
    for side in bounds:
        entries[0][side] = _seconds(record, side, where)
    return entries


def _seconds(record: dict[str, Any], side: str, where: str) -> float:
    value = record[side]
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # some sets write them as strings
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{where}:{side}", "not a bound", expected="seconds", got=short(value))
    return seconds


def _entry(kind: str, value: object, where: str, root: Path, spill: Path) -> dict[str, Any]:
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        content, name = value.get("bytes"), value.get("path")
        if not isinstance(content, bytes | None) or not isinstance(name, str | None):
            raise UserError(where, f"not a {kind}", expected="bytes and a path", got=short(value))
    elif isinstance(value, bytes | str) and value:
        content, name = (value, None) if isinstance(value, bytes) else (None, value)
    else:
        raise UserError(where, f"not a {kind}", expected="a path, or bytes", got=short(value))
    if not content:
        return {"type": kind, "path": str(root / name)}
    if kind == "image":
        return {"type": kind, "image": _picture(content, where)}
    return {"type": kind, "path": str(_spilled(content, Path(name or "").suffix or ".mp4", spill))}


def _picture(content: bytes, where: str) -> np.ndarray:
    """Bytes of an image file as RGB uint8 `[H, W, 3]`."""
    from mmllm.data.media.backends.stills import load_image

    try:
        return load_image(BytesIO(content), where=where)
    except UserError as error:
        raise UserError(where, error.what, got=f"{len(content)} bytes", hint="export the record again") from error


def _spilled(content: bytes, suffix: str, folder: Path) -> Path:
    """Write the bytes of a video to a file named by their hash; once, complete or not at all."""
    digest = hashlib.sha256(content).hexdigest()[:32]
    path = folder / digest[:2] / f"{digest}{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{uuid4().hex}.part")
        fresh.write_bytes(content)
        fresh.replace(path)
    return path
