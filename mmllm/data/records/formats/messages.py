"""This project's own format: one object per line, `{"id", "messages", ...}` with media as content entries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.places import KEYS as PLACES
from mmllm.contract.places import read_place
from mmllm.contract.registry import register
from mmllm.data.records.conversations import Sample, Source
from mmllm.data.records.entries import MEDIA, content_entries
from mmllm.data.records.json_files import short, take

KINDS = ("text", *MEDIA, *PLACES)
LOCATORS = ("path", "url", "image", "video")


@register("format", "messages")
class Messages(Source):
    """`messages` are chat messages; the entry of a medium has a `path` relative to `root`."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the key `messages`."""
        return first is not None and "messages" in first

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{where}:messages", "missing", expected="a list of messages")
        for index, message in enumerate(messages):
            at = f"{where}:messages[{index}]"
            if not isinstance(message, dict) or "role" not in message or "content" not in message:
                raise UserError(f"{where}:messages", "a message needs role and content", got=short(message))
            take(message, "role", str, at)
            content = message["content"]
            if not isinstance(content, str | list):
                raise UserError(at, "wrong type", expected="a text or a list of entries", got=short(content))
            for entry in content_entries(message):
                self._check(entry, at)
                if isinstance(entry.get("path"), str):
                    entry["path"] = str(self.root / entry["path"])
        fields = {key: value for key, value in record.items() if key not in ("id", "messages")}
        return Sample(str(record.get("id", where)), messages, fields)

    def _check(self, entry: object, where: str) -> None:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in list(KINDS):
            raise UserError(where, "unknown type of entry", got=short(entry), hint=nearest(str(kind), list(KINDS)))
        if kind in PLACES:
            read_place(entry, f"{where}: {kind} entry")
        if kind in MEDIA:
            self._check_medium(entry, where)
        if kind == "text" and not isinstance(entry.get("text"), str):
            raise UserError(where, "a text entry has no text", got=short(entry))
        for placeholder in ("<image>", "<video>") if kind == "text" else ():
            if placeholder in entry["text"]:
                hint = '{"type": "video", "path": ...} as a content entry'
                raise UserError(where, f"more placeholders than media: a text contains {placeholder}", hint=hint)

    def _check_medium(self, entry: dict[str, Any], where: str) -> None:
        named = [key for key in LOCATORS if entry.get(key) is not None]
        if not named:
            raise UserError(where, f"more placeholders than media: a {entry['type']} names no file", expected="path")
        for key in named:
            take(entry, key, str, where)
        for key, kind in (("start", float), ("end", float), ("fps", float), ("frames", int)):
            take(entry, key, kind, where, None)


def as_record(sample: Sample) -> dict[str, Any]:
    """A conversation as a record of this format; its media paths are absolute, so that it may be written anywhere."""

    def placed(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "path": os.path.abspath(entry["path"])} if isinstance(entry.get("path"), str) else entry

    messages = []
    for message in sample.messages:
        content = message["content"]
        messages.append({**message, "content": content if isinstance(content, str) else [*map(placed, content)]})
    return {**sample.fields, "id": sample.id, "messages": messages}
