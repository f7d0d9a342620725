"""Progress on stderr: a live line on a terminal, otherwise a line every 30 seconds; both with the time left."""

from __future__ import annotations

import contextlib
import sys
import time


def say(text: str) -> None:
    """Write to stderr; if nobody is listening any more, carry on."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


class Progress:
    """Shows progress of something long.

    Args:
        label: what is counted.
        total: how many there will be.
        start: how many were done earlier (not part of the estimate).
        quiet: print nothing.
        every: seconds between lines if stderr is not a terminal.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, quiet: bool = False, every: float = 30.0) -> None:
        self.label, self.total, self.start, self.quiet = label, total, start, quiet
        self.live = sys.stderr.isatty()
        self.every = 0.2 if self.live else every
        self.began = time.monotonic()
        self.shown = self.began if not self.live else 0.0
        self.width = 0

    def update(self, done: int, facts: dict[str, object] | None = None) -> None:
        """Report `done` of the total as finished; `facts` are shown beside it."""
        now = time.monotonic()
        if self.quiet or (now - self.shown < self.every and not (self.live and done == self.total)):
            return
        self.shown = now
        left = (now - self.began) / max(1, done - self.start) * (self.total - done)
        beside = "  ".join(f"{name} {value}" for name, value in (facts or {}).items())
        self._write(f"{self.label} {done}/{self.total}  {beside}  ETA {_clock(left)}".replace("    ", "  "))

    def close(self) -> None:
        """End the live line."""
        if self.live and not self.quiet and self.width:
            say("\n")

    def _write(self, text: str) -> None:
        if self.live:
            say("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            say(text + "\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
