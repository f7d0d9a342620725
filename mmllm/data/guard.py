"""Reading in a process of its own, which is killed and replaced where a file makes it hang, crash or grow.

Nothing inside a process can stop a decoder that hangs while it holds Python's lock, so the time limit is enforced from
outside. Works on Linux and macOS.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.data.backends.base import Convert
from mmllm.data.guard_child import HEAD, JSON, pack
from mmllm.data.limits import DEFAULTS, Limits
from mmllm.data.media import Clip, MediaRef, Probe
from mmllm.data.sampling import Sampling

FILES = 500
"""After this many files a fresh process takes over, since decoders leak."""
GROWTH = 1 << 30
"""Bytes that the process may grow by before a fresh one takes over."""
START_SECONDS = 120.0
"""Time that a new process may take to import what it needs."""
PIPE_BYTES = 1 << 20
"""Size of the pipe where the system lets us choose: a small clip fits into it whole."""
JSON_BYTES = 16 << 20
"""No message of text is longer."""
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import mmllm; del sys.path[0]; "
    "from mmllm.data.guard_child import main; sys.exit(main())"
)
"""What the new process runs, after the folder that holds this package."""


class GuardedReader:
    """What :func:`mmllm.data.reader.read_media` does, in a process that cannot take this one down with it.

    A context manager. The process is started by the first read, and anew after a file that had to be stopped. The
    reader may be pickled and may be used in forked workers: only its settings travel, every process starts its own.

    Args:
        backend: name of the back end for video files.
        limits: caps on a file; ``limits.timeout`` is the time (seconds) that one file may take.
        plugins: files that register back ends, imported there if ``backend`` is none of the shipped ones.
    """

    def __init__(self, backend: str = "pyav", limits: Limits = DEFAULTS, plugins: Sequence[str | Path] = ()) -> None:
        self.backend, self.limits, self.plugins = backend, limits, tuple(str(plugin) for plugin in plugins)
        self._end: weakref.finalize | None = None
        self._forget()

    def probe(self, ref: MediaRef) -> Probe:
        """The header of a media file or folder.

        Raises:
            UserError: see :func:`mmllm.data.reader.probe`; and a file that takes too long or crashes its reader.
        """
        return Probe(**self._ask(ref, {})[0]["probe"])

    def read(self, ref: MediaRef, sampling: Sampling, convert: Convert | None = None) -> Clip:
        """The frames that ``sampling`` takes of ``ref``, uint8 ``[T, H, W, 3]``, or the list of converted ones.

        Raises:
            UserError: see :class:`mmllm.data.reader.VideoReader`; and a file that takes too long or crashes its reader.
        """
        chosen = [sampling.frames, sampling.fps, sampling.max_frames, sampling.sampler]
        request = {"sampling": chosen, "held": convert is None}
        answer, pictures = self._ask(ref, request, convert)
        order, times = answer["order"], np.asarray(answer["times"], np.float64)
        if convert is not None:
            return Clip([pictures.values[number] for number in order], times, answer["repeated"])
        sizes = [f"{height}x{width} (height x width)" for height, width in pictures.sizes(order)]
        if len(sizes) > 1:
            what, hint = "the frames of a folder differ in size", "make all frames the size of the first one"
            raise UserError(ref.describe(), what, expected=sizes[0], got=sizes[1], hint=hint)
        return Clip(pictures.at(order), times, answer["repeated"])

    def _ask(
        self, ref: MediaRef, request: dict[str, Any], convert: Convert | None = None
    ) -> tuple[dict[str, Any], _Pictures]:
        """Send a request, take the answer; an error in it is raised."""
        if self._process_id != os.getpid():
            self._forget()
        fields = [ref.kind, ref.path, ref.start, ref.end, ref.fps]
        message = pack({"ref": fields, "name": ref.describe(), **request})
        with self._lock:
            child = self._running()
            pictures = _Pictures(convert)
            try:
                if not child.send(message):
                    # it went while nobody asked for anything, which is no file's fault
                    self._stop()
                    child = self._running()
                    child.send(message)
                answer = child.receive(self.limits.timeout, pictures)
            except _TooLong:
                self._stop()
                raise self._too_long(ref) from None
            except _Gone:
                code = child.exit_code()
                self._stop()
                if code == -signal.SIGALRM:
                    raise self._too_long(ref) from None
                what = f"the process that read it died ({_cause(code)})"
                hint = "the file is probably damaged; convert it anew, or read it with another back end"
                raise UserError(ref.describe(), what, hint=hint) from None
            except BaseException:
                # the rest of the answer is still under way
                self._stop()
                raise
            if answer.get("last"):
                self._stop()
        for name, level, text in answer.get("log", ()):
            logging.getLogger(name).log(level, "%s", text)
        if "error" in answer:
            raise _rebuilt(answer["error"])
        return answer, pictures

    def _too_long(self, ref: MediaRef) -> UserError:
        return UserError(
            ref.describe(),
            "reading it took too long and was stopped",
            expected=f"at most {self.limits.timeout:g} s",
            hint="convert it anew, read it with another back end, or raise Limits(timeout=)",
        )

    def _running(self) -> _Child:
        """The process, started where there is none."""
        if self._child is None:
            settings = {
                "backend": self.backend,
                "limits": asdict(self.limits),
                "plugins": self.plugins,
                "files": FILES,
                "growth": GROWTH,
            }
            child = _Child()
            self._child, self._end = child, weakref.finalize(self, _end, child.process, os.getpid())
            try:
                child.send(pack(settings))
                answer = child.receive(START_SECONDS, _Pictures(None))
            except (_TooLong, _Gone):
                code = child.exit_code()
                self._stop()
                what = f"the reading process does not start ({_cause(code)})"
                raise UserError("media", what, hint="mmllm doctor") from None
            if "error" in answer:
                self._stop()
                raise _rebuilt(answer["error"])
        return self._child

    def _stop(self) -> None:
        """End the process, whatever it does."""
        if self._child is not None:
            self._end()
            self._child = None

    def _forget(self) -> None:
        """Start without a process; one that belongs to the process we were forked from is left to it."""
        if self._end is not None:
            self._end()
        self._child: _Child | None = None
        self._lock, self._process_id = Lock(), os.getpid()

    def close(self) -> None:
        """End the process; a later read starts a new one."""
        if self._process_id == os.getpid():
            with self._lock:
                self._stop()

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.backend, self.limits, self.plugins)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _TooLong(Exception):
    """No answer within the time."""


class _Gone(Exception):
    """The process has ended, or says what it never should."""


class _Child:
    """A reading process and the pipes to it."""

    def __init__(self) -> None:
        # it finds this very package, in isolation from the folder that the user happens to be in
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(Path(__file__).resolve().parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # decoders' threads scatter memory over as many heaps as there are; two keep it flat (glibc's own switch)
            env={"MALLOC_ARENA_MAX": "2", **os.environ},
            # Ctrl-C is for us to answer; and the process and what it forks can be killed together
            start_new_session=True,
        )
        self.answers = self.process.stdout
        os.set_blocking(self.answers.fileno(), False)
        _widen(self.answers.fileno())
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        self.budget = 0.0

    def send(self, message: bytes) -> bool:
        """Write a request; False if nobody is there to read it."""
        try:
            while message:
                message = message[self.process.stdin.write(message) :]
        except BrokenPipeError:
            return False
        return True

    def receive(self, seconds: float, pictures: _Pictures) -> dict[str, Any]:
        """The answer; its pictures go to ``pictures``. Only waiting counts against ``seconds``."""
        self.budget = seconds
        head = memoryview(bytearray(HEAD.size))
        while True:
            self._fill(head)
            kind, size = HEAD.unpack(head)
            if kind != JSON:
                self._fill(pictures.place(size))
                pictures.placed()
                continue
            if size > JSON_BYTES:
                raise _Gone
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
                    raise _TooLong
                self.budget -= time.monotonic() - start
            else:
                raise _Gone

    def exit_code(self) -> int | None:
        """How it ended; negative = the signal; None if it has not."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code > 128 else code


class _Pictures:
    """Where the pictures of an answer go: into one array ``[T, H, W, 3]``, or one by one through ``convert``."""

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

    def place(self, size: int) -> memoryview:
        """Memory for the next picture; more than asked for come where a back end had to be given up half-way."""
        if size != self.size or self.count >= 2 * self.shape[0]:
            raise _Gone
        within = self.frames is not None and self.count < len(self.frames)
        self.current = self.frames[self.count] if within else np.empty(self.shape[1:], np.uint8)
        return memoryview(self.current).cast("B")

    def placed(self) -> None:
        """The next picture is complete."""
        self.count += 1
        self.values.append(self.current if self.convert is None else self.convert(self.current))

    def sizes(self, order: list[int]) -> list[tuple[int, int]]:
        """The different (height, width) of the frames that are asked for, those of the first one first."""
        return list(dict.fromkeys(self.values[number].shape[:2] for number in order))

    def at(self, order: list[int]) -> np.ndarray:
        """The frames in the order asked for; nothing is copied where all came in it."""
        if order == list(range(len(self.frames))):
            return self.frames
        return np.stack([self.values[number] for number in order])


def _end(process: subprocess.Popen, owner: int) -> None:
    """Kill a process of ours and what it has forked, and let its pipes go."""
    if os.getpid() == owner:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        # a fork has inherited the handle, not the process
        process.returncode = 0
    process.stdin.close()
    process.stdout.close()


def _widen(pipe: int) -> None:
    """Give a pipe more room, where that is possible and allowed."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _cause(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "it stopped to make sense"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, probably out of memory" if -code == signal.SIGKILL else name


def _rebuilt(fields: dict[str, Any]) -> UserError:
    """An error of the process as itself."""
    return UserError(
        fields["where"], fields["what"], expected=fields["expected"], got=fields["got"], hint=fields["hint"]
    )
