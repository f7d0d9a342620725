"""A record with turns and media as a conversation: who speaks, and where `<image>` and `<video>` belong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, nearest
from mmllm.data.records.conversations import Sample
from mmllm.data.records.formats.media import media
from mmllm.data.records.formats.variables import names_places, with_places
from mmllm.data.records.json_files import short

Turn = tuple[str, str]
"""Role and text; media are placeholders in the text."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
MEDIA_KEYS = ("image", "images", "video", "videos")


def conversation(
    record: dict[str, Any], where: str, root: Path, spill: Path, turns: list[Turn] | None = None, used: str = ""
) -> Sample:
    """A record as a sample; what is neither turns nor media becomes a field.

    Args:
        where: `file:line` of the record.
        root: the folder that media paths are relative to.
        spill: where bytes of videos are written.
        turns: the turns, if the format reads them itself, from the key `used`; otherwise they are found by key.

    Raises:
        UserError: a malformed turn or medium, or placeholders and media that do not match.
    """
    if turns is None:
        used = next((key for key in READERS if record.get(key)), "")
        if not used:
            raise UserError(f"{where}:conversations", "missing", expected=f"one of {', '.join(READERS)}")
        turns = READERS[used](record[used], f"{where}:{used}")
    found = {kind: media(record, kind, where, root, spill) for kind in ("image", "video")}
    messages = _fill(turns, found, where)
    located = {"variables"} if names_places(record.get("variables")) else set()
    if located:
        split = (record.get("meta") or {}).get("split") if isinstance(record.get("meta"), dict) else None
        if split is not None:
            hint = "start and end in seconds, beside video"
            raise UserError(
                f"{where}:meta.split", "a part of a clip in frames is not read", got=short(split), hint=hint
            )
        messages = with_places(messages, record["variables"], where)
    taken = {"id", used, *located, *MEDIA_KEYS, *(("start", "end") if found["video"] else ())}
    fields = {key: value for key, value in record.items() if key not in taken and value is not None}
    for key in ("chosen", "rejected"):
        if isinstance(fields.get(key), list):
            fields[key] = "\n".join(text for _, text in said(fields[key], f"{where}:{key}"))
        elif not isinstance(fields.get(key), str | None):
            raise UserError(f"{where}:{key}", "of the wrong type", expected="a text", got=short(fields[key]))
    name = record.get("id")
    return Sample(where if name is None else str(name), messages, fields)


def said(turns: object, where: str) -> list[Turn]:
    """`[{"from": "human", "value": ...}]` or `[{"role": "user", "content": ...}]`.

    Raises:
        UserError: a turn without speaker or text, or an unknown speaker.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(where, "not a list of turns", got=short(turns))
    result = []
    for index, turn in enumerate(turns):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            key, hint = "from" if "from" in turn else "role", nearest(str(role), list(ROLES))
            raise UserError(f"{where}[{index}].{key}", "unknown speaker", got=short(role), hint=hint)
        result.append((ROLES[role], _text(text, f"{where}[{index}]")))
    return result


def _text(content: object, where: str) -> str:
    """A text, or the entries of a content list as one text; the entry of a medium becomes its placeholder."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise UserError(where, "has no text", got=short(content))
    pieces = []
    for entry in content:
        kind, text = entry.get("type", "text"), entry.get("text")
        if kind not in ("image", "video") and (kind != "text" or not isinstance(text, str)):
            raise UserError(where, "unknown type of entry", expected="text, image or video", got=short(entry))
        pieces.append(text if kind == "text" else f"<{kind}>")
    return "".join(pieces)


def _exchanges(pairs: object, where: str) -> list[Turn]:
    """`[{"user": ..., "assistant": ...}]`."""
    turns = []
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        for role in ("user", "assistant"):
            if not isinstance(pair, dict) or not isinstance(pair.get(role), str):
                raise UserError(f"{where}[{index}].{role}", "has no text", got=short(pair))
            turns.append((role, pair[role]))
    return turns


def _prompt(prompt: object, where: str) -> list[Turn]:
    """A question, or the turns before the answer."""
    return [("user", prompt)] if isinstance(prompt, str) else said(prompt, where)


READERS: dict[str, Callable[[Any, str], list[Turn]]] = {
    "conversations": said,
    "messages": said,
    "texts": _exchanges,
    "prompt": _prompt,
}
"""{key of a record: function that reads the turns there}."""


def _fill(turns: list[Turn], found: dict[str, list[dict[str, Any]]], where: str) -> list[dict[str, Any]]:
    """Messages with each medium at its placeholder; media without a placeholder come first."""
    if not any(PLACEHOLDER.search(text) for _, text in turns):
        loose = [entry for entries in found.values() for entry in entries]
        first = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
        if loose and first is None:
            raise UserError(where, "media, but no question to put them in")
        return [
            {"role": role, "content": _content([*loose, text]) if loose and index == first else text}
            for index, (role, text) in enumerate(turns)
        ]
    waiting = {kind: list(entries) for kind, entries in found.items()}
    messages = []
    for role, text in turns:
        # text, kind, text, kind, ..., text
        pieces: list[Any] = PLACEHOLDER.split(text)
        pieces[1::2] = [_next(waiting, kind, where) for kind in pieces[1::2]]
        messages.append({"role": role, "content": _content(pieces) if len(pieces) > 1 else text})
    for kind, rest in waiting.items():
        if rest:
            what = f"more media than placeholders: {len(rest)} of {len(found[kind])} left over"
            raise UserError(f"{where}:{kind}", what, hint=f"a <{kind}> for each, or none at all")
    return messages


def _next(waiting: dict[str, list[dict[str, Any]]], kind: str, where: str) -> dict[str, Any]:
    """The medium for a placeholder; `<image>` may stand for a video, and the entry then records that."""
    if waiting[kind]:
        return waiting[kind].pop(0)
    if kind == "image" and waiting["video"]:
        return {**waiting["video"].pop(0), "placeholder": "<image>"}
    raise UserError(f"{where}:{kind}", f"more placeholders than media: nothing is left for <{kind}>")


def _content(pieces: list[Any]) -> list[dict[str, Any]]:
    """A content list of entries and texts; empty texts are left out."""
    entries = [{"type": "text", "text": piece} if isinstance(piece, str) else piece for piece in pieces]
    return [entry for entry in entries if entry.get("text") != ""]
