"""The content of a chat message as a list of entries."""

from __future__ import annotations

from typing import Any

MEDIA = ("image", "video")
"""Kinds of entries that are media; the others are texts, and places in media."""


def content_entries(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content entries; a content that is a text is one entry. Nothing is checked."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
