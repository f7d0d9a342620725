"""Real processes of the command line, in folders of their own, and small disks to run them on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from attack.bench import Bench
from attack.case import Ran

SECONDS = 180
"""A command that takes longer hangs."""


@dataclass
class Place:
    """A folder to run one command in, and what was said there."""

    folder: Path
    bench: Bench
    runs: list[Ran] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.folder / "out"

    def start(self, argv: list[str], limit: int | None = None) -> subprocess.Popen:
        """Start `mmllm`.

        Args:
            limit: bytes of the largest file that it may write.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self.folder / "home"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        before = None if limit is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        number = len(list(self.folder.glob("*.err")))
        with (self.folder / f"{number}.out").open("wb") as out, (self.folder / f"{number}.err").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "mmllm", *argv],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=before,
            )

    def end(self, process: subprocess.Popen, began: float) -> Ran:
        """Wait for a command and note what it said."""
        late = False
        try:
            process.wait(max(1.0, SECONDS - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            late = True
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        number = len(list(self.folder.glob("*.err"))) - 1
        texts = [(self.folder / f"{number}.{name}").read_text(errors="replace") for name in ("out", "err")]
        self.runs.append(Ran(process.returncode, *texts, time.monotonic() - began, late))
        return self.runs[-1]

    def run(self, argv: list[str], limit: int | None = None) -> Ran:
        """Run a command to its end."""
        began = time.monotonic()
        return self.end(self.start(argv, limit), began)


def mount(folder: Path, size: int) -> bool:
    """Put a disk of so many bytes at a folder; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    """Take away the disks below a folder that a run which was stopped has left."""
    for line in Path("/proc/mounts").read_text().splitlines():
        place = line.split()[1]
        if Path(place).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", place], check=False)


def wait_until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until something holds or a process ends."""
    until = time.monotonic() + SECONDS
    while not holds() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.0005)
