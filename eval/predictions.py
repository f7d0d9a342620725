"""The append-only file of answers: a killed run leaves it, and the next run continues it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.files import append_lines
from mmllm.eval.items import Item

logger = logging.getLogger(__name__)
FIELDS = ("id", "task", "condition", "response", "letter", "gold", "correct")


class Predictions:
    """Answers by (item id, condition), kept in ``predictions.jsonl``, one JSON object per line.

    Attributes:
        damaged: ids of items whose clip had damaged frames.
        visual_tokens: how many were read, averaged over layers, by (item id, condition), where that is known.

    Args:
        path: the file; it and its folder are created by the first `add`. Earlier lines are read. An incomplete
            last line (the run was killed while writing) is cut off, so that its item is answered again.

    Raises:
        UserError: a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.responses: dict[tuple[str, str], str] = {}
        self.damaged: set[str] = set()
        self.visual_tokens: dict[tuple[str, str], float] = {}
        self._clips: dict[tuple[str, str], int] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        good, start = 0, 0
        while start < len(data):
            end = data.find(b"\n", start)
            row = _parse(data[start:end]) if end >= 0 else None
            if row is None:
                if 0 <= end < len(data) - 1:
                    line = data.count(b"\n", 0, start) + 1
                    raise UserError(f"{self.path}:{line}", "damaged line", hint="delete that line and run again")
                break
            self._note(row)
            good = start = end + 1
        if good < len(data):
            logger.warning("%s: the last line is incomplete; it is dropped and its item is answered again", self.path)
            with self.path.open("r+b") as file:
                file.truncate(good)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows (with the keys of `FIELDS`) and flush them to the file."""
        append_lines(self.path, [json.dumps(row, ensure_ascii=False) for row in rows])
        for row in rows:
            self._note(row)

    def forget_changed(self, items: list[Item]) -> None:
        """Drop answers about earlier contents of a clip: it has since been repaired, or downloaded completely."""
        answered = {item for item, _ in self._clips}
        sizes = {item.id: clip_size(item) for item in items if item.id in answered}
        changed = [key for key, size in self._clips.items() if sizes.get(key[0], size) != size]
        for key in changed:
            del self.responses[key], self._clips[key]
            self.damaged.discard(key[0])
        if changed:
            clips = len({key[0] for key in changed})
            logger.warning("%s: the clips of %d items have changed; these are answered again", self.path, clips)

    def _note(self, row: dict[str, Any]) -> None:
        self.responses[row["id"], row["condition"]] = row["response"]
        if isinstance(row.get("clip"), int):
            self._clips[row["id"], row["condition"]] = row["clip"]
        if isinstance(row.get("visual_tokens"), float):
            self.visual_tokens[row["id"], row["condition"]] = row["visual_tokens"]
        if row.get("damaged"):
            self.damaged.add(row["id"])

    def __len__(self) -> int:
        return len(self.responses)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.responses

    def __getitem__(self, key: tuple[str, str]) -> str:
        return self.responses[key]


def clip_size(item: Item) -> int | None:
    """Bytes of an item's clip, or the number of frames in its folder; None where it is gone."""
    path = item.media_path
    try:
        return len(list(path.iterdir())) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) and all(isinstance(row.get(k), str) for k in FIELDS[:4]) else None
