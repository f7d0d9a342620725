"""What an evaluation keeps: reports by what they are of, items that cannot be read apart, one process at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_answers import Fake, lines, run

from mmllm.contract.errors import UserError
from mmllm.contract.files import held
from mmllm.eval.answerer import SUBJECT, _folder
from mmllm.eval.report import Report, TaskScore
from mmllm.eval.report_files import run_report

ROWS = "json/action_sequence.json"


def changed(root: Path, **values: Any) -> None:
    """The first item of a task with other values."""
    path = root / ROWS
    rows = json.loads(path.read_text())
    rows[0] |= values
    path.write_text(json.dumps(rows))


class Reading(Fake):
    """Refuses conversations whose clip it is told to; the others of a batch are not to blame."""

    def __init__(self, bad: str) -> None:
        super().__init__()
        self.bad = bad

    def __call__(self, conversations, **options):
        for chat in conversations:
            if self.bad in str(chat[-1]["content"][0].get("path")):
                raise UserError(self.bad, "cannot be decoded")
        return super().__call__(conversations, **options)


def test_a_report_over_some_items_does_not_replace_the_full_one(mvbench_root, tmp_path):
    full = run(mvbench_root, tmp_path, Fake(), baselines=())
    before = (tmp_path / "report.json").read_bytes()
    part = run(mvbench_root, tmp_path, Fake(), baselines=(), limit=1)
    assert (full.scored, part.scored) == (80, 20)
    assert (tmp_path / "report.json").read_bytes() == before
    assert json.loads((tmp_path / "limit-1" / "report.json").read_text())["limit"] == 1


def test_a_report_keeps_the_floors_that_were_measured_before(mvbench_root, tmp_path):
    run(mvbench_root, tmp_path, Fake())
    again = run(mvbench_root, tmp_path, Fake(), baselines=())
    assert again.mean("blind") == 25.0


def small(name: str, folder: Path, weights: str) -> Report:
    tasks = {"one": TaskScore(50.0, 25.0, None, None, 4, 4, 0, 0)}
    report = Report(name, "canonical", "01234567", "micro", tasks, subject={"weights": weights})
    from mmllm.eval.report_files import write_report

    write_report(report, folder)
    return report


def test_a_runs_report_keeps_other_benchmarks_of_the_same_model(tmp_path):
    of = {name: small(name, tmp_path / "eval" / name, "a") for name in ("mvbench", "mlvu")}
    run_report(of, {}, tmp_path)
    content = run_report({"mvbench": of["mvbench"]}, {}, tmp_path)
    assert list(content["benchmarks"]) == ["mlvu", "mvbench"]
    assert "mlvu" in (tmp_path / "report.md").read_text()
    other = {"mvbench": small("mvbench", tmp_path / "eval" / "mvbench", "b")}
    assert list(run_report(other, {}, tmp_path)["benchmarks"]) == ["mvbench"]
    run_report(of, {}, tmp_path, limit=1)
    assert list(json.loads((tmp_path / "report.json").read_text())["benchmarks"]) == ["mvbench"]
    assert json.loads((tmp_path / "report-limit-1.json").read_text())["limit"] == 1


def test_a_deleted_folder_of_answers_leaves_the_report_of_the_run(tmp_path):
    of = {name: small(name, tmp_path / "eval" / name, "a") for name in ("mvbench", "mlvu")}
    run_report(of, {}, tmp_path)
    (tmp_path / "eval" / "mvbench" / "report.json").unlink()
    assert list(run_report({"mlvu": of["mlvu"]}, {}, tmp_path)["benchmarks"]) == ["mlvu"]


def test_another_root_or_number_of_frames_has_a_folder_of_its_own(tmp_path):
    base, setting = tmp_path / "canonical-1", {"frames": None, "root": "/a"}
    assert _folder(base, setting) == base
    base.mkdir()
    (base / SUBJECT).write_text(json.dumps({"weights": "w", **setting}))
    assert _folder(base, setting) == base
    others = {_folder(base, {**setting, "frames": 16}), _folder(base, {**setting, "root": "/b"})}
    assert len(others) == 2
    assert all(path.parent == tmp_path and path.name.startswith("canonical-1-") for path in others)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"start": 3.0, "end": 1.0}, "its bound is 3.0 to 1.0 s"),
        ({"start": float("nan")}, "its bound is nan"),
        ({"end": float("inf")}, "to inf s"),
        ({"video": "../../../outside.mp4"}, "leaves the benchmark's folder"),
        ({"video": "/etc/passwd"}, "leaves the benchmark's folder"),
    ],
)
def test_an_unsound_item_stops_or_is_counted_apart(mvbench_root, tmp_path, values, reason):
    changed(mvbench_root, **values)
    with pytest.raises(UserError, match=rf"1 items cannot be read.*{reason}.*--missing skip"):
        run(mvbench_root, tmp_path, Fake())
    report = run(mvbench_root, tmp_path, Fake(), missing="skip")
    assert (report.scored, report.unreadable, report.missing, report.total) == (79, 1, 0, 80)
    assert reason in report.broken[0]["reason"]
    assert "| broken |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["tasks"]["Action Sequence"]["broken"] == 1


def test_a_clip_that_cannot_be_read_is_counted_apart_and_the_rest_of_its_batch_is_answered(mvbench_root, tmp_path):
    with pytest.raises(UserError, match="cannot be decoded"):
        run(mvbench_root, tmp_path / "stops", Reading("action_sequence_0.mp4"))
    report = run(mvbench_root, tmp_path, Reading("action_sequence_0.mp4"), missing="skip", batch_size=7)
    assert (report.scored, report.unreadable, report.total) == (79, 1, 80)
    assert report.broken[0]["reason"] == "action_sequence_0.mp4: cannot be decoded"
    assert len(lines(tmp_path)) == 3 * 79
    again = Fake()
    assert run(mvbench_root, tmp_path, again, missing="skip").scored == 80  # it was mended meanwhile
    assert again.asked.total() == 2  # with the clip and with a frame; without it the question was known


def test_nothing_readable_is_no_report(mvbench_root, tmp_path):
    with pytest.raises(UserError, match="no clip can be read"):
        run(mvbench_root, tmp_path, Reading("video"), missing="skip", baselines=(), limit=1)


def test_check_finds_what_would_not_be_read(mvbench_root, capsys):
    from mmllm.cli import main

    changed(mvbench_root, start=0.0, end=0.5)
    command = ["eval", "check", "--tasks", "mvbench", "--root", f"mvbench={mvbench_root}", "--json", "--quiet"]
    assert main(command) == 2
    found = json.loads(capsys.readouterr().out)["mvbench"]
    assert found["items"] == 80
    assert len(found["broken"]) == 80  # the clips of these tests are no videos
    assert "action_sequence" in found["broken"][0]["id"]


def test_a_folder_of_answers_has_one_evaluation_at_a_time(tmp_path, monkeypatch):
    import subprocess
    import sys

    script = "import sys, time; from pathlib import Path; from mmllm.contract.files import held\n"
    script += "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path / "answers")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid}"), held(tmp_path / "answers"):
            pass
        other.kill()


def test_models_of_one_name_get_folders_of_their_own():
    from mmllm.cli.eval import _labels

    assert _labels(["a/model", "b/model"]) == {"a/model": "a-model", "b/model": "b-model"}
    assert _labels(["runs/x", "runs/y"]) == {"runs/x": "x", "runs/y": "y"}
    with pytest.raises(UserError, match="--model: given twice"):
        _labels(["runs/x", "runs/../runs/x"])


def test_the_subject_says_what_else_answers_depend_on():
    import torch

    from mmllm.eval.answerer import subject_of

    def subject(template: str = "t", tokens: int = 1, backend: str = "pyav", bits: torch.dtype = torch.float32) -> Any:
        backend_tokenizer = SimpleNamespace(to_str=lambda: "{}")
        tokenizer = SimpleNamespace(backend_tokenizer=backend_tokenizer, chat_template=template)
        reader = SimpleNamespace(reader=SimpleNamespace(backend=backend, corrupt="warn"))
        model = torch.nn.Linear(1, 1, bias=False).to(bits)
        torch.nn.init.ones_(model.weight)
        model.generation_config = SimpleNamespace(to_dict=lambda: {"max_new_tokens": tokens})
        model.dtype = bits
        return subject_of(model, SimpleNamespace(tokenizer=tokenizer, loader=reader, model_section={}))

    base = subject()
    assert base == subject()
    for other in (subject("u"), subject(tokens=2), subject(backend="decord"), subject(bits=torch.bfloat16)):
        assert other != base


def test_answers_about_damaged_clips_are_counted_apart(mvbench_root, tmp_path):
    class Damaged(Fake):
        """Finds one clip damaged."""

        damaged = {str(mvbench_root / "video/star/Charades_v1_480/action_sequence_0.mp4")}

    report = run(mvbench_root, tmp_path, Damaged())
    assert (report.damaged, report.scored) == (1, 80)
    assert any("1 of 80 items were answered from clips with damaged frames" in text for text in report.warnings)
    assert run(mvbench_root, tmp_path, Fake()).damaged == 1  # kept with the answers
    assert Report.read(tmp_path).damaged == 1


def test_a_clip_that_has_changed_since_is_asked_about_again(mvbench_root, tmp_path):
    run(mvbench_root, tmp_path, Fake(), baselines=("blind",))
    clip = mvbench_root / "video/star/Charades_v1_480/action_sequence_0.mp4"
    clip.write_bytes(clip.read_bytes() + b"more")
    asked = Fake()
    report = run(mvbench_root, tmp_path, asked, baselines=("blind",))
    rows = lines(tmp_path)
    again = rows[160:]
    assert {row["condition"] for row in again} == {"model"} and len({row["id"] for row in again}) == len(again) >= 1
    assert report.scored == 80
    run(mvbench_root, tmp_path, Fake(), baselines=("blind",))
    assert len(lines(tmp_path)) == len(rows)
