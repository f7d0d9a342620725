"""Reading in a separate process, which is killed and replaced if a file makes it hang, crash or grow.

Nothing inside a process can stop a decoder that hangs while it holds Python's lock, so the time limit is enforced from
outside. Works on Linux and macOS.
"""

from __future__ import annotations

import logging
import os
import signal
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.contract.registry import parts
from mmllm.data.media.backends.base import Convert
from mmllm.data.media.damage import OnDamage, check_choice
from mmllm.data.media.guard_child import pack
from mmllm.data.media.guard_process import Pictures, ReaderDied, ReaderProcess, TooLong, end_process
from mmllm.data.media.limits import DEFAULTS, Limits
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import Clip, MediaRef, Probe

FILES = 5000
"""After this many files a fresh process takes over, since decoders leak memory."""
GROWTH = 1 << 30
"""Bytes that the process may grow by before a fresh one takes over."""
START_SECONDS = 120.0
"""Time for a new process to import what it needs."""


class GuardedReader:
    """:func:`mmllm.data.media.reader.read_media`, in a process that cannot take this one down with it.

    A context manager. The first read starts the process, and a file that had to be stopped causes a new start. The
    reader may be pickled and used in forked workers: only its settings are passed on, each process starts its own.

    Args:
        backend: name of the back end for video files.
        limits: caps on a file; ``limits.timeout`` is the time limit per file, in seconds.
        plugins: files that register back ends, imported there if ``backend`` is not a shipped one.
        corrupt: what to do with clips with damaged frames, see :class:`mmllm.data.media.reader.VideoReader`.

    Raises:
        UserError: damage is to be refused, but the back end is known not to detect it.
    """

    def __init__(
        self,
        backend: str = "pyav",
        limits: Limits = DEFAULTS,
        plugins: Sequence[str | Path] = (),
        corrupt: OnDamage = "warn",
    ) -> None:
        self.backend, self.limits, self.plugins = backend, limits, tuple(str(plugin) for plugin in plugins)
        self.corrupt: OnDamage = corrupt
        opener = parts("backend").get(backend)
        check_choice(corrupt, backend, opener is None or opener.tells_damage)
        self._end: weakref.finalize | None = None
        self._forget()

    def probe(self, ref: MediaRef) -> Probe:
        """The header of a media file or folder.

        Raises:
            UserError: see :func:`mmllm.data.media.reader.probe`; or the file takes too long or crashes its reader.
        """
        return Probe(**self._ask(ref, {})[0]["probe"])

    def read(self, ref: MediaRef, sampling: Sampling, convert: Convert | None = None) -> Clip:
        """The frames that ``sampling`` takes from ``ref``, uint8 ``[T, H, W, 3]``, or the list of converted ones.

        Raises:
            UserError: see :class:`mmllm.data.media.reader.VideoReader`; or the file takes too long or crashes
                its reader.
        """
        chosen = [sampling.frames, sampling.fps, sampling.max_frames, sampling.sampler]
        request = {"sampling": chosen, "held": convert is None}
        answer, pictures = self._ask(ref, request, convert)
        order, times = answer["order"], np.asarray(answer["times"], np.float64)
        repeated, corrupt = answer["repeated"], tuple((start, end) for start, end in answer["corrupt"])
        if convert is not None:
            return Clip([pictures.values[number] for number in order], times, repeated, corrupt)
        sizes = [f"{height}x{width} (height x width)" for height, width in pictures.sizes(order)]
        if len(sizes) > 1:
            what, hint = "the frames of a folder differ in size", "make all frames the size of the first one"
            raise UserError(ref.describe(), what, expected=sizes[0], got=sizes[1], hint=hint)
        return Clip(pictures.at(order), times, repeated, corrupt)

    def _ask(
        self, ref: MediaRef, request: dict[str, Any], convert: Convert | None = None
    ) -> tuple[dict[str, Any], Pictures]:
        """Send a request and receive the answer; an error in it is raised."""
        if self._process_id != os.getpid():
            self._forget()
        fields = [ref.kind, ref.path, ref.start, ref.end, ref.fps]
        message = pack({"ref": fields, "name": ref.describe(), **request})
        with self._lock:
            child = self._running()
            pictures = Pictures(convert)
            try:
                if not child.send(message):
                    # it ended while idle, which is no file's fault
                    self._stop()
                    child = self._running()
                    child.send(message)
                answer = child.receive(self.limits.timeout, pictures)
            except TooLong:
                self._stop()
                raise self._too_long(ref) from None
            except ReaderDied:
                code = child.exit_code()
                self._stop()
                if code == -signal.SIGALRM:
                    raise self._too_long(ref) from None
                what = f"the process that read it died ({_cause(code)})"
                hint = "the file is probably damaged; convert it again, or read it with another back end"
                raise UserError(ref.describe(), what, hint=hint) from None
            except BaseException:
                # the rest of the answer is still coming
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
            hint="convert it again, read it with another back end, or raise Limits(timeout=)",
        )

    def _running(self) -> ReaderProcess:
        """The process, started if there is none."""
        if self._child is None:
            settings = {
                "backend": self.backend,
                "limits": asdict(self.limits),
                "plugins": self.plugins,
                "corrupt": self.corrupt,
                "files": FILES,
                "growth": GROWTH,
            }
            child = ReaderProcess()
            settings["shared"] = child.shared
            self._child, self._end = child, weakref.finalize(self, end_process, child.process, os.getpid())
            try:
                child.send(pack(settings))
                answer = child.receive(START_SECONDS, Pictures(None))
            except (TooLong, ReaderDied):
                code = child.exit_code()
                self._stop()
                what = f"the reading process does not start ({_cause(code)})"
                raise UserError("media", what, hint="mmllm doctor") from None
            if "error" in answer:
                self._stop()
                raise _rebuilt(answer["error"])
        return self._child

    def _stop(self) -> None:
        """Kill the process, whatever it is doing."""
        if self._child is not None:
            self._end()
            self._child = None

    def _forget(self) -> None:
        """Start without a process; one inherited by a fork is left to the process that owns it."""
        if self._end is not None:
            self._end()
        self._child: ReaderProcess | None = None
        self._lock, self._process_id = Lock(), os.getpid()

    def close(self) -> None:
        """End the process; a later read starts a new one."""
        if self._process_id == os.getpid():
            with self._lock:
                self._stop()

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.backend, self.limits, self.plugins, self.corrupt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _cause(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "its answer was invalid"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}, probably out of memory" if -code == signal.SIGKILL else name


def _rebuilt(fields: dict[str, Any]) -> UserError:
    """An error of the process as the original UserError."""
    return UserError(
        fields["where"], fields["what"], expected=fields["expected"], got=fields["got"], hint=fields["hint"]
    )
