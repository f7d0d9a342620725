"""WebDataset shards: tar files in which the files of one sample share their name up to the first dot.

The library groups the members into samples. One pass over the headers notes where each member lies, so that any
sample is read without those before it; therefore a shard must not be compressed.
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.data.media.types import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from mmllm.data.records.conversations import Sample, Source, files_of
from mmllm.data.records.formats.turns import conversation
from mmllm.data.records.json_files import parse_json


@register("format", "webdataset")
class WebDataset(Source):
    """`.json` contains the turns as in the other formats, or `.txt` a caption; images and videos lie beside it."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the suffix."""
        return path.suffix == ".tar"

    def open_records(self) -> Sequence[tuple[dict[str, Any], str]]:
        """See :class:`Source`."""
        return _Members(self.path)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        caption = record.pop("txt", None)
        turns = None if caption is None else [("user", ""), ("assistant", caption.strip())]
        return conversation(record, where, self.root, self.spill, turns)


class _Members(Sequence):
    """Samples as (record, `shard:key`): the fields of the JSON member, and the bytes of the media."""

    def __init__(self, path: Path) -> None:
        try:
            from webdataset.tariterators import group_by_keys
        except ImportError as error:
            hint = 'pip install "mmllm[data]"'
            raise UserError(path, "tar shards need the library webdataset", hint=hint) from error
        self.shards = [file for file in files_of(path) if file.suffix == ".tar"]
        # one string for all: a million small objects would be copied into every worker
        self.index, self.starts = bytearray(), array("q", [0])
        for number, shard in enumerate(self.shards):
            try:
                for group in group_by_keys(_headers(shard)):
                    key = group.pop("__key__")
                    members = {suffix: member for suffix, member in group.items() if not suffix.startswith("__")}
                    self.index += json.dumps([number, key, members]).encode()
                    self.starts.append(len(self.index))
            except (tarfile.TarError, OSError, ValueError) as error:
                hint = "an uncompressed tar, not cut off"
                raise UserError(shard, f"not a readable tar shard ({error.args[0]})", hint=hint) from error

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        index = range(len(self))[index]
        number, key, members = json.loads(self.index[self.starts[index] : self.starts[index + 1]])
        where = f"{self.shards[number]}:{key}"
        record: dict[str, Any] = {}
        found: dict[str, list[dict[str, Any]]] = {"image": [], "video": []}
        with self.shards[number].open("rb") as file:
            for suffix, (start, size) in members.items():
                file.seek(start)
                content, last = file.read(size), "." + suffix.rpartition(".")[2]
                if suffix == "json":
                    record |= _fields(content, where)
                elif suffix == "txt":
                    record["txt"] = content.decode(errors="replace")
                for kind, suffixes in (("image", IMAGE_SUFFIXES), ("video", VIDEO_SUFFIXES)):
                    if last in suffixes:
                        found[kind].append({"bytes": content, "path": f"member{last}"})
        if any(member in record for member in ("conversations", "messages", "texts", "prompt")):
            record.pop("txt", None)
        return {"id": key, **record, **{kind: entries for kind, entries in found.items() if entries}}, where


def _headers(shard: Path) -> Iterator[dict[str, Any]]:
    """Members in the form that the library's grouping takes, with (byte, size) in place of the content."""
    with tarfile.open(shard, "r:") as file:
        while (member := file.next()) is not None:
            if member.isreg() and not member.name.startswith("__"):
                yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(shard)}
            file.members = []
        # the library takes the end of the file as the end of the archive, which is really a block of zeros
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off")


def _fields(content: bytes, where: str) -> dict[str, Any]:
    fields = parse_json(content, f"{where}:json")
    return fields if isinstance(fields, dict) else {"conversations": fields}
