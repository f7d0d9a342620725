"""Records that more than one format's tests write."""

from __future__ import annotations

from typing import Any


def llava(number: int, text: str = "<image>\nWhat moves?", **keys: Any) -> dict[str, Any]:
    """A record of LLaVA's."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": f"s{number}", "conversations": turns, **keys}
