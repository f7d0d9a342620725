"""Checking training data before a run: every record through its format, and the media that the records name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mmllm.contract.errors import UserError
from mmllm.data.media.doctor import MediaFile
from mmllm.data.records.conversations import Sample
from mmllm.data.records.entries import MEDIA
from mmllm.data.records.mix import open_entry, read_mix

ERRORS = 1000
"""Number of schema errors that are kept; all are counted."""
NAMED = 5
"""Number of samples recorded per medium."""
CHUNK = 256
"""Records that a thread takes at a time."""
LOCATORS = ("path", "url", "image", "video")


@dataclass
class Scan:
    """What the records contain.

    Attributes:
        records: their number.
        errors: the first errors.
        failed: number of records with an error.
        media: the files that they name.
        in_memory: number of media given as bytes, already decoded.
        as_video: how often `<image>` stands for a video.
    """

    records: int = 0
    errors: list[str] = field(default_factory=list)
    failed: int = 0
    media: dict[str, MediaFile] = field(default_factory=dict)
    in_memory: int = 0
    as_video: int = 0

    def refuse(self, error: UserError) -> None:
        """Record an error."""
        self.failed += 1
        if len(self.errors) < ERRORS:
            self.errors.append(str(error))

    def take(self, sample: Sample) -> None:
        """Record the media of a sample."""
        contents = [message["content"] for message in sample.messages]
        for entry in (entry for content in contents if isinstance(content, list) for entry in content):
            if entry["type"] not in MEDIA:
                continue
            self.as_video += entry.get("placeholder") == "<image>"
            source = next(entry[key] for key in LOCATORS if entry.get(key) is not None)
            if not isinstance(source, str):
                self.in_memory += 1
                continue
            medium = MediaFile(entry["type"], source, entry.get("fps"))
            medium = self.media.setdefault(medium.name, medium)
            medium.samples += 1
            medium.bounds.add((entry.get("start"), entry.get("end")))
            medium.ids = [*medium.ids, sample.id][:NAMED]

    def add(self, other: Scan) -> None:
        """Add the findings of another scan."""
        self.records += other.records
        self.failed += other.failed
        self.errors += other.errors[: ERRORS - len(self.errors)]
        self.in_memory += other.in_memory
        self.as_video += other.as_video
        for name, medium in other.media.items():
            own = self.media.setdefault(name, medium)
            if own is not medium:
                own.samples += medium.samples
                own.bounds |= medium.bounds
                own.ids = [*own.ids, *medium.ids][:NAMED]


def scan(
    paths: Sequence[str | Path],
    root: str | Path | None = None,
    spill: Path | None = None,
    limit: int | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Send every record through its format.

    Args:
        paths: data files, folders or mixes.
        root: the folder that media paths are relative to.
        spill: where bytes of videos are written.
        limit: only the first records of each data file.
        progress: called with (done, total).

    Raises:
        UserError: a file that is not a mix; errors in a data file are recorded.
    """
    found, parts = Scan(), []
    for path in paths:
        mix = read_mix(path, root)
        for entry in mix.entries:
            try:
                parts.append(open_entry(entry, mix.seed, spill))
            except UserError as error:
                found.refuse(error)
    sizes = [len(part) if limit is None else min(limit, len(part)) for part in parts]
    chunks = [
        (part, range(start, min(start + CHUNK, size)))
        for part, size in zip(parts, sizes, strict=True)
        for start in range(0, size, CHUNK)
    ]
    # threads are enough: most time goes into decoding pictures, and JSON is quick
    with ThreadPoolExecutor(jobs) as pool:
        for piece in pool.map(_scan_chunk, chunks):
            found.add(piece)
            progress(found.records, sum(sizes))
    return found


def _scan_chunk(chunk: tuple[Sequence[Sample], range]) -> Scan:
    part, numbers = chunk
    found = Scan(records=len(numbers))
    for number in numbers:
        try:
            found.take(part[number])
        except UserError as error:
            found.refuse(error)
    return found
