"""Where computing happens: the requested or available device, and how many threads to use on a shared machine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    import torch

BUSY = 0.5
"""If other processes keep this many cores busy, they count as a neighbour."""


def check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have; None, whatever is available, always fits.

    Raises:
        UserError: not a device, or not a device of this machine.
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
    """The requested device, or the accelerator if there is one, or the CPU.

    Raises:
        UserError: this machine does not have it.
    """
    import torch

    check_device(name)
    if name is not None:
        return name
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


class PeakMemory:
    """The most memory in use within a block: of the accelerator, or of this process where there is none.

    Attributes:
        bytes: known after the block; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        import torch

        if self.device.type == "cpu":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use now
        else:
            torch.accelerator.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        if self.device.type != "cpu":
            self.bytes = torch.accelerator.max_memory_allocated(self.device)
            return
        with suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def sleep_beside_neighbours() -> None:
    """Let waiting threads sleep if a neighbour keeps a core busy: spinning would slow both down several times.

    On a quiet machine they spin, which is about a fifth faster. OpenMP reads the setting when it loads, so this must
    run before torch is imported. A setting by the user is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ and _busy(_cores()) > BUSY:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def choose_threads(asked: int | None, before: int | None = None) -> tuple[int, str]:
    """(threads of one process on the CPU, why).

    Args:
        asked: by a flag.
        before: the number in earlier sessions of a run: with another number, sums round differently, and a continued
            run should learn what it would have learned uninterrupted.
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
    """How many of these cores other processes keep busy; 0 where the system does not say (only Linux does)."""
    before, own = _ticks(cores), time.process_time()
    time.sleep(seconds)
    after, own = _ticks(cores), time.process_time() - own
    return max(0.0, (after - before) / os.sysconf("SC_CLK_TCK") - own) / seconds


def _ticks(cores: set[int]) -> int:
    """Clock ticks that these cores have spent working so far."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        rows = [[int(field) for field in line[1:]] for line in lines if line[0] in {f"cpu{core}" for core in cores}]
    except (OSError, ValueError):
        return 0
    return sum(sum(row[:3]) + sum(row[5:8]) for row in rows)  # not idle, not waiting for a disk; guests are in user
