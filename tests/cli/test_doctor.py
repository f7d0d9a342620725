"""`mmllm doctor` says what there is, tries the back ends out, and names what brings the rest."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mmllm.cli import doctor, main

BROKEN = """
from mmllm.contract.registry import register
from mmllm.data.media.backends.pyav import PyAVBackend


@register("backend", "crashes")
class Crashes(PyAVBackend):
    @classmethod
    def open(cls, path, fps=None, limits=None):
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
"""


def report(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict[str, dict]]:
    """The exit code, and {item: finding}."""
    code = main(["doctor", "--json", *words])
    value = json.loads(capsys.readouterr().out)
    assert value["works"] == (code == 0)
    return code, {finding["item"]: finding for finding in value["findings"]}


def test_versions_back_ends_and_disk(capsys, tmp_path):
    code, found = report(capsys, "--cache-dir", str(tmp_path / "not" / "yet"))
    assert code == 0
    assert found["torch"]["state"] == metadata.version("torch")
    assert found["python"]["state"] == ".".join(map(str, sys.version_info[:3]))
    assert "avcodec" not in found["ffmpeg (of av)"]["hint"] and "codec 6" in found["ffmpeg (of av)"]["state"]
    assert found["pyav"]["state"].startswith("decoded 8 frames") and found["pyav"]["core"]
    assert found["encoder libx264"]["good"]
    assert found["cache"]["state"].endswith(f"free in {tmp_path / 'not' / 'yet'}")
    assert {"decord", "timm", "open_clip_torch", "deepspeed", "datasets", "webdataset"} <= set(found)


def test_what_is_missing_comes_with_its_command(capsys, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("webdataset", "timm", "safetensors"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    code, found = report(capsys)
    assert code == 2 and not found["safetensors"]["good"]
    assert found["webdataset"]["hint"] == 'pip install "mmllm[data]"'
    assert found["timm"]["hint"] == 'pip install "mmllm[towers]"'
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert "MISSING" in text and "pip install safetensors" in text


def test_a_back_end_that_crashes_is_a_finding(capsys, tmp_path: Path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    code, found = report(capsys, "--plugin", str(plugin))
    assert code == 0
    assert not found["crashes"]["good"] and "SIGSEGV" in found["crashes"]["state"]


def test_the_table_is_for_people(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "what is needed works" in text
    assert {line.split()[0] for line in text.splitlines() if line[:1].isalpha()} >= {"versions", "media", "disk"}
