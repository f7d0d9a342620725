"""One question of a benchmark, and how annotation files become questions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmllm.contract.errors import UserError, shown
from mmllm.contract.grounding import Box, TimeSpan, Tube
from mmllm.data.records.json_files import read_json

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question about one clip.

    Attributes:
        benchmark: name of the benchmark (``mvbench``).
        task: name of the task as printed (``Action Sequence``).
        id: stable key, unique in the benchmark; it changes when the question, its options or its clip change.
        media_path: the file, or for `frame_folder` the folder of frames; it may not exist.
        start: first second of the bound, or None for the whole clip.
        end: last second of the bound, or None.
        frame_folder: True where `media_path` is a folder of ``00001.jpg``, ... at 3 frames per second.
        question: the question as written in the file.
        options: option texts in order; empty for `kind` "open".
        answer: text of the right answer.
        gold: letter of the first option whose text equals `answer`, or None.
        video: path of the clip relative to the video folder; items on the same clip share it.
        kind: "choice", "grounding" for an answer that says when and where, or "open" for one that a judge would score.
        truth: of a grounding item, in shares of the clip and the frame.
        frames: of a grounding item, those of its clip.
    """

    benchmark: str
    task: str
    id: str
    media_path: Path
    start: float | None
    end: float | None
    frame_folder: bool
    question: str
    options: tuple[str, ...]
    answer: str
    gold: str | None
    video: str
    kind: str = "choice"
    truth: TimeSpan | Box | Tube | None = None
    frames: int = 0

    def is_right(self, letter: str | None) -> bool:
        """True where the chosen option's *text* is the answer (several options may have the same text)."""
        index = -1 if letter is None else LETTERS.index(letter)
        return 0 <= index < len(self.options) and self.options[index] == self.answer


@dataclass(frozen=True)
class TaskRow:
    """One row of a benchmark's task table.

    Attributes:
        name: as printed, and the key of reports.
        abbr: short name used by papers.
        stem: name of the annotation file without ``.json``.
        folder: the authors' folder of the clips under ``video/``.
    """

    name: str
    abbr: str
    stem: str
    folder: str


Task = TypeVar("Task", bound=TaskRow)


def items_of(tasks: Iterable[Task], folder: Path, item: Callable[[Task, int, dict[str, Any], str], Item]) -> list[Item]:
    """The items of all tasks, in the order of the table and of the files.

    Args:
        tasks: the task table.
        folder: of the annotation files.
        item: called with a task, an index, the record, and where it stands, for errors.

    Raises:
        UserError: a file is missing, or an item is malformed (named by file, index and key).
    """
    found = []
    for task in tasks:
        path = folder / f"{task.stem}.json"
        found += [item(task, index, row, f"{path}:item {index}") for index, row in enumerate(read_rows(path))]
    return found


def gold_letter(options: tuple[str, ...], answer: str) -> str | None:
    """Letter of the first option that equals the answer exactly, or None."""
    return LETTERS[options.index(answer)] if answer in options else None


def defect_of_choice(item: Item) -> str | None:
    """Why a multiple-choice item cannot be scored, or None if it can."""
    if not any(option.strip() for option in item.options):
        return "all options are empty"
    if not item.answer.strip():
        return "the answer is empty"
    return None if item.gold else "the answer is not among the options"


def gold_missing(item: Item) -> str | None:
    """Why a grounding item cannot be scored, or None if it can."""
    return "there is no truth to compare with" if item.truth is None else None


def misplaced(item: Item) -> str | None:
    """Why an item's path or bound cannot refer to a clip, or None if it can."""
    # an absolute path replaces the folders before it
    absolute = "//" in item.video and item.media_path == Path("/" + item.video.partition("//")[2])
    if absolute or ".." in Path(item.video).parts:
        return f"its path {item.video} leaves the benchmark's folder"
    start, end = item.start if item.start is not None else 0.0, item.end
    if not 0 <= start < math.inf or (end is not None and not start < end < math.inf):
        return f"its bound is {item.start} to {item.end} s"
    return None


def item_id(benchmark: str, task_key: str, index: int, *content: object) -> str:
    """``benchmark/task/index/digest``; the digest covers what the question asks."""
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:10]
    return f"{benchmark}/{task_key}/{index:04d}/{digest}"


def media_exists(item: Item) -> bool:
    """True where the clip (a file, or a folder for frames) is on disk."""
    return item.media_path.is_dir() if item.frame_folder else item.media_path.is_file()


def need_root(root: Path, benchmark: str) -> None:
    """Raise UserError where the benchmark's folder does not exist."""
    if not root.is_dir():
        raise UserError(
            root, f"no folder for {benchmark}", hint=f"--root {benchmark}=FOLDER, the one that holds json/ and video/"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The items of one annotation file, a JSON list of objects.

    Raises:
        UserError: the file is missing, is not JSON, or is not a list of objects.
    """
    if not path.is_file():
        raise UserError(
            path, "annotation file missing", hint="download the json files of the benchmark into this folder"
        )
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(path, "wrong content", expected="a JSON list of items", got=type(rows).__name__)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}:item {index}", "wrong item", expected="an object", got=type(row).__name__)
    return rows


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A string field of an item; a number is converted to its digits.

    Raises:
        UserError: the key is missing or holds something else.
    """
    if key not in row:
        raise UserError(
            f"{where}:{key}", "key missing", expected="a string", got=f"keys {', '.join(sorted(row)) or 'none'}"
        )
    return _text(row[key], f"{where}:{key}")


def options_of(row: dict[str, Any], where: str, key: str = "candidates") -> tuple[str, ...]:
    """The option texts of an item, at most 26 of them.

    Raises:
        UserError: the key is missing, is not a list of strings, or is too long.
    """
    value = row.get(key)
    if not isinstance(value, list):
        got = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}:{key}", "wrong options", expected="a list of strings", got=got)
    if len(value) > len(LETTERS):
        raise UserError(f"{where}:{key}", "too many options", expected="at most 26", got=len(value))
    return tuple(_text(option, f"{where}:{key}[{index}]") for index, option in enumerate(value))


def seconds_of(row: dict[str, Any], key: str, where: str) -> float:
    """A bound of an item, in seconds.

    Raises:
        UserError: the key is missing or is not a number.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = "nothing" if value is None else shown(value)
        raise UserError(f"{where}:{key}", "wrong bound", expected="a number of seconds", got=got)
    try:
        return float(value)
    except OverflowError:  # an integer too large for a float
        return math.inf if value > 0 else -math.inf


def _text(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(where, "wrong value", expected="a string", got=type(value).__name__)
    return str(value)
