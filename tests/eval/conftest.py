"""A miniature MVBench: twenty tasks, one group of four items each, on empty clip files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmllm.eval.mvbench import TASKS

OPTIONS = ["red", "green", "blue", "not sure"]


@pytest.fixture
def mvbench_root(tmp_path: Path) -> Path:
    """Folder in MVBench's layout: 80 items, the right letter visits A to D in each task."""
    root = tmp_path / "MVBench"
    (root / "json").mkdir(parents=True)
    for task in TASKS:
        folder = root / "video" / task.folder
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for place, answer in enumerate(OPTIONS):
            video = f"{task.stem}_{place}" + ("" if task.reader == "frame" else ".mp4")
            (folder / video).mkdir() if task.reader == "frame" else (folder / video).touch()
            row: dict[str, Any] = {"video": video, "question": f"{task.name}?", "candidates": OPTIONS, "answer": answer}
            rows.append({**row, "start": 1.0, "end": 2.5, "subtitle": "x"} if task.bounded else row)
        (root / "json" / f"{task.stem}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[Any], Any]], None]:
    """A function that rewrites a JSON file through another function."""

    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit
