"""Tensors kept on disk under a hash of everything they depend on: complete or absent, bounded in size.

Several processes may read and write at the same time, and any of them may be killed at any moment: an entry is written
under a temporary name and renamed, and what cannot be read back counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

UNFINISHED = ".part"
ABANDONED = 600.0
"""Seconds after which an unfinished file is taken to belong to a writer that died."""
LOW_WATER = 0.9
"""Eviction goes down to this share of the limit, so that it does not happen at every write."""
TOUCH = 60.0
"""An entry used again within this many seconds is not marked again."""


def key_of(facts: object) -> str:
    """The hash of plain facts (maps, lists, numbers, texts), as hexadecimal text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class Rate:
    """How often an entry was found: `hits` of `hits + misses` look-ups."""

    hits: int = 0
    misses: int = 0

    def __str__(self) -> str:
        looked = self.hits + self.misses
        return f"{self.hits} of {looked} ({self.hits / looked:.0%})" if looked else "not used"


@dataclass
class DiskCache:
    """Maps of tensors by key, one safetensors file per entry.

    Args:
        folder: created when something is written.
        limit: bytes that all entries may take; the least recently used are evicted first. None = no limit.
    """

    folder: Path
    limit: int | None = None
    rate: Rate = field(default_factory=Rate)
    written: int = field(default=0, repr=False)

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, mapped into memory rather than read; None if there is no entry."""
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except OSError:
            self.rate.misses += 1
            return None
        except SafetensorError:
            # the disk was full or lost power: worth recomputing, not worth stopping for
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            self.rate.misses += 1
            return None
        with contextlib.suppress(OSError):  # another user's entry
            if time.time() - path.stat().st_mtime > TOUCH:
                os.utime(path)
        self.rate.hits += 1
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors; readers see all of them or none. What cannot be written is not kept, with a warning."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.path(key)
        fresh = path.parent / f"{uuid4().hex}{UNFINISHED}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, fresh)
            size = fresh.stat().st_size
            fresh.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            log.warning("%s: nothing more can be kept (%s)", self.folder, error)
            return
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        self.written += size
        # Scan the folder each time a twentieth of the limit was written here: other processes write too.
        if self.limit is not None and self.written >= self.limit // 20:
            self.written = 0
            self.evict()

    def size(self) -> int:
        """Bytes taken by all entries."""
        return sum(size for _, size, _ in self._entries())

    def evict(self) -> None:
        """Remove the least recently used entries until the rest is well below the limit, and abandoned files."""
        now = time.time()
        for path in self.folder.glob(f"*/*{UNFINISHED}"):
            if _age(path, now) > ABANDONED:
                _remove(path)
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if self.limit is None or total <= self.limit:
            return
        for _, size, path in entries:
            if total <= LOW_WATER * self.limit:
                break
            total -= size if _remove(path) else 0

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, file) of every entry."""
        entries = []
        for path in self.folder.glob("*/*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            entries.append((status.st_mtime, status.st_size, path))
        return entries


def _remove(path: Path) -> bool:
    """Remove an entry; in a shared cache, another user's may have to stay."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Digests:
    """Content digests of media files, each read once: remembered by path, size and modification time.

    Args:
        file: an SQLite file that several processes share.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection: tuple[int, sqlite3.Connection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connection": None}

    def __call__(self, path: str) -> str:
        """The digest of a file, or of all files in a folder of frames.

        Raises:
            OSError: it cannot be read.
        """
        path = Path(path)
        if not path.is_dir():
            return self._file(path)
        parts = [[entry.name, self._file(entry)] for entry in sorted(path.iterdir()) if entry.is_file()]
        return key_of(parts)

    def _file(self, path: Path) -> str:
        status, name = path.stat(), str(path.resolve())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")  # opening a pipe would wait forever
        stamp = (status.st_size, status.st_mtime_ns)
        database = self._open()
        row = database.execute("SELECT size, changed, digest FROM digests WHERE path = ?", (name,)).fetchone()
        if row is not None and row[:2] == stamp:
            return row[2]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with database:
            database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (name, *stamp, digest))
        return digest

    def _open(self) -> sqlite3.Connection:
        """A connection of this process: one must not survive a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.file, timeout=60, check_same_thread=False)
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INT, changed INT, digest TEXT)"
                )
            self._connection = (os.getpid(), connection)
        return self._connection[1]
