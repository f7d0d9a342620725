"""Hugging Face datasets: Parquet or Arrow files, or a folder of them, with media as bytes or paths.

The library converts Parquet to memory-mapped Arrow files once, in the cache folder, so that any row is read without
its neighbours. Rows are read as stored: the library's own decoders are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.data.records.conversations import Sample, Source, files_of
from mmllm.data.records.formats.turns import conversation

SUFFIXES = frozenset({".parquet", ".arrow"})


@register("format", "parquet")
class Parquet(Source):
    """Columns `conversations`, `messages`, `texts` or `prompt`, and `image(s)`, `video(s)`: bytes, paths or structs."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the suffix."""
        return path.suffix in SUFFIXES

    def open_records(self) -> Sequence[tuple[dict[str, Any], str]]:
        """See :class:`Source`."""
        return _Rows(self.path, self.spill)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        return conversation(record, where, self.root, self.spill)


class _Rows(Sequence):
    """Rows as (record, `file:row`)."""

    def __init__(self, path: Path, spill: Path) -> None:
        try:
            from datasets import Dataset, concatenate_datasets
        except ImportError as error:
            hint = 'pip install "mmllm[data]"'
            raise UserError(path, "Parquet and Arrow need the library datasets", hint=hint) from error
        self.path, files = path, [file for file in files_of(path) if file.suffix in SUFFIXES]
        try:
            if files[0].suffix == ".arrow":
                rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
            else:
                rows = Dataset.from_parquet([str(file) for file in files], cache_dir=str(spill / "arrow"))
        except Exception as error:  # the library wraps Arrow's errors in its own
            cause = error.__cause__ or error
            raise UserError(path, f"cannot be read ({str(cause)[:200]})", hint="download it again") from error
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        index = range(len(self))[index]
        return self.rows[index].to_pylist()[0], f"{self.path}:row {index + 1}"
