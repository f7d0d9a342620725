"""LLaVA's JSON or JSONL: `conversations` of human and gpt, and the paths under `image` and `video`.

Sets with the same content as `messages` of user and assistant, with `images` and `videos` beside them, are read too.
`<image>` and `<video>` in the texts mark where the media go; published sets write `<image>` for a video too. Line
breaks around a placeholder belong to it. Without placeholders the media come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.contract.registry import register
from mmllm.data.records.conversations import Sample, Source
from mmllm.data.records.formats.turns import MEDIA_KEYS, conversation


@register("format", "llava")
class Llava(Source):
    """`{"id", "image": path or list, "video": path or list, "conversations": [{"from", "value"}]}`."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the key `conversations`, or by `messages` of plain texts with media beside them."""
        if first is None or "conversations" in first:
            return first is not None
        messages = first.get("messages")
        plain = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
        )
        return plain and any(key in first for key in MEDIA_KEYS)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        return conversation(record, where, self.root, self.spill)
