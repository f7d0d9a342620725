"""Files that are complete or absent, whatever stops the program, and folders held by one command at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from mmllm.contract.errors import UserError

LOCK = ".lock"
"""Lock file of the process working in a folder; its text says which process that is."""

TRIES = 1000
"""How often the folder may vanish at the very moment of locking before we give up."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def disk_error(error: OSError, where: object = None) -> UserError | None:
    """A system error about a file, for the user; None if it is not about reading or writing one.

    Args:
        where: the file that was written, if the error itself names none.
    """
    hints = {
        FULL: "free some space; the same command continues",
        DENIED: "use another folder, or change its permissions",
        NO_FOLDER: "another path",
    }
    for codes, hint in hints.items():
        if error.errno in codes:
            file = error.filename2 or error.filename or where or "a file"
            return UserError(os.fsdecode(file), (error.strerror or str(error)).lower(), hint=hint)
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain why a library cannot write below `path`: each wraps the system's error in its own way.

    Raises:
        UserError: the disk is full, or writing is not permitted.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = disk_error(error, path) if isinstance(error, OSError) else None
        if found is None and _says_full(error):
            found = disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path)
        if found is None:
            raise
        raise found from error


def _says_full(error: BaseException) -> bool:
    """Whether a library's error comes from a failed write: safetensors and torch keep only its text."""
    text = str(error)
    texts = ("No space left", "File too large", "Disk quota exceeded", "PytorchStreamWriter", "unexpected pos")
    return any(part in text for part in texts)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to. It replaces `path` at the end, and is removed if writing fails.

    Raises:
        UserError: the disk is full, or writing is not permitted.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            yield fresh
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all.

    Raises:
        UserError: the disk is full, or writing is not permitted.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, complete or not at all.

    Raises:
        UserError: see `write_text`.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines to a text file and flush them; they start on a new line even if an earlier write was cut off.

    Raises:
        UserError: the disk is full, or writing is not permitted.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                file.write(b"\n" if torn else b"")
            file.write("".join(f"{line}\n" for line in lines).encode())


def read_record(path: Path, hint: str = "delete it, or use another --out") -> dict[str, Any]:
    """Read a JSON object written by this program.

    Args:
        hint: what to do about a damaged one.

    Raises:
        UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(path, "damaged, not JSON", hint=hint) from error
    if not isinstance(value, dict):
        raise UserError(path, "damaged, not a map", hint=hint)
    return value


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. A process that dies releases it, and so do its children.

    A folder that was created for this and is still empty is removed again.

    Raises:
        UserError: another process holds it (the error says which), or the folder cannot be created.
    """
    with writing(folder):
        file, made = _locked(folder)
    try:
        file.truncate(0)
        facts = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
        file.write(json.dumps({**facts, "command": shlex.join(sys.argv)[:500]}))
        file.flush()
    except OSError:  # a full disk: the lock itself takes no space
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        with contextlib.suppress(OSError):
            file.close()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(folder: Path) -> tuple[TextIO, bool]:
    """(the open lock file of a folder, whether the folder was created for it).

    POSIX locks: a forked process, such as a loader worker, does not inherit them.
    """
    path, made = folder / LOCK, not folder.is_dir()
    for tries in count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):  # its last holder has just removed the folder
            if tries == TRIES:
                raise
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                what, hint = f"cannot be locked ({error.strerror})", "a folder on another file system"
                raise UserError(folder, what, hint=hint) from error
            file.seek(0)
            raise _in_use(folder, file.read()) from None
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file, made
        file.close()  # its last holder has just removed it


def _in_use(folder: Path, said: str) -> UserError:
    try:
        who = json.loads(said)
        by = f"process {who['process']} on {who['host']} since {who['since']}: {who['command']}"
    except (ValueError, KeyError, TypeError):
        by = "another process"
    return UserError(folder, f"in use by {by}", hint="wait for it, or use another --out")
