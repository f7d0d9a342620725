"""Conversations: the one type that all training data becomes, and how a file of any format becomes a set of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.registry import parts
from mmllm.data.records.entries import MEDIA, content_entries
from mmllm.data.records.formats.records import CONTAINERS, JsonRecords, first_record
from mmllm.data.records.json_files import short

NAMES, BRACES = 100_000, 8
"""Upper limits of files a name with braces stands for, and of its braces."""
DIGITS = re.compile(r"\{(\d{19,}\.\.|\d+\.\.\d{19,})")
"""Upper limit of digits of a number in braces: more than there are files, and Python refuses thousands of digits."""
ENTRIES = 100_000
"""Upper limit of files and folders in a folder of data."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: its name in errors.
        messages: chat messages; paths of media are absolute or relative to the current folder.
        fields: everything else in the record (`chosen`, `rejected`, ...).
        draw: in training, a seed for whatever is drawn about it; another one in each epoch.
    """

    id: str
    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    draw: int = 0

    def media(self) -> list[dict[str, Any]]:
        """Its content entries that are media, in order."""
        entries = (entry for message in self.messages for entry in content_entries(message))
        return [entry for entry in entries if entry["type"] in MEDIA]

    def answers(self) -> list[str]:
        """The text of each of the assistant's turns."""
        turns = [content_entries(message) for message in self.messages if message["role"] == "assistant"]
        return [" ".join(entry["text"] for entry in turn if entry["type"] == "text") for turn in turns]


class Source(Sequence):
    """The samples of one data file, read on demand; each format is a subclass.

    Args:
        path: the file, a folder, or a name with braces for several shards.
        root: the folder that media paths are relative to; default: the folder of the file.
        spill: where videos given as bytes in the data are written, once each; default: `default_spill()`.

    Raises:
        UserError: the file is missing, empty or broken.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, spill: Path | None = None) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.spill = spill or default_spill()
        self.records = self.open_records()
        if not len(self.records):
            raise UserError(self.path, "the data file is empty")

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """Whether a file is of this format; `first` is its first record if it is JSON."""
        raise NotImplementedError

    def open_records(self) -> Sequence[tuple[dict[str, Any], str]]:
        """The records as (record, its location), by index; cheap to pass to a worker."""
        return JsonRecords(self.path)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample that a record stands for.

        Raises:
            UserError: `file:line:key`, and what is wrong there.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(*self.records[index])


def open_source(
    path: str | Path, root: str | Path | None = None, name: str | None = None, spill: Path | None = None
) -> Source:
    """Open a data file as samples, in the format called `name` or the one that recognises the file.

    Raises:
        UserError: missing, empty, or of an unknown format; the message lists the formats and the keys that were seen.
    """
    files = files_of(path)
    if name is not None:
        known = parts("format")
        if name not in known:
            raise UserError(f"{path}: format {name!r}", "no such format", hint=nearest(name, list(known)))
        return known[name](path, root, spill)
    first = first_record(files[0])
    for cls in parts("format").values():
        if cls.recognises(files[0], first):
            return cls(path, root, spill)
    formats = ", ".join(parts("format"))
    if first is None:
        raise UserError(path, "no format recognises this file", expected=f"one of {formats}")
    keys = ", ".join(map(str, first)) or "no keys"
    what = "missing, and the record fits no other format"
    raise UserError(f"{files[0]}:1:messages", what, expected=f"one of {formats}", got=keys)


def files_of(path: str | Path) -> list[Path]:
    """The files behind a path: itself, a folder's Parquet, Arrow or tar files, or the files that its braces stand for.

    If a folder's files or subfolders are named by split, only `train*` are used.

    Raises:
        UserError: one does not exist, or the folder contains no data.
    """
    path = Path(path)
    if exists(path) and path.is_dir():
        files = sorted(_containers(path))
        inside = {file: file.relative_to(path).parts for file in files}
        files = [file for file in files if any(part.startswith("train") for part in inside[file])] or files
        if not files:
            raise UserError(path, "the folder contains no data", expected="Parquet or Arrow files, or tar shards")
        return files
    files = [path] if exists(path) and path.is_file() else [Path(text) for text in expand_braces(str(path))]
    for file in files:
        if not (exists(file) and file.is_file()):
            expected = "a file of conversations (.jsonl, .json, .parquet, .tar), a folder of them, or a mix (.yaml)"
            raise UserError(file, "no such data file", expected=expected)
    return files


def exists(path: Path) -> bool:
    """Whether a file or folder of this name exists; False for a name too long for any file."""
    try:
        return path.exists()
    except OSError:
        return False


def expand_braces(text: str) -> list[str]:
    """`a_{x,y}.json` as two names and `s-{00..12}.tar` as thirteen; a name without braces as itself.

    Raises:
        UserError: an implausible number of names.
    """
    names = [] if text.count("{") > BRACES or DIGITS.search(text) else list(islice(_names(text), NAMES + 1))
    if not names or len(names) > NAMES:
        expected = f"at most {BRACES} braces that stand for {NAMES} files"
        raise UserError(short(text), "its braces stand for too many files", expected=expected)
    return names


def _names(text: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    inside: Iterable[str] = (name.strip() for name in match[1].split(","))
    if span:
        numbers = range(int(span[1]), int(span[2]) + 1)
        if not numbers:
            raise UserError(short(text), f"the braces {{{match[1]}}} stand for no file", hint="first..last")
        inside = (str(number).zfill(len(span[1])) for number in numbers)
    before, after = text[: match.start()], text[match.end() :]
    for name in inside:
        yield from _names(before + name + after)


def _containers(folder: Path) -> Iterator[Path]:
    """The Parquet, Arrow and tar files below a folder, however deep.

    Raises:
        UserError: too many entries for a folder of data.
    """
    waiting, seen = [folder], 0
    while waiting:
        # unreadable folders are skipped, and links to folders are not followed
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > ENTRIES:
                    what = f"not a folder of data, it holds more than {ENTRIES} entries"
                    raise UserError(folder, what, hint="name the folder or the files that hold the data")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif Path(entry.name).suffix in CONTAINERS:
                    yield Path(entry.path)


def default_spill() -> Path:
    """`media/files` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmllm" / "media" / "files"
