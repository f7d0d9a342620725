"""Conversations as text: any tokenizer's chat template, media at their places, answers with their extent.

The template is rendered once a conversation *shape* with marks in place of the contents, and the contents are put in
afterwards. So a turn's extent is known exactly, whatever the template adds around it or writes differently for
earlier turns, and text that a user types is never read as a part of the template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mmllm.contract.errors import UserError

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
MARK = "\ue000{}\ue001"
LOCATORS = ("path", "url", "image", "video")


@dataclass
class Rendered:
    """A conversation as one text.

    Attributes:
        text: the text, with one placeholder for every medium.
        media: the media entries in the order of their placeholders.
        answers: (start, end) characters of what the assistant says, end markers included.
    """

    text: str
    media: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)


def render(tokenizer: Any, messages: list[dict[str, Any]], *, prompt: bool, continued: bool = False) -> Rendered:
    """The text of a conversation.

    Args:
        tokenizer: whose chat template to use.
        messages: `[{"role": ..., "content": text or [{"type": "video", "path": ...}, {"type": "text", ...}]}]`.
        prompt: end with the opening of an assistant's turn.
        continued: leave the last turn open, to be continued.

    Raises:
        UserError: a malformed message, no chat template, or a placeholder typed in a text.
    """
    roles = tuple(_role(message) for message in messages)
    pieces, opening = _frame(_Template(tokenizer), roles, prompt)
    result = Rendered(pieces[0])
    for index, (message, piece) in enumerate(zip(messages, pieces[1:], strict=True)):
        start = len(result.text)
        content, media = _content(message)
        result.text += content
        result.media += media
        if roles[index] == "assistant":
            start -= _written_first(pieces[index], opening)
            end_marker = tokenizer.eos_token or ""
            blank = len(piece) - len(piece.lstrip(" \n"))
            extent = blank + len(end_marker) if end_marker and piece[blank:].startswith(end_marker) else 0
            result.answers.append((start, len(result.text) + extent))
        result.text += "" if continued and index == len(messages) - 1 else piece
    return result


def _role(message: dict[str, Any]) -> str:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise UserError("conversation", "a message needs role and content", got=str(message)[:80])
    return message["role"]


def _written_first(piece: str, opening: str) -> int:
    """How much a template writes between what a generation prompt ends with and the content (an empty thought, say)."""
    place = piece.rfind(opening) if opening else -1
    return len(piece) - place - len(opening) if place >= 0 else 0


def _content(message: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    content = message["content"]
    entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("content", "wrong type", expected="a text or a list of entries", got=str(content)[:60])
    text, media = "", []
    for entry in entries:
        kind = entry.get("type")
        if kind == "text":
            if not isinstance(entry.get("text"), str):
                raise UserError("text entry", "has no text", got=str(entry)[:60])
            for placeholder in PLACEHOLDERS.values():
                if placeholder in entry["text"]:
                    raise UserError(
                        f"text {entry['text'][:40]!r}",
                        f"more placeholders than media: it contains {placeholder}",
                        hint='{"type": "video", "path": ...} as a content entry',
                    )
            text += entry["text"]
        elif kind in PLACEHOLDERS:
            if not any(entry.get(key) is not None for key in LOCATORS):
                raise UserError(f"{kind} entry", "more placeholders than media: it names no file", expected="path")
            text += PLACEHOLDERS[kind]
            media.append(entry)
        else:
            raise UserError("content entry", "unknown type", expected="text, image or video", got=kind)
    return text, media


class _Template:
    """A tokenizer as a cache key: two with the same template render alike."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.key = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
        if tokenizer.chat_template is None:
            raise UserError("tokenizer", "it has no chat template", hint="model.llm.template, a Jinja text")

    def __hash__(self) -> int:
        return hash(str(self.key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.key == other.key

    def __call__(self, messages: list[dict[str, str]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


@lru_cache(maxsize=4096)
def _frame(template: _Template, roles: tuple[str, ...], prompt: bool) -> tuple[list[str], str]:
    """What the template writes around the contents: before the first, and after each; and how a turn opens."""
    marked = [{"role": role, "content": MARK.format(index)} for index, role in enumerate(roles)]
    text = template(marked, prompt)
    pieces = []
    for index in range(len(roles)):
        before, mark, text = text.partition(MARK.format(index))
        if not mark:
            raise UserError("chat template", f"it leaves out message {index} ({roles[index]})")
        pieces.append(before)
    opening = template(marked[:1], True).removeprefix(template(marked[:1], False)) if roles else ""
    return [*pieces, text], opening
