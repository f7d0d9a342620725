"""Conversations as text: any tokenizer's chat template, media at their positions, answers with their extent.

The template is rendered once per conversation *shape* with marks in place of the contents, and the contents are filled
in afterwards. So a turn's extent is known exactly, whatever the template adds around it or writes differently for
earlier turns, and text typed by a user is never read as part of the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mmllm.contract.errors import UserError, shown
from mmllm.contract.grounding import Coordinates
from mmllm.contract.places import Located, Place
from mmllm.processing.content import PLACEHOLDERS, Entry, MediumEntry, entries_of
from mmllm.processing.sandbox import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000{}\ue001"


@dataclass
class Rendered:
    """A conversation as one text.

    Attributes:
        text: the text, with one placeholder per medium.
        media: the media in the order of their placeholders.
        located: (start, coordinate, the medium that it is about or None): where the token of a coordinate stands, whose
            bin is not known before the medium has been read.
        answers: (start, end) characters of the assistant's answers, end markers included.
        typed: (start, end) characters of the texts in the messages: a control token spelled there is plain text.
    """

    text: str
    media: list[MediumEntry] = field(default_factory=list)
    located: list[tuple[int, Located, MediumEntry | None]] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    typed: list[tuple[int, int]] = field(default_factory=list)

    def written(self, layout: Coordinates | None) -> str:
        """The text, with the token of every place.

        Raises:
            UserError: a moment in seconds, which has no token before its clip is read; or a model without coordinates.
        """
        text = self.text
        for start, where, _ in reversed(self.located):
            if layout is None:
                raise UserError("content entry", "this model has no words for places and moments")
            if where.seconds:
                raise UserError("time entry", "has no token before its clip is read", hint="tokenize=True")
            token = layout.written(where.axis, where.value)
            text = text[:start] + token + text[start + len(Coordinates.token(where.axis, 0)) :]
        return text


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    prompt: bool,
    continued: bool = False,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """The text of a conversation.

    Args:
        tokenizer: its chat template is used.
        messages: `[{"role": ..., "content": text or [{"type": "video", "path": ...}, {"type": "text", ...}]}]`.
        prompt: end with the opening of an assistant turn.
        continued: leave the last turn open, to be continued.
        template: a chat template to use instead of the tokenizer's.
        variables: of the template.

    Raises:
        UserError: a malformed message, no chat template or a broken one, or a placeholder typed in a text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("conversation", "no messages", expected="a list of messages", got=shown(messages))
    roles = tuple(_role(message) for message in messages)
    frame = Template(tokenizer, template, tuple(sorted((variables or {}).items())))
    contents = _with_subjects([entries_of(message) for message in messages])
    if frame.reads_entries:
        return _render_entries(frame, list(zip(roles, contents, strict=True)), prompt, continued)
    pieces, opening = _frame(frame, roles, prompt)
    result = Rendered(pieces[0])
    for index, (content, piece) in enumerate(zip(contents, pieces[1:], strict=True)):
        start = len(result.text)
        _write_content(content, result)
        if roles[index] == "assistant":
            start -= _written_first(pieces[index], opening)
            result.answers.append((start, len(result.text) + _ending(piece, tokenizer)))
        result.text += "" if continued and index == len(messages) - 1 else piece
    return result


Subject = tuple[Place, MediumEntry | None]
"""A place, and the medium that it is about."""


def _with_subjects(contents: list[list[Entry]]) -> list[list[str | MediumEntry | Subject]]:
    """Contents of messages, each place beside its medium: the one that it names, or the last one before it.

    Raises:
        UserError: it names a medium that there is not.
    """
    media = [entry for content in contents for entry in content if isinstance(entry, MediumEntry)]
    found, before = [], 0
    for content in contents:
        own: list[str | MediumEntry | Subject] = []
        for entry in content:
            before += isinstance(entry, MediumEntry)
            own.append((entry, _subject(entry.of, media, before)) if isinstance(entry, Place) else entry)
        found.append(own)
    return found


def _subject(of: int | None, media: list[MediumEntry], before: int) -> MediumEntry | None:
    if of is None:
        return media[before - 1] if before else None
    if of >= len(media):
        raise UserError("content entry: of", "no such medium", expected=f"0 to {len(media) - 1}", got=of)
    return media[of]


def _runs(content: list[str | MediumEntry | Subject]) -> list[list[str | Subject] | MediumEntry]:
    """Media, and texts as lists of one; a place is in the list of the texts around it, so that nothing splits them."""
    found: list[list[str | Subject] | MediumEntry] = []
    for entry in content:
        last = found[-1] if found and isinstance(found[-1], list) else None
        if isinstance(entry, MediumEntry):
            found.append(entry)
        elif last is not None and not (isinstance(entry, str) and isinstance(last[-1], str)):
            last.append(entry)
        else:
            found.append([entry])
    return found


def _render_entries(
    template: Template,
    contents: list[tuple[str, list[str | MediumEntry | Subject]]],
    prompt: bool,
    continued: bool,
) -> Rendered:
    """The same with a template that writes the placeholders itself, as those of published models do."""
    contents = [(role, _runs(own)) for role, own in contents]
    shape = tuple(
        (role, tuple(entry.kind if isinstance(entry, MediumEntry) else "text" for entry in own))
        for role, own in contents
    )
    pieces, opening = _entry_frame(template, shape, prompt)
    result = Rendered(pieces[0])
    media = [entry for _, own in contents for entry in own if isinstance(entry, MediumEntry)]
    texts = [(role, entry) for role, own in contents for entry in own if not isinstance(entry, MediumEntry)]
    for number, ((role, text), before, piece) in enumerate(zip(texts, pieces, pieces[1:], strict=False)):
        start = len(result.text)
        _write_content(text, result)
        if role == "assistant":
            start -= _written_first(before, opening)
            result.answers.append((start, len(result.text) + _ending(piece, template.tokenizer)))
        result.text += "" if continued and number == len(texts) - 1 else piece
    result.media = _in_order(result.text, result.typed, media)
    return result


def _in_order(text: str, typed: list[tuple[int, int]], media: list[MediumEntry]) -> list[MediumEntry]:
    """The media in the order in which the template wrote their placeholders.

    Raises:
        UserError: it left some out.
    """
    left = {kind: [entry for entry in media if entry.kind == kind] for kind in PLACEHOLDERS}
    places = sorted(
        (match.start(), kind)
        for kind, token in PLACEHOLDERS.items()
        for match in re.finditer(re.escape(token), text)
        if not any(start <= match.start() < stop for start, stop in typed)
    )
    found = [left[kind].pop(0) for _, kind in places if left[kind]]
    if len(found) < len(media) or len(places) > len(found):
        raise UserError("chat template", f"writes {len(places)} placeholders for {len(media)} media")
    return found


@lru_cache(maxsize=4096)
def _entry_frame(template: Template, shape: tuple, prompt: bool) -> tuple[list[str], str]:
    """What the template writes around the texts: before the first, and after each; and how a turn opens."""
    messages, count = [], 0
    for role, kinds in shape:
        content = []
        for kind in kinds:
            content.append({"type": kind, "text": MARK.format(count)} if kind == "text" else {"type": kind})
            count += kind == "text"
        messages.append({"role": role, "content": content})
    text, pieces = template(messages, prompt), []
    for number in range(count):
        before, mark, text = text.partition(MARK.format(number))
        if not mark:
            raise UserError("chat template", f"leaves out text {number + 1} of the conversation, or reorders texts")
        pieces.append(before)
    opening = template(messages[:1], True).removeprefix(template(messages[:1], False))
    return [*pieces, text], opening


def _role(message: dict[str, Any]) -> str:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise UserError("conversation", "a message needs role and content", got=shown(message))
    if not isinstance(message["role"], str):
        raise UserError("message: role", "wrong type", expected="user, assistant or system", got=shown(message["role"]))
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:
            raise UserError(f"message: {shown(key)}", "unknown key", expected="role and content")
    return message["role"]


def _written_first(piece: str, opening: str) -> int:
    """Number of characters a template writes between a generation prompt and the content (an empty thought, say)."""
    at = piece.rfind(opening) if opening else -1
    return len(piece) - at - len(opening) if at >= 0 else 0


def _ending(piece: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of characters after an answer that belong to it: the end marker, if the template writes one."""
    end_marker = tokenizer.eos_token or ""
    blank = len(piece) - len(piece.lstrip(" \n"))
    return blank + len(end_marker) if end_marker and piece[blank:].startswith(end_marker) else 0


def _write_content(content: list[str | MediumEntry | Subject], result: Rendered) -> None:
    """Append a message's content to the text, with a placeholder for each of its media and coordinates."""
    for entry in content:
        if isinstance(entry, MediumEntry):
            result.text += PLACEHOLDERS[entry.kind]
            result.media.append(entry)
        elif isinstance(entry, str):
            _write_text(entry, result)
        else:
            for piece in entry[0].pieces:
                if isinstance(piece, Located):
                    result.located.append((len(result.text), piece, entry[1]))
                result.text += Coordinates.token(piece.axis, 0) if isinstance(piece, Located) else piece


def _write_text(text: str, result: Rendered) -> None:
    """Append what somebody typed."""
    for placeholder in PLACEHOLDERS.values():
        if placeholder in text:
            what = f"more placeholders than media: it contains {placeholder}"
            hint = '{"type": "video", "path": ...} as a content entry'
            raise UserError(f"text {text[:40]!r}", what, hint=hint)
    result.typed.append((len(result.text), len(result.text) + len(text)))
    result.text += text


@lru_cache(maxsize=4096)
def _frame(template: Template, roles: tuple[str, ...], prompt: bool) -> tuple[list[str], str]:
    """What the template writes around the contents: before the first, and after each; and how a turn opens."""
    marked = [{"role": role, "content": MARK.format(index)} for index, role in enumerate(roles)]
    text = template(marked, prompt)
    pieces = []
    for index in range(len(roles)):
        before, mark, text = text.partition(MARK.format(index))
        if not mark:
            raise UserError("chat template", f"leaves out message {index} ({roles[index]})")
        pieces.append(before)
    if any(MARK[0] in piece for piece in (*pieces, text)):
        raise UserError("chat template", "writes a message twice, or in a different order")
    opening = template(marked[:1], True).removeprefix(template(marked[:1], False)) if roles else ""
    return [*pieces, text], opening
