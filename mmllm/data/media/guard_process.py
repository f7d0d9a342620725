"""The parent's end of the reading process: how it is started, talked to and ended."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.media.backends.base import Convert
from mmllm.data.media.guard_child import HEAD, JSON, SHARED

PIPE_BYTES = 1 << 20
"""Size of the pipe where the system lets us choose: a small clip fits as a whole."""
SHARED_BYTES = 64 << 20
"""Shared memory for the first pictures of an answer (Linux); others come through the pipe."""
JSON_BYTES = 16 << 20
"""Upper limit of the length of a text message."""
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import mmllm; del sys.path[0]; "
    "from mmllm.data.media.guard_child import main; sys.exit(main())"
)
"""The code of the new process; its argument is the folder that holds this package."""


class TooLong(Exception):
    """No answer within the time limit."""


class ReaderDied(Exception):
    """The process has ended, or has sent something invalid."""


class ReaderProcess:
    """A reading process and the pipes to it."""

    def __init__(self) -> None:
        file, self.memory = _shared_memory()
        self.shared = None if file is None else (file, len(self.memory))
        # it finds this very package, isolated from the user's current folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(Path(__file__).resolve().parents[3])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # decoders' threads scatter memory over all available heaps; two keep it flat (glibc's own switch)
            env={"MALLOC_ARENA_MAX": "2", **os.environ},
            # we handle Ctrl-C; and the process and its forks can be killed together
            start_new_session=True,
            pass_fds=() if file is None else (file,),
        )
        if file is not None:
            os.close(file)
        self.answers = self.process.stdout
        os.set_blocking(self.answers.fileno(), False)
        _widen(self.answers.fileno())
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        self.budget = 0.0

    def send(self, message: bytes) -> bool:
        """Write a request; False if there is no reader."""
        try:
            while message:
                message = message[self.process.stdin.write(message) :]
        except BrokenPipeError:
            return False
        return True

    def receive(self, seconds: float, pictures: Pictures) -> dict[str, Any]:
        """The answer; its pictures go to ``pictures``. Only waiting counts against ``seconds``."""
        self.budget, used = seconds, 0
        head = memoryview(bytearray(HEAD.size))
        while True:
            self._fill(head)
            kind, size = HEAD.unpack(head)
            if kind != JSON:
                room = pictures.reserve(size)
                if kind == SHARED:
                    room[:] = self.memory[used : used + size]
                    used += size
                else:
                    self._fill(room)
                pictures.placed()
                continue
            if size > JSON_BYTES:
                raise ReaderDied
            body = memoryview(bytearray(size))
            self._fill(body)
            message = json.loads(bytes(body))
            if message.get("end"):
                return message
            pictures.expect(message["shape"])

    def _fill(self, view: memoryview) -> None:
        """Read until the view is full."""
        while view:
            count = self.answers.readinto(view)
            if count:
                view = view[count:]
            elif count is None:
                start = time.monotonic()
                if not self.poll.poll(max(0.0, self.budget) * 1000):
                    raise TooLong
                self.budget -= time.monotonic() - start
            else:
                raise ReaderDied

    def exit_code(self) -> int | None:
        """Its exit code; negative = the signal; None if it has not ended."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code > 128 else code


class Pictures:
    """Destination of an answer's pictures: one array ``[T, H, W, 3]``, or one by one through ``convert``."""

    def __init__(self, convert: Convert | None) -> None:
        self.convert, self.values, self.count = convert, [], 0
        self.shape: tuple[int, ...] = (0, 0, 0, 3)
        self.size = 0
        self.frames: np.ndarray | None = None
        self.current: np.ndarray

    def expect(self, shape: Sequence[int]) -> None:
        """Make room for the pictures that will come."""
        self.shape, self.size = tuple(shape), math.prod(shape[1:])
        if self.convert is None:
            self.frames = np.empty(self.shape, np.uint8)

    def reserve(self, size: int) -> memoryview:
        """Memory for the next picture; more than requested come if a back end had to be given up halfway."""
        if size != self.size or self.count >= 2 * self.shape[0]:
            raise ReaderDied
        within = self.frames is not None and self.count < len(self.frames)
        self.current = self.frames[self.count] if within else np.empty(self.shape[1:], np.uint8)
        return memoryview(self.current).cast("B")

    def placed(self) -> None:
        """The next picture is complete."""
        self.count += 1
        self.values.append(self.current if self.convert is None else self.convert(self.current))

    def sizes(self, order: list[int]) -> list[tuple[int, int]]:
        """The distinct (height, width) of the requested frames, those of the first one first."""
        return list(dict.fromkeys(self.values[number].shape[:2] for number in order))

    def at(self, order: list[int]) -> np.ndarray:
        """The frames in the requested order; nothing is copied if they all came in it."""
        if order == list(range(len(self.frames))):
            return self.frames
        return np.stack([self.values[number] for number in order])


def end_process(process: subprocess.Popen, owner: int) -> None:
    """Kill a process of ours and its forks, and release its pipes."""
    if os.getpid() == owner:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        # a fork inherits the handle, not the process
        process.returncode = 0
    process.stdin.close()
    process.stdout.close()


def _shared_memory() -> tuple[int | None, memoryview]:
    """A file in memory and its bytes; (None, empty) if the system has none."""
    try:
        file = os.memfd_create("mmllm-frames")
        os.ftruncate(file, SHARED_BYTES)
        return file, memoryview(mmap.mmap(file, SHARED_BYTES))
    except (AttributeError, OSError):
        return None, memoryview(b"")


def _widen(pipe: int) -> None:
    """Enlarge a pipe, where that is possible and allowed."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
