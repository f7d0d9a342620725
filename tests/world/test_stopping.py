"""`mmllm world make` beside another one, interrupted and killed; and what its workers import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("mmllm")), "world", "make", "--jobs", "2", "--quiet", "--out", "world"]


def clips(folder: Path) -> int:
    """How many training clips there are."""
    return len(list((folder / "world/train/clips").glob("*.mp4")))


def until(told: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not told() and time.monotonic() < end:
        time.sleep(0.1)
    return told()


@pytest.fixture
def making(tmp_path):
    """A process group that makes a large world, and has begun."""
    process = subprocess.Popen(
        [*COMMAND, "--level", "nano"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell lets what it starts in the background ignore Ctrl-C, and so the tests in it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert until(lambda: (tmp_path / "world/mvbench/json/action_antonym.json").is_file())
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def alone(group: int) -> bool:
    """Whether no process of a group is left but zombies, which nobody has waited for."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return not [1 for line in found.splitlines() if line.split()[0] == str(group) and line.split()[1][0] != "Z"]


def test_a_second_command_is_told_who_makes_it_and_an_interrupt_ends_all_processes(making, tmp_path):
    second = subprocess.run([*COMMAND, "--level", "nano"], cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 2 and f"in use by process {making.pid}" in second.stderr
    os.killpg(making.pid, signal.SIGINT)
    _, said = making.communicate(timeout=60)
    assert making.returncode == 130 and said == "stopped\n"
    assert alone(making.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(making, number):
    making.send_signal(number)
    making.wait(timeout=60)
    assert until(lambda: alone(making.pid), 20)


def test_workers_import_nothing_from_the_current_folder(tmp_path):
    for name in ("pickle", "socket", "random", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    done = subprocess.run([*COMMAND, "--level", "tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
