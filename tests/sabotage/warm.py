"""Runs pytest as often as it is asked to, in forks of one process that has imported the large libraries, none of ours.

A line of JSON in, `{"words": [...], "seconds": N, "said": FILE}`; a line out, the exit code, or "hangs".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import accelerate  # noqa: F401
import pytest
import torch  # noqa: F401
from transformers import AutoTokenizer, PreTrainedModel, Trainer  # noqa: F401


def fork(words: list[str], said: str) -> int:
    """A process that runs pytest; returns its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()  # so that it can be ended with all that it has started
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, target in enumerate((nothing, file, file)):
        os.dup2(target, number)
    code = 1
    try:
        code = int(pytest.main(words))
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | str:
    """The exit code of a child, which is killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(wait(fork(asked["words"], asked["said"]), asked["seconds"])), flush=True)
