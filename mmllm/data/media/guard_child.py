"""The reading process behind :class:`mmllm.data.media.guard.GuardedReader`: requests on stdin, answers on stdout.

In both directions a message is a header (one byte of kind, four bytes of length, little endian) and a body. Kind ``J``
is JSON. Between the shape and the end of an answer the child also sends pictures, raw uint8 ``[H, W, 3]``: ``P`` with
the picture as body, or ``S`` without a body, where the picture follows the previous one in shared memory (a pipe moves
about 3 GB/s, which is noticeable for a large clip). Nothing here imports torch.

On Linux the first process imports everything once and forks the one that reads, so that a fresh reader costs
milliseconds; one takes over when the old one has read many files or has grown, as decoders leak memory.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import mmap
import os
import signal
import struct
import sys
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from mmllm.data.media.limits import Limits

HEAD = struct.Struct("<cI")
JSON, PICTURE, SHARED = b"J", b"P", b"S"
BATCH_BYTES = 256 << 10
"""Pictures are collected up to this size, so that a small clip is one message."""
BATCH_PARTS = 500
"""Buffers per ``writev``, below the system limit (1024)."""
FORKS = sys.platform == "linux"
"""Elsewhere a forked process may not use its parent's libraries, so a new one is started instead."""
RETIRED = 64
"""Exit code that asks for a fresh process."""
GRACE = 5.0
"""Seconds after the time limit at which the process ends itself, in case its parent is gone."""


def pack(message: dict[str, Any]) -> bytes:
    """A JSON message with its header."""
    body = json.dumps(message).encode()
    return HEAD.pack(JSON, len(body)) + body


def main() -> int:
    """Serve one parent; returns the exit code."""
    requests, answers = _take_pipes()
    settings = _receive(requests)
    if settings is None:
        return 0
    _soften_crashes()
    sender = Sender(answers, settings["shared"])
    try:
        _prepare(settings)
    except Exception as error:
        sender.end({"error": _described(error, "backend")})
        return 1
    sender.end({"ready": True})
    if not FORKS:
        return _serve(requests, sender, settings)
    while True:
        reader = os.fork()
        if not reader:
            os._exit(_serve(requests, sender, settings))
        code = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
        if code != RETIRED:
            return code if code >= 0 else 128 - code


def serve(requests: int, sender: Sender, settings: dict[str, Any]) -> int:
    """Answer requests until the parent closes its end or this process has done enough."""
    from mmllm.data.media.limits import Limits

    limits = Limits(**settings["limits"])
    heard = _LogCapture()
    logging.getLogger("mmllm").addHandler(heard)
    logging.getLogger("mmllm").setLevel(logging.INFO)
    start = _resident()
    for files in range(1, settings["files"] + 1):
        request = _receive(requests)
        if request is None:
            return 0
        sender.limit(limits.timeout + GRACE)
        try:
            answer = _answer(request, settings, limits, sender)
        except Exception as error:
            answer = {"error": _described(error, request["name"])}
        sender.limit(0)
        enough = files == settings["files"] or _resident() - start > settings["growth"]
        sender.end(answer | {"log": heard.take(), "last": enough and not FORKS})
        if enough:
            break
    return RETIRED


def _serve(requests: int, sender: Sender, settings: dict[str, Any]) -> int:
    """:func:`serve` that ends in an exit code only: a forked process must not run its parent's code."""
    try:
        # if memory runs out, this process is to be killed, not the training that waits for it
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
        return serve(requests, sender, settings)
    except BrokenPipeError:
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def _answer(request: dict[str, Any], settings: dict[str, Any], limits: Limits, sender: Sender) -> dict[str, Any]:
    """Read what is requested; pictures are sent as they come, the rest is returned."""
    from mmllm.data.media.reader import VideoReader, probe
    from mmllm.data.media.sampling import Sampling
    from mmllm.data.media.types import MediaRef

    ref, backend = MediaRef(*request["ref"]), settings["backend"]
    if "sampling" not in request:
        return {"probe": asdict(probe(ref, backend, limits))}
    sampling = Sampling(*request["sampling"])
    with VideoReader(ref, backend, limits, settings["corrupt"]) as reader:
        header, bounds = reader.probe, (ref.start, ref.end)
        count = sampling.count(header, *bounds)
        # the parent holds the frames, unless it converts them as they come
        limits.check(ref, header, count, held=request["held"])
        sender.expect(count)
        clip = reader.read(sampling, sender.picture)
    found = {"times": clip.times.tolist(), "repeated": clip.repeated, "corrupt": clip.corrupt}
    return {"order": clip.frames, **found}


class Sender:
    """Writes answers; small parts are collected, and the time limit pauses while the parent is slow to take them.

    Args:
        file: descriptor to write to.
        shared: descriptor and size in bytes of the memory shared with the parent, or None.
    """

    def __init__(self, file: int, shared: tuple[int, int] | None) -> None:
        self.file, self.parts, self.size = file, [], 0
        self.memory = memoryview(mmap.mmap(*shared) if shared else b"")
        self.expect(0)

    def expect(self, count: int) -> None:
        """Begin an answer with this many pictures."""
        self.count, self.pictures, self.shape, self.used = count, 0, None, 0

    def put(self, part: bytes | memoryview, beside: int = 0) -> None:
        """Add a part to the answer; `beside` bytes of other memory belong to it."""
        self.parts.append(part)
        self.size += len(part) + beside
        if self.size >= BATCH_BYTES or len(self.parts) >= BATCH_PARTS:
            self.flush()

    def picture(self, picture: np.ndarray) -> int:
        """Add a contiguous uint8 picture ``[H, W, 3]``; returns its number within the answer."""
        if picture.shape != self.shape:
            self.shape = picture.shape
            self.put(pack({"shape": [self.count, *picture.shape]}))
        pixels, end = memoryview(picture).cast("B"), self.used + picture.nbytes
        if end <= len(self.memory):
            self.memory[self.used : end] = pixels
            self.used = end
            self.put(HEAD.pack(SHARED, picture.nbytes), picture.nbytes)
        else:
            self.put(HEAD.pack(PICTURE, picture.nbytes))
            self.put(pixels)
        self.pictures += 1
        return self.pictures - 1

    def end(self, message: dict[str, Any]) -> None:
        """Finish an answer."""
        self.put(pack(message | {"end": True}))
        self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        left = self.limit(0)
        parts, self.parts, self.size = self.parts, [], 0
        while parts:
            written = os.writev(self.file, parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if written:
                parts[0] = memoryview(parts[0])[written:]
        self.limit(left)

    def limit(self, seconds: float) -> float:
        """End this process after this many seconds, whatever it is doing; 0 = never. Returns what was left before."""
        return signal.setitimer(signal.ITIMER_REAL, seconds)[0]


class _LogCapture(logging.Handler):
    """Collects what the readers log, for the parent to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Record one log record."""
        self.records.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        """What was logged since the last call."""
        records, self.records = self.records, []
        return records


def _take_pipes() -> tuple[int, int]:
    """The pipes to the parent, moved away from the descriptors that libraries print to."""
    pipes = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return pipes


def _soften_crashes() -> None:
    """Disable core dumps, and use an alarm that ends the process without Python's help."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _prepare(settings: dict[str, Any]) -> None:
    """Import what reading needs; plug-ins only if the back end is not one of ours, since they may import anything.

    Raises:
        UserError: unknown back end, or a file that is not a plug-in.
    """
    from mmllm.contract.registry import load_plugin, parts
    from mmllm.data.media.reader import backend_class

    if settings["backend"] not in parts("backend"):
        for plugin in settings["plugins"]:
            load_plugin(plugin)
    packages = {"av", "av.video.reformatter", "PIL.Image", backend_class(settings["backend"]).package}
    for package in packages - {None}:
        # a missing package is reported when a file is opened
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module(package)


def _receive(file: int) -> dict[str, Any] | None:
    """The next request; None if the parent has closed its end."""
    head = _read(file, HEAD.size)
    if head is None:
        return None
    body = _read(file, HEAD.unpack(head)[1])
    return None if body is None else json.loads(body)


def _read(file: int, size: int) -> bytes | None:
    """This many bytes, or None at the end of the pipe."""
    data = b""
    while len(data) < size:
        more = os.read(file, size - len(data))
        if not more:
            return None
        data += more
    return data


def _described(error: Exception, name: str) -> dict[str, str | None]:
    """The fields of a UserError; another error becomes one about the file, and its traceback is logged."""
    from mmllm.contract.errors import UserError

    if not isinstance(error, UserError):
        if isinstance(error, BrokenPipeError):
            raise error
        logging.getLogger(__name__).warning("%s: %s", name, traceback.format_exc())
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        what = f"reading it failed ({reason})"
        error = UserError(name, what, hint="check the file, or read it with another back end")
    fields = {key: getattr(error, key) for key in ("where", "what", "expected", "got", "hint")}
    return {key: None if value is None else str(value) for key, value in fields.items()}


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where that cannot be read."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
