"""Averages, tables and files of reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmllm.eval import mlvu
from mmllm.eval.benchmarks import BENCHMARKS
from mmllm.eval.protocol import CANONICAL, prompt
from mmllm.eval.report import Report, TaskScore, summary
from mmllm.eval.report_files import render, run_report, write_report
from mmllm.eval.runner import run_benchmark


def small(headline: str = "micro") -> Report:
    tasks = {
        "one": TaskScore(50.0, 25.0, 20.0, 30.0, items=30, total=33, missing=2, unparsed=4),
        "two": TaskScore(100.0, 50.0, 60.0, 70.0, items=10, total=10, missing=0, unparsed=0),
        "gone": TaskScore(None, None, None, None, items=0, total=5, missing=5, unparsed=0),
    }
    excluded = [{"id": "x/one/0001/ab", "task": "one", "reason": "the answer is empty"}]
    return Report("mvbench", "canonical", "01234567", headline, tasks, excluded=excluded, not_scored={"open": "no"})


def test_micro_and_macro() -> None:
    report = small()
    assert (report.mean("score", "micro"), report.mean("score", "macro")) == (62.5, 75.0)
    assert (report.average, small("macro").average) == (62.5, 75.0)
    assert (report.scored, report.total, report.missing, report.unparsed) == (40, 48, 7, 4)
    assert (report.mean("chance"), report.mean("blind"), report.mean("single_frame")) == (31.25, 30.0, 40.0)


def test_render_prints_denominator_and_headline() -> None:
    report = small()
    report.warnings = ["look here"]
    text = render(report)
    assert summary(report) == "mvbench 62.5 %  chance 31.2  blind 30.0  single frame 40.0  (40/48 items)"
    assert text.splitlines()[-1] == summary(report)
    assert "average, micro (headline)" in text
    assert "average, macro  " in text
    assert "40/48" in text
    assert "WARNING: look here" in text
    assert "excluded x/one/0001/ab: the answer is empty" in text
    assert "open: no" in text


def test_files_of_a_benchmark(tmp_path: Path) -> None:
    write_report(small(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == "mmllm.eval.report/1"
    assert (content["protocol"], content["protocol_hash"], content["headline"]) == ("canonical", "01234567", "micro")
    assert (content["average"], content["micro"], content["macro"], content["items"]) == (62.5, 62.5, 75.0, 40)
    assert set(content["tasks"]["one"]) == {
        "score", "chance", "blind", "single_frame", "items", "total", "missing", "unparsed", "broken"
    }  # fmt: skip
    assert "| one | 50.0 | 25.0 | 20.0 | 30.0 | 30/33 | 2 | 4 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "tasks.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_a_run(tmp_path: Path) -> None:
    run_report({"mvbench": small(), "mlvu": small("macro")}, {"train": 3.5, "evaluate": 1.0}, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content) == {"benchmarks", "seconds", "limit", "folders"}
    assert content["seconds"] == {"train": 3.5, "evaluate": 1.0}
    assert set(content["benchmarks"]["mlvu"]) == {"average", "chance", "blind", "single_frame", "items", "tasks"}
    assert content["benchmarks"]["mlvu"]["average"] == 75.0
    text = (tmp_path / "report.md").read_text()
    assert "| mvbench | 62.5 | micro |" in text
    assert "| all | 4.5 |" in text
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.shared
def test_mlvu_from_the_real_files(shared: Path, tmp_path: Path) -> None:
    root = tmp_path / "MLVU"
    shutil.copytree(shared / "data" / "mlvu", root / "json")
    for item in mlvu.load(root):
        item.media_path.parent.mkdir(parents=True, exist_ok=True)
        item.media_path.touch()
    letters = {(str(item.media_path), prompt(item)): item.gold for item in mlvu.load(root) if item.gold}

    def oracle(chats: list, *, frames: int | None, max_new_tokens: int) -> list[str]:
        return [letters[chat[0]["content"][0]["path"], chat[0]["content"][1]["text"]] for chat in chats]

    report = run_benchmark(BENCHMARKS["mlvu"], root, oracle, tmp_path / "out", CANONICAL, baselines=())
    assert (report.average, report.headline, report.scored, report.total) == (100.0, "macro", 2170, 2175)
    assert len(report.excluded) == 5
    assert report.not_scored == dict.fromkeys(("sub_scene", "summary"), "not scored: needs a judge")
    assert report.mean("chance") == 25.0
