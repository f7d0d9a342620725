"""Content entries of chat messages: which keys each kind has, and of which type."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contract.arguments import Count, NotNegative, Positive, parse
from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.places import KEYS as PLACES
from mmllm.contract.places import Place, read_place
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef
from mmllm.data.records.entries import content_entries

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
LOCATORS = ("path", "url", "image", "video")
VALUES = {
    "image": {},
    "video": {
        "start": NotNegative | None,
        "end": NotNegative | None,
        "frames": Count | None,
        "fps": Positive | None,
        "max_frames": Count | None,
        "sampler": str | None,
    },
}
"""The keys allowed besides the file of a medium."""
SPELLINGS = {"num_frames": "frames"}
"""Other names of these keys in use elsewhere."""


@dataclass(frozen=True)
class MediumEntry:
    """An image or video of a message.

    Attributes:
        kind: "image" or "video".
        source: a path, or pixels in memory.
        start: seconds.
        end: seconds.
        frames: number of frames to sample, instead of the model's own.
        max_frames: most frames to sample, instead of the model's own.
        sampler: name of the sampler, instead of the model's own.
        fps: frames sampled per second of a file; for a folder of frames, its frame rate.
    """

    kind: str
    source: Any
    start: float | None = None
    end: float | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    sampler: str | None = None

    @property
    def ref(self) -> MediaRef | None:
        """The file referred to; None for pixels in memory."""
        if not isinstance(self.source, str | os.PathLike):
            return None
        path = os.fspath(self.source)
        return MediaRef(self.kind, path, self.start, self.end, self.fps if self._is_folder() else None)

    def _is_folder(self) -> bool:
        return isinstance(self.source, str | os.PathLike) and Path(self.source).is_dir()

    def sampled(self, own: Sampling) -> Sampling:
        """How this medium is sampled; `own` applies where the entry does not say."""
        return own.override(self.frames, None if self._is_folder() else self.fps, self.max_frames, self.sampler)


def texts_of(message: dict[str, Any]) -> list[str]:
    """The texts of a message, entry by entry."""
    return [entry for entry in entries_of(message) if isinstance(entry, str)]


Entry = str | MediumEntry | Place


def entries_of(message: dict[str, Any]) -> list[Entry]:
    """The content of a message: a text for each text entry, a `MediumEntry` for each image and video, and the places.

    Raises:
        UserError: an unknown kind or key, a value of a wrong type, a medium without a file.
    """
    entries = content_entries(message)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("content", "wrong type", expected="a text or a list of entries", got=shown(entries, 60))
    return [_entry(entry) for entry in entries]


def _entry(entry: dict[str, Any]) -> Entry:
    kind = entry.get("type")
    if kind == "text":
        if not isinstance(entry.get("text"), str):
            raise UserError("text entry", "has no text", got=shown(entry, 60))
        _check_keys(entry, ("type", "text"), "text entry")
        return entry["text"]
    if isinstance(kind, str) and kind in PLACES:
        return read_place(entry, f"{kind} entry")
    if not isinstance(kind, str) or kind not in VALUES:
        expected = f"text, image, video, {', '.join(PLACES)}"
        raise UserError("content entry", "unknown type", expected=expected, got=shown(kind))
    where, known = f"{kind} entry", VALUES[kind]
    _check_keys(entry, ("type", "placeholder", *LOCATORS, *known, *SPELLINGS), where)
    located = [key for key in LOCATORS if entry.get(key) is not None]
    if not located:
        raise UserError(where, "more placeholders than media: it names no file", expected="path")
    if len(located) > 1:
        raise UserError(where, f"{' and '.join(located)} name its file", expected="one of them")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = SPELLINGS.get(key, key)
        if name in known and value is not None:
            if name in values:
                raise UserError(f"{where}: {key}", f"given twice, also as {name if key != name else 'another name'}")
            values[name] = parse(value, known[name], f"{where}: {key}")
    return MediumEntry(kind, entry[located[0]], **values)


def _check_keys(entry: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in entry:
        if key not in known and entry[key] is not None:
            raise UserError(f"{where}: {shown(key)}", "unknown key", hint=nearest(str(key), list(known)))
