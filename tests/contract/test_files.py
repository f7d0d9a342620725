"""Files that are whole or absent, and what the system's errors become."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmllm.cli import main
from mmllm.contract.errors import UserError
from mmllm.contract.files import append_lines, disk_error, read_record, replacing, write_json, write_text, writing


def on_a_small_disk(call: Callable[[], object]) -> str:
    """What a call says on a disk where no file grows beyond 1,000 bytes: in a process of its own, as a test's output is
    a file too.
    """
    reading, writing_end = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            said = f"{call()}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing_end, said.encode())
        os._exit(0)
    os.close(writing_end)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    said = on_a_small_disk(lambda: write_json(path, {"a": "x" * 5000}))
    assert said.startswith("UserError") and "file too large. Try: free some space; the same command continues" in said
    assert read_record(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_stops_in_between_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "torch"])
def test_a_full_disk_is_said_whatever_library_meets_it(tmp_path, write):
    def save() -> None:
        with writing(tmp_path):
            write({"weight": torch.zeros(5000)}, str(tmp_path / "weights"))

    said = on_a_small_disk(save)
    assert said.startswith("UserError") and "free some space" in said


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="a bug"), writing(tmp_path):
        raise ValueError("a bug")
    assert disk_error(OSError(errno.EPIPE, "broken pipe")) is None


def test_lines_after_a_torn_one_stand_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    append_lines(path, ["one"])
    path.write_bytes(path.read_bytes() + b"to")
    append_lines(path, ["three", "four"])
    assert path.read_text() == "one\nto\nthree\nfour\n"


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "status.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"status\.json: damaged"):
        read_record(path)


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "use another folder")])
def test_a_disk_that_cannot_be_written_is_no_bug(monkeypatch, capsys, number, says):
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr("mmllm.cli.recipe.run_list", fail)
    assert main(["recipe", "list"]) == 2
    assert f"error: runs/x: {os.strerror(number).lower()}. Try: {says}" in capsys.readouterr().err


def test_the_crash_handler_does_not_crash(monkeypatch, capsys, tmp_path):
    def fail(*arguments: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("mmllm.cli.recipe.run_list", fail)
    monkeypatch.setattr(Path, "write_text", lambda *arguments, **keywords: (_ for _ in ()).throw(OSError(28, "full")))
    assert main(["recipe", "list"]) == 1
    said = capsys.readouterr().err
    assert "this is a bug of mmllm; the traceback is here, since crash.txt cannot be written" in said
    assert "KeyError: 'a bug'" in said
