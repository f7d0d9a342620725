"""One trained run under several settings of its evaluation."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml
from helpers.studies import study

from mmllm.cli import main
from mmllm.eval.report_files import place_of
from mmllm.lab.runs import Lab


def test_one_training_is_evaluated_under_several_settings(tmp_path, monkeypatch, capsys):
    """One command per budget and protocol; a curve; a setting added later costs no training."""
    settings = [{}, {"reduce": ["random", "aim"], "keep": [0.5, 0.25]}]
    path = study(tmp_path, arms={"llava": "nano/llava"}, seeds=[0, 1], evaluate=settings)
    calls: list[list[str]] = []

    def call(self, run, command, environment):
        calls.append(command)
        if command[0] == "train":
            (run.out / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"instruct": {"batch": 10}}}))
            (run.out / "log.jsonl").write_text("")
            return
        ways = [word for flag, word in itertools.pairwise(command) if flag == "--reduce"] or ["none"]
        keep = float(command[command.index("--keep") + 1]) if "--keep" in command else 1.0
        for way in ways:
            protocol = "likelihood" if "likelihood" in command else "canonical"
            place = place_of(run.out, "none" if way == "none" else f"{way}-{keep:g}", protocol)
            place.mkdir(parents=True, exist_ok=True)
            score = {"mvbench": {"average": 60 * keep + run.seed}}
            (place / "report.json").write_text(json.dumps({"benchmarks": score}))

    monkeypatch.setattr(Lab, "_call", call)
    words = ["lab", str(path), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu", "--json"]
    assert main(words) == 0
    assert [command[0] for command in calls] == ["train", "eval", "eval", "eval"] * 2
    assert calls[2][-6:] == ["--reduce", "random", "--reduce", "aim", "--keep", "0.5"]
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)["arms"]}
    assert list(rows) == ["none", "random-0.5", "aim-0.5", "random-0.25", "aim-0.25"]
    assert rows["none"]["difference"] is None and rows["aim-0.25"]["difference"]["mean"] == -45.0
    assert "| llava | aim-0.25 | mvbench |" in (tmp_path / "out" / "study.md").read_text()
    calls.clear()
    study(tmp_path, arms={"llava": "nano/llava"}, seeds=[0, 1], evaluate=[*settings, {"protocol": "likelihood"}])
    assert main(words) == 0
    likely = [command for command in calls if "likelihood" in command]
    assert len(likely) == 2 and all(command[0] in ("train", "eval") for command in calls)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"keep": 0.5}, "nothing to keep less of"),
        ({"reduce": "nothing", "keep": 0.5}, "no reducer is called"),
        ({"reduce": "aim"}, "no budget"),
        ({"protocol": "mine"}, "no such protocol"),
        ({"kept": 1}, "unknown"),
        ({"reduce": "fastv", "keep": 0.3}, "2 of 3 layers read everything"),
    ],
)
def test_settings_are_checked_before_anything_runs(tmp_path, capsys, setting, said):
    path = study(tmp_path, evaluate=[setting])
    assert main(["lab", str(path), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
