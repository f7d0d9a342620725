"""The media doctor: what a file of a data set is, and what is wrong with it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.data.media.containers import open_container, picture_stream
from mmllm.data.media.damage import Spans, describe
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.sampling import SAMPLERS, Sampling
from mmllm.data.media.types import VIDEO_SUFFIXES, MediaRef, Probe, kind_of

HOLES = ("missing", "broken", "mixed up", "out of bounds")
"""Problems that would stop a run."""
NOTES = ("corrupt", "damaged", "short", "variable rate", "still")
"""Problems of files that can be read but may not be what was meant."""
PACKETS = 3000
"""Number of packets checked for the rate: two minutes at 25 frames per second."""
LOOK = 2
"""Raise this when more is checked: facts from earlier checks are then no longer enough."""
REORDERED = 16
"""At most this many of the latest time stamps may have gaps that packets stored later fill."""
UNEVEN = 0.1
"""Relative amount by which the intervals between frames may differ."""


@dataclass
class MediaFile:
    """A file, and what the samples say about it: their names (the first few), their number, and their bounds."""

    kind: str
    path: str
    fps: float | None = None
    ids: list[str] = field(default_factory=list)
    samples: int = 0
    bounds: set[tuple[float | None, float | None]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The name under which its facts are kept."""
        return f"{self.kind} {self.path}" + ("" if self.fps is None else f" at {self.fps:g}")


def examine(
    media: Sequence[MediaFile],
    known: dict[str, dict[str, Any]],
    quick: bool = False,
    jobs: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield facts about every medium as they come; unchanged files with `known` facts are not examined again.

    Args:
        known: earlier facts, by name.
        quick: read headers only.
        jobs: files examined at a time.
    """
    left = []
    for medium in media:
        facts = known.get(medium.name)
        if facts is not None and _holds(facts, medium, quick):
            yield facts
        else:
            left.append(medium)
    # every reader has its own process, which is stopped if a file makes it hang
    readers: SimpleQueue[GuardedReader] = SimpleQueue()
    made = [GuardedReader() for _ in range(max(1, min(jobs, len(left))))]
    for reader in made:
        readers.put(reader)

    def run(medium: MediaFile) -> dict[str, Any]:
        reader = readers.get()
        try:
            facts, texts = inspect(medium, reader, quick), dict.fromkeys(heard.take())
            if not any(name in HOLES for name, _ in facts["problems"]):
                told = {text for _, text in facts["problems"]}
                facts["problems"] += [["damaged", text] for text in texts if text not in told]
            return facts
        finally:
            readers.put(reader)

    heard = _LogCapture()
    pool = ThreadPoolExecutor(len(made))
    try:
        for future in as_completed([pool.submit(run, medium) for medium in left]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        heard.close()
        for reader in made:
            reader.close()


class _LogCapture(logging.Handler):
    """Captures the readers' warnings, per thread, so that they are reported with the file and not in between."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.here = threading.local()
        self.logger = logging.getLogger("mmllm.data")
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Record one log record."""
        self.here.texts = [*getattr(self.here, "texts", []), record.getMessage()]

    def take(self) -> list[str]:
        """What this thread has recorded since the last call."""
        texts, self.here.texts = getattr(self.here, "texts", []), []
        return texts

    def close(self) -> None:
        """Let the readers warn as before."""
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagate
        super().close()


def inspect(medium: MediaFile, reader: GuardedReader, quick: bool = False) -> dict[str, Any]:
    """Describe a file: `size`, `mtime`, `frames`, `rate` (frames per second), `seconds`, and its `problems`."""
    size, mtime = _stamp(medium.path)
    facts: dict[str, Any] = {"name": medium.name, "kind": medium.kind, "path": medium.path, "size": size}
    facts |= {"mtime": mtime, "look": LOOK, "quick": quick, "bounds": _listed(medium.bounds), "problems": []}
    kind = kind_of(medium.path)
    try:
        ref = MediaRef(medium.kind, medium.path, fps=medium.fps)
        header = reader.probe(ref)
        facts |= {"frames": header.frames, "rate": header.fps, "seconds": header.duration}
        if not quick:
            met = dict.fromkeys(describe(ref.describe(), spans) for spans in _decode(ref, reader) if spans)
            facts["problems"] += [["corrupt", text] for text in met]
    except UserError as error:
        video = kind == "folder" or Path(medium.path).suffix.lower() in VIDEO_SUFFIXES
        name = "missing" if mtime is None else "mixed up" if medium.kind == "image" and video else "broken"
        facts["problems"].append([name, str(error)])
        return facts
    for start, end in medium.bounds - {(None, None)}:
        try:
            reader.probe(MediaRef(medium.kind, medium.path, start, end, medium.fps))
        except UserError as error:
            facts["problems"].append(["out of bounds", str(error)])
    if header.kind == "image" and medium.kind == "video":
        facts["problems"].append(["still", f"{medium.path}: a video item names an image, it is read as one frame"])
    spread = None
    if header.kind == "video" and not quick:
        with suppress(UserError):  # problems with the file are reported above
            spread = rate_spread(medium.path)
    if spread is not None:
        text = f"{medium.path}: frames come every {spread[0] * 1000:.0f} to {spread[1] * 1000:.0f} ms"
        facts["problems"].append(["variable rate", text])
    return facts


def _decode(ref: MediaRef, reader: GuardedReader) -> list[Spans]:
    """Decode the first, the middle and the last frame and keep none; returns the damage that each read has met."""
    # the sampler that includes both ends
    sampler = next(name for name, sampler in SAMPLERS.items() if sampler(0, 9, 2) == [0, 9])
    clips = [reader.read(ref, Sampling(frames=3, sampler=sampler), lambda picture: None)]
    if clips[0].repeated:
        # one frame fewer than the header says is common; losing more than a twentieth means a truncated file
        clips.append(reader.read(ref, Sampling(frames=20, sampler=sampler), lambda picture: None))
    return [clip.corrupt for clip in clips]


def rate_spread(path: str) -> tuple[float, float] | None:
    """(shortest, longest) seconds between two frames if they differ; None if the rate is constant."""
    import av

    times: list[int] = []
    with open_container(path) as container:
        stream = picture_stream(container, path)
        tick = float(stream.time_base)
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size:
                    times.append(packet.pts)
                if len(times) >= PACKETS:
                    break
        except (av.error.FFmpegError, OSError):
            pass  # damage that decoding coped with
    whole = len(times) < PACKETS
    times = sorted(times) if whole else sorted(times)[:-REORDERED]
    steps = [after - before for before, after in pairwise(times) if after > before]
    if len(steps) < 2:
        return None
    low, high = min(steps), max(steps)
    # time stamps are rounded to whole ticks
    return (low * tick, high * tick) if high - low > max(1, UNEVEN * median(steps)) else None


def problems(facts: dict[str, Any], frames: int) -> list[tuple[str, str]]:
    """(name, text) of each problem of a file; it is short if a sample's part of it has fewer frames than `frames`."""
    found = [(name, text) for name, text in facts["problems"]]
    if facts["kind"] == "image" or any(name in HOLES for name, _ in found):
        return found
    probe = Probe("video", facts["frames"], facts["rate"], 1, 1)
    for start, end in facts["bounds"]:
        low, high = start or 0.0, probe.duration if end is None else min(end, probe.duration)
        count = facts["frames"] if start is None and end is None else round((high - low) * facts["rate"])
        if count < frames:
            where = MediaRef("video", facts["path"], start, end).describe()
            found.append(("short", f"{where}: {count} frames, {frames} are asked for"))
    return found


def _holds(facts: dict[str, Any], medium: MediaFile, quick: bool) -> bool:
    """Whether facts from an earlier check still answer everything that is asked."""
    size, mtime = _stamp(medium.path)
    same = facts.get("mtime") is not None and (facts["size"], facts["mtime"], facts.get("look")) == (size, mtime, LOOK)
    return same and (quick or not facts["quick"]) and facts["bounds"] == _listed(medium.bounds)


def _listed(bounds: set[tuple[float | None, float | None]]) -> list[list[float | None]]:
    ordered = sorted((tuple(-1.0 if side is None else side for side in pair), list(pair)) for pair in bounds)
    return [pair for _, pair in ordered]


def _stamp(path: str) -> tuple[int | None, int | None]:
    """(bytes, or entries of a folder; modification time in ns); None if it does not exist."""
    try:
        found = os.stat(path)
        return (len(os.listdir(path)) if os.path.isdir(path) else found.st_size), found.st_mtime_ns
    except (OSError, ValueError):
        return None, None
