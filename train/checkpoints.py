"""Checkpoints of a stage: used only if complete, deleted only if this program wrote them, named if damaged."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState

from mmllm.contract.errors import UserError
from mmllm.contract.files import read_record, write_json, writing
from mmllm.run_folder import COMPLETE

OURS = "written_by_mmllm"
"""The file written first into a checkpoint: a folder without it is never deleted."""
OBJECTIVE = "objective.safetensors"
"""The weights of an objective that has some."""
LOSSES = "losses.json"
"""The losses since the last line of the log, so that the next line averages all of them."""
DATA = "data.json"
"""A stage's record of what its data files held when it began."""
KEPT = 2
"""Number of checkpoints kept per stage."""
HINT = "delete this checkpoint to continue from the one before it"


def start(folder: Path) -> None:
    """Mark a folder as ours and as incomplete, before anything is written into it.

    Raises:
        UserError: the folder exists and is not ours, or cannot be made.
    """
    # An empty folder is what a kill leaves between making it and marking it.
    if folder.is_dir() and not _is_ours(folder) and any(folder.iterdir()):
        raise UserError(folder, "exists, but is not a checkpoint of this run", hint="move it away")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OURS).touch()
        (folder / COMPLETE).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Mark a checkpoint as complete, and delete the oldest."""
    with writing(folder):
        (folder / COMPLETE).touch()
    for path in checkpoints(folder.parent)[:-KEPT]:
        (path / COMPLETE).unlink()  # if killed in between, no partial checkpoint looks complete
        _remove(path)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    return [path for path in _folders(folder) if (path / COMPLETE).is_file()]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage; our incomplete ones are removed."""
    for path in _folders(folder):
        if _is_ours(path) and not (path / COMPLETE).is_file():
            _remove(path)
    return next(reversed(checkpoints(folder)), None)


def _remove(folder: Path) -> None:
    """Remove a folder of ours, its mark last: what a kill leaves of it is still known to be ours."""
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != OURS]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    numbered = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in numbered.items() if step.isdecimal()), key=lambda path: int(numbered[path]))


def _is_ours(folder: Path) -> bool:
    return (folder / OURS).is_file() or (folder / COMPLETE).is_file()


def check_checkpoint(folder: Path, processes: int, sharded: bool, scaled: bool) -> None:
    """Check that a checkpoint has all that continuing needs: the library silently goes on where state is missing.

    Args:
        processes: how many continue; each has its own random generator state.
        sharded: whether DeepSpeed keeps the optimizer.
        scaled: whether the loss is scaled, as float16 needs it.

    Raises:
        UserError: names what is missing, or with how many processes it was written.
    """
    generators = ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    written = len(list(folder.glob("rng_state*.pth")))
    if written and written != processes:
        what, hint = f"written by {written} processes, now {processes}", f"{written} processes, or another --out"
        raise UserError(folder, what, hint=hint)
    was_sharded = (folder / "latest").is_file()
    if was_sharded != sharded:
        ways = ("without DeepSpeed", "with DeepSpeed")
        what = f"written {ways[was_sharded]}, continued {ways[sharded]}"
        raise UserError(folder, what, hint="the same --deepspeed, or another --out")
    needed = ["trainer_state.json", *generators]
    needed += [] if sharded else ["optimizer.pt", "scheduler.pt", *(["scaler.pt"] if scaled else [])]
    for name in needed:
        if not (folder / name).is_file():
            raise UserError(folder / name, "missing, so training cannot continue exactly", hint=HINT)


def check_data(folder: Path, checkpoint: Path | None, files: list[Path], main: bool) -> None:
    """Check that a stage continues with the data it began with: samples are drawn by index.

    Args:
        folder: the stage's.
        checkpoint: the one it continues from; None where it begins.
        files: all files that its samples are in, without their media.
        main: whether this process records what a stage begins with.

    Raises:
        UserError: names what has changed.
    """
    record = folder / DATA
    begins = checkpoint is None or not record.is_file()
    if begins and not main:
        return
    now = {str(file): digest(file) for file in files}
    if begins:
        write_json(record, now)
        return
    before = read_record(record)
    if list(before.values()) != list(now.values()):
        changed = [name for name, value in now.items() if before.get(name) != value] or list(before)
        what = "differs from the data this stage began with"
        raise UserError(changed[0], what, hint=f"restore the file, or use an --out other than {folder.parent.parent}")


def digest(path: Path) -> str:
    """A digest of a file's bytes, read once per process while the file stays as it is."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def losses_of(folder: Path, state: TrainerState) -> tuple[float, int, dict[str, list[float]]]:
    """(sum of the losses that are not in the log yet, step of the last log line, the terms) of a checkpoint."""
    path = folder / LOSSES
    if not path.is_file():  # a checkpoint of a version that did not keep them
        return 0.0, state.global_step, {}
    kept = read_record(path)
    return kept["loss"], kept["since"], kept.get("terms", {})


@contextlib.contextmanager
def naming(folder: str | Path | None, hint: str = HINT) -> Iterator[None]:
    """Name the checkpoint in what the libraries report about a damaged file.

    Raises:
        UserError: something in it cannot be read.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(folder, f"damaged ({type(error).__name__}: {reason})", hint=hint) from error
