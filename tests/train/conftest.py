"""Data that tests of training share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import frames, write_video


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Twelve conversations over clips, with answers of unequal length and some without media."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(12):
        content = [{"type": "text", "text": f"Question {index}: what moves?"}]
        if index % 3:
            write_video(folder / f"clips/{index}.mp4", frames(index, 8))
            content.insert(0, {"type": "video", "path": f"clips/{index}.mp4"})
        answer = "A red square moves left." if index % 2 else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{index}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"
