"""The two scripts that the README begins with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "script", ["quickstart.sh", "test.sh", "train_nano.sh", "train_8gpu.sh", "train_kd.sh", "train_dpo.sh"]
)
def test_help_and_unknown_flags(script):
    done = subprocess.run(["bash", f"scripts/{script}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"bash scripts/{script}" in done.stdout
    if script in ("quickstart.sh", "train_nano.sh"):
        done = subprocess.run(["bash", f"scripts/{script}", "--nonsense"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, "unknown flag" in done.stderr) == (2, True)


@pytest.mark.slow
def test_quickstart_learns_and_continues(tmp_path):
    """About 20 minutes on two cores: scores above their floors, and a second call repeats nothing."""
    command = ["bash", "scripts/quickstart.sh", "--out", str(tmp_path / "run"), "--venv", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name, above in (("mvbench", 25), ("mlvu", 20)):
        found = report["benchmarks"][name]
        assert found["average"] >= found["chance"] + above
        assert abs(found["blind"] - found["chance"]) <= 1
    assert sum(report["seconds"].values()) < 20 * 60
    log = (tmp_path / "run" / "log.jsonl").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
