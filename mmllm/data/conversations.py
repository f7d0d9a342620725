"""Training data: one JSON object a line, a conversation with the paths of its media."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: its name in errors. messages: chat messages with content lists; paths are absolute or relative to the
            current folder. fields: everything else on the line (`chosen`, `rejected`, ...).
    """

    id: str
    messages: list[dict[str, Any]]
    fields: dict[str, Any]


class ConversationFile(Sequence):
    """A `.jsonl` file of `{"id", "messages", ...}`; lines are read when they are asked for.

    Args:
        path: the file; media paths in it are relative to its folder.

    Raises:
        UserError: the file is missing or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(self.path, "no such data file", expected="a .jsonl file of conversations")
        self.offsets, start = [], 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    self.offsets.append(start)
                start += len(line)
        if not self.offsets:
            raise UserError(self.path, "the data file is empty")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Sample:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            text = file.readline()
        where = f"{self.path}:{index + 1}"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(where, f"not JSON ({error})") from error
        if not isinstance(data, dict) or not isinstance(data.get("messages"), list) or not data["messages"]:
            raise UserError(f"{where}:messages", "missing", expected="a list of messages")
        for message in data["messages"]:
            self._resolve(message, where)
        fields = {key: value for key, value in data.items() if key not in ("id", "messages")}
        return Sample(str(data.get("id", where)), data["messages"], fields)

    def _resolve(self, message: dict[str, Any], where: str) -> None:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"{where}:messages", "a message needs role and content", got=str(message)[:60])
        for entry in message["content"] if isinstance(message["content"], list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                entry["path"] = str(self.path.parent / entry["path"])


class Joined(Sequence):
    """Several files one after the other."""

    def __init__(self, files: list[ConversationFile]) -> None:
        self.files = files

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __getitem__(self, index: int) -> Sample:
        for file in self.files:
            if index < len(file):
                return file[index]
            index -= len(file)
        raise IndexError(index)
