"""Records of JSON files by byte offset: a JSON array or one object per line; nothing parsed is kept.

One pass finds where each record begins. A loader worker gets only two arrays of integers, so a file of a million
records costs it 16 MB, whatever the records contain.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mmllm.contract.errors import UserError
from mmllm.data.records.json_files import not_json, parse_json, short

BLOCK = 1 << 24
"""Bytes read at a time while scanning an array."""
JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
CONTAINERS = frozenset({".parquet", ".arrow", ".tar"})
"""Suffixes of files that are not JSON; a folder of data consists of these."""
BLANK = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class JsonRecords(Sequence):
    """Records of a JSON file as (record, `file:line`).

    Raises:
        UserError: not JSON, not UTF-8, or a record that is not an object; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_array = path, _first_byte(path) == b"["
        self.starts, self.lines = array("q"), array("q")
        for start, line in _array_starts(path) if self.is_array else _line_starts(path):
            self.starts.append(start)
            self.lines.append(line)
        # in an array on a single line all records have the same line number: they are counted instead
        self.on_one_line = self.is_array and len(set(self.lines)) == 1 < len(self.lines)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        index = range(len(self.starts))[index]
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            last = index + 1 == len(self.starts)
            text = file.read(-1 if last else self.starts[index + 1] - self.starts[index])
        line = f"record {index + 1}" if self.on_one_line else self.lines[index]
        where = f"{self.path}:{line}"
        # in an array, a record is known to be followed by a comma or the end
        value = parse_json(text, where, followed=self.is_array)
        if not isinstance(value, dict):
            raise UserError(where, "not a record", expected="an object with named fields", got=short(value))
        return value, where


def first_record(path: Path) -> dict[str, Any] | None:
    """The first record of a JSON file; None if the file is of another kind.

    Raises:
        UserError: the file is empty, or is not JSON although its name says so.
    """
    if path.suffix in CONTAINERS:
        return None
    first = _first_byte(path)
    if not first:
        raise UserError(path, "the data file is empty")
    if first == b"[":
        value = next(iter(_array_values(path)), (0, 0, None))[2]
        if value is None:
            raise UserError(path, "the data file is empty")
    elif first == b"{" or path.suffix in JSON_SUFFIXES:
        with path.open("rb") as file:
            line = next(line for line in file if line.strip())
        value = parse_json(line, f"{path}:1", expected="an array of records or one record per line")
    else:
        return None
    return value if isinstance(value, dict) else {}


def _first_byte(path: Path) -> bytes:
    """The first non-blank byte; empty for an empty file."""
    with path.open("rb") as file:
        while block := file.read(4096):
            text = block.removeprefix(codecs.BOM_UTF8).lstrip()
            if text:
                return text[:1]
    return b""


def _line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """(byte, line) of every non-blank line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield start, number
            start += len(line)


def _array_starts(path: Path) -> Iterator[tuple[int, int]]:
    """(byte, line) of every element of an array."""
    for start, line, _ in _array_values(path):
        yield start, line


def _array_values(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(byte, line, value) of every element of an array, reading one block at a time."""
    with path.open("rb") as file:
        window = _Window(path, file)
        window.peek()
        window.advance(1)
        if window.peek() == "]":
            return
        while True:
            window.peek()
            start, line = window.start, window.line
            yield start, line, window.value()
            after = window.peek()
            if after == "]":
                return
            if after != ",":
                what = f"not JSON: {after!r} after a record" if after else "the array does not end, it is cut off"
                raise UserError(f"{path}:{window.line}", what, expected="a comma or ]")
            window.advance(1)


class _Window:
    """The part of a file being scanned: its text, and the byte and line where it begins."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.start, self.line = "", 0, 0, 1
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        if file.read(3) == codecs.BOM_UTF8:
            self.start = 3
        else:
            file.seek(0)

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        block = self.file.read(BLOCK)
        try:
            self.text = self.text[self.at :] + self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}:{self.line}", f"not UTF-8 ({error.reason})") from error
        self.at = 0
        return bool(block)

    def advance(self, characters: int) -> None:
        """Move forward by some characters."""
        passed = self.text[self.at : self.at + characters]
        self.start += characters if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")
        self.at += characters

    def peek(self) -> str:
        """The next non-blank character; empty at the end of the file."""
        while True:
            self.advance(BLANK.match(self.text, self.at).end() - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The value that begins here; reads on if it is incomplete so far."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut and self.more():
                    continue
                line = self.line + self.text.count("\n", self.at, error.pos)
                raise UserError(f"{self.path}:{line}", f"not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise not_json(error, f"{self.path}:{self.line}") from error
            if end == len(self.text) and self.more():
                continue
            self.advance(end - self.at)
            return value
