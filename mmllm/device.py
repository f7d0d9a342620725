"""Where computing happens: the device that is asked for or that there is, and how many threads of a shared machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mmllm.contract.errors import UserError

BUSY = 0.5
"""From this many cores on that others keep busy, they are a neighbour."""


def check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have; None, what there is, always fits.

    Raises:
        UserError: not a device, or not one of this machine.
    """
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}", "not a device", expected="cpu, cuda, cuda:1, ...") from error
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found is not None else 0
    if device.type == "cpu" or (found is not None and device.type == found.type and (device.index or 0) < count):
        return
    there = "no accelerator" if found is None else f"{count} x {found.type}"
    raise UserError(f"--device {name}", f"this machine has {there}", hint="mmllm doctor, or --device cpu")


def pick_device(name: str | None) -> str:
    """The device asked for, or the accelerator there is, or the CPU.

    Raises:
        UserError: this machine does not have it.
    """
    import torch

    check_device(name)
    if name is not None:
        return name
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def sleep_beside_neighbours() -> None:
    """Let threads that wait for others sleep where a neighbour keeps a core busy: spinning slows both several times.

    On a quiet machine they spin, which is about a fifth faster. OpenMP reads it when it is loaded, so it has to come
    before torch. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ and _busy(_cores()) > BUSY:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def choose_threads(asked: int | None, before: int | None = None) -> tuple[int, str]:
    """(threads of one process on the CPU, why).

    Args:
        asked: by a flag. before: those that a run has had so far: other sums round in another way, and a run that is
            continued should learn what it would have learnt.
    """
    import torch

    if asked is not None:
        return asked, "--threads"
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads(), "OMP_NUM_THREADS"
    if before is not None:
        return before, "as this run began"
    cores = _cores()
    free = max(0.0, len(cores) - _busy(cores))
    return max(1, min(torch.get_num_threads(), round(free))), f"{free:.1f} of {len(cores)} cores are free"


def _cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _busy(cores: set[int], seconds: float = 0.3) -> float:
    """How many of some cores the others keep busy; 0 where the system does not say (it is Linux that does)."""
    before, own = _ticks(cores), time.process_time()
    time.sleep(seconds)
    after, own = _ticks(cores), time.process_time() - own
    return max(0.0, (after - before) / os.sysconf("SC_CLK_TCK") - own) / seconds


def _ticks(cores: set[int]) -> int:
    """Clock ticks that some cores have spent on work so far."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        rows = [[int(field) for field in line[1:]] for line in lines if line[0] in {f"cpu{core}" for core in cores}]
    except (OSError, ValueError):
        return 0
    return sum(sum(row[:3]) + sum(row[5:8]) for row in rows)  # not idle, not waiting for a disk; guests are in user
