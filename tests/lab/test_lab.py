"""Running studies: each thing once, continued, and counted right."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.studies import study

from mmllm.cli import main
from mmllm.contract.errors import UserError
from mmllm.lab.runs import Lab, Run, _slots, _terminated_as_interrupt
from mmllm.lab.study import StudyFile
from mmllm.lab.table import estimate, render, results

SCORES = {("llava", 0): 50.0, ("llava", 1): 54.0, ("means", 0): 47.0, ("means", 1): 49.0}


def test_files_of_benchmarks_are_asked_for_before_anything_runs(tmp_path, calls, capsys):
    words = ["--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    path = study(tmp_path, arms={"a": "nano/llava"}, set=["eval.mvbench=wrld:eval/mvbench"])
    assert main(["lab", str(path), *words]) == 2
    assert "arms.a: eval.mvbench: no root is called 'wrld'" in capsys.readouterr().err
    path = study(tmp_path, arms={"a": "llava"})  # a recipe that names none
    assert main(["lab", str(path), *words, "--dry-run"]) == 0
    assert main(["lab", str(path), *words]) == 2 and not calls
    assert "arms.a: eval.mvbench: where are its files?" in capsys.readouterr().err


def test_a_studys_folder_is_for_one_command_at_a_time(tmp_path, calls, capsys, monkeypatch):
    @contextlib.contextmanager
    def taken(folder: Path) -> Iterator[None]:
        raise UserError(folder, "in use")
        yield

    monkeypatch.setattr("mmllm.cli.lab.held", taken)
    words = ["--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    path = study(tmp_path, arms={"a": "nano/llava"}, set=[f"eval.mvbench={tmp_path}"])
    assert main(["lab", str(path), *words]) == 2 and not calls
    assert f"{tmp_path / 'out'}: in use" in capsys.readouterr().err


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """Verbs that runs call, which only write what the table reads."""
    made: list[list[str]] = []

    def call(self: Lab, run: Run, command: list[str], environment: dict[str, str]) -> None:
        made.append(command)
        if command[0] == "data":
            return
        if run.arm == "clip":
            (run.out / "status.json").write_text(json.dumps({"stages": {"contrast": {}}}))
        elif command[0] == "train":
            (run.out / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"instruct": {"batch": 10}}}))
            rows = [{"stage": "instruct", "step": 10 * i, "time": 5.0 * i} for i in range(4)]
            (run.out / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            words = {} if run.arm == "means" else {"words": SCORES[run.arm, run.seed] + 10}
            score = {"mvbench": {"average": SCORES[run.arm, run.seed], **words}}
            (run.out / "report.json").write_text(json.dumps({"benchmarks": score}))

    monkeypatch.setattr(Lab, "_call", call)
    return made


def test_the_table_counts_seed_by_seed(tmp_path, calls, capsys):
    path = study(tmp_path)
    words = ["lab", str(path), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert [command[0] for command in calls] == ["train", "eval"] * 4
    assert calls[2][:6] == ["train", "nano/video_chatgpt", "--out", str(tmp_path / "out/runs/means-0"), "--seed", "0"]
    assert "stages.instruct.lr=1e-4" in calls[2] and "stages.instruct.lr=1e-4" not in calls[0]
    arms = {row["arm"]: row for row in json.loads((tmp_path / "out/study.json").read_text())["arms"]}
    assert arms["llava"]["score"]["mean"] == 52.0 and arms["llava"]["difference"] is None
    assert arms["means"]["difference"]["mean"] == -4.0
    assert arms["means"]["difference"]["half"] == pytest.approx(12.706)
    assert arms["means"]["speed"] == pytest.approx(20.0)
    assert arms["llava"]["words"]["mean"] == 62.0 and arms["means"]["words"] is None
    assert "| means | mvbench | 17 |" in printed and "-4.0 [" in printed
    assert "2 seeds can show" in printed
    assert {"study.md", "study.png", "runs"} <= {entry.name for entry in (tmp_path / "out").iterdir()}
    calls.clear()
    assert main(words) == 0
    assert calls == []  # all is finished


def test_a_run_is_finished_with_all_benchmarks_and_is_another_one_with_another_plug_in(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    path = study(tmp_path, arms={"llava": "nano/llava"}, seeds=[0], tasks=["mvbench", "mlvu"], plugin="mine.py")
    lab = Lab(StudyFile(path), tmp_path / "out", cache=tmp_path, device="cpu", quiet=True)
    (run,) = lab.runs
    run.out.mkdir(parents=True)
    (run.out / "lab.json").write_text(json.dumps(lab._facts(run)))
    one = {"mvbench": {"average": 50.0}}
    (run.out / "report.json").write_text(json.dumps({"benchmarks": one}))
    assert lab.result(run) is None and lab.todo() == [run]
    both = {**one, "mlvu": {"average": 40.0}}
    (run.out / "report.json").write_text(json.dumps({"benchmarks": both}))
    assert lab.result(run) == {"none": both} and lab.todo() == []
    (tmp_path / "mine.py").write_text("x = 2\n")
    with pytest.raises(UserError, match="holds a run of another study; these differ: plugins"):
        lab.result(run)


def test_a_seed_that_the_baseline_lacks_is_no_difference(tmp_path, monkeypatch):
    """Seeds 1 and 2 are in both: 50 - 54 and 57 - 60."""
    monkeypatch.setattr("mmllm.lab.table.samples_per_second", lambda run: None)
    scores = {("base", 2): 60.0, ("base", 1): 54.0, ("mine", 0): 40.0, ("mine", 1): 50.0, ("mine", 2): 57.0}
    lab = SimpleNamespace(
        file=SimpleNamespace(
            study=SimpleNamespace(tasks=("mvbench",)),
            arms={"base": 0, "mine": 0},
            baseline="base",
            settings={"none": None},
        ),
        runs=[Run(arm, seed, tmp_path) for arm, seed in [*scores, ("base", 0)]],
        result=lambda run: (
            {"none": {"mvbench": {"average": score}}} if (score := scores.get((run.arm, run.seed))) else None
        ),
    )
    base, mine = results(lab, {"base": None, "mine": None})
    assert (base.score.mean, mine.score.mean, mine.difference.mean) == (57.0, 49.0, -3.5)
    assert mine.difference.half == pytest.approx(12.706 * 0.5)


def test_what_comes_first_is_trained_once_a_seed(tmp_path, calls, capsys):
    """With roots of the command line, without settings of the arms' stages; the arms of a seed find its folder."""
    path = study(tmp_path, first={"clip": "nano/clip"}, set=["stages.text.steps=3"])
    out = tmp_path / "out"
    words = ["lab", str(path), "--out", str(out), "--quiet", "--device", "cpu", "roots.world=w"]
    assert main([*words, "--dry-run"]) == 0 and "6 runs, 0 finished" in capsys.readouterr().out
    assert main([*words, "--jobs", "2"]) == 0
    trained = {Path(command[3]).name: command for command in calls if command[0] == "train"}
    assert len(calls) == 10 and sorted(trained) == ["clip-0", "clip-1", "llava-0", "llava-1", "means-0", "means-1"]
    assert "roots.world=w" in trained["clip-1"] and "stages.text.steps=3" not in trained["clip-1"]
    assert {"roots.world=w", "stages.text.steps=3", f"roots.clip={out}/runs/clip-1"} <= set(trained["means-1"])
    for name in ("llava-0", "llava-1", "means-0", "means-1"):
        roots = [word for word in trained[name] if word.startswith("roots.clip=")]
        assert roots == [f"roots.clip={out}/runs/clip-{name[-1]}"]
    calls.clear()
    assert main(words) == 0 and calls == []
    shutil.rmtree(out / "runs/clip-0")
    assert main(words) == 0 and calls == []  # its arms are finished
    study(tmp_path, first={"clip": {"recipe": "nano/clip", "set": ["stages.contrast.steps=7"]}}, set=[])
    words.append("stages.text.steps=3")
    assert main(words) == 2
    assert "llava-0: holds a run of another study; these differ: first.clip.stages" in capsys.readouterr().err
    for run in (out / "runs").iterdir():
        (run / "report.json").unlink(missing_ok=True)
    assert main(words) == 2
    assert "clip-1: holds a run of another study; these differ: recipe.stages" in capsys.readouterr().err
    shutil.rmtree(out / "runs/clip-1")
    assert main(words) == 2  # an arm that was cut off after it had begun
    assert "llava-0: holds a run of another study" in capsys.readouterr().err


def test_a_command_may_follow_what_comes_first(tmp_path, calls, capsys):
    """Its paths are resolved as those of recipes are; it is not repeated, and another one makes other arms."""
    then = "data align-levels world:train/caption.jsonl --pair clip:model '--out=clip:my levels.jsonl'"
    changes = {"first": {"clip": {"recipe": "nano/clip", "then": then}}, "arms": {"llava": "nano/llava"}, "seeds": [0]}
    out = tmp_path / "out"
    words = ["lab", str(study(tmp_path, **changes)), "--out", str(out), "--quiet", "--device", "cpu", "roots.world=w"]
    assert main(words) == 0
    run = out / "runs/clip-0"
    made = ["align-levels", "w/train/caption.jsonl", "--pair", f"{run}/model", f"--out={run}/my levels.jsonl"]
    assert [command[0] for command in calls] == ["train", "data", "train", "eval"] and calls[1] == ["data", *made]
    (out / "runs/llava-0/report.json").unlink()
    calls.clear()
    assert main(words) == 0 and [command[0] for command in calls] == ["train", "eval"]
    changes["first"]["clip"]["then"] = "data check world:train/caption.jsonl"
    study(tmp_path, **changes)
    assert main(words) == 2
    assert "llava-0: holds a run of another study; these differ: then.clip" in capsys.readouterr().err


def test_a_command_that_fails_is_repeated_and_can_be_mended(tmp_path, calls, monkeypatch, capsys):
    """No arm begins before it has ended well, and what was trained before it stays."""
    real = Lab._call

    def fails(self: Lab, run: Run, command: list[str], environment: dict[str, str]) -> None:
        real(self, run, command, environment)
        if command[-1].endswith("absent.jsonl"):
            raise UserError(run.label, "mmllm data ended with 2: absent.jsonl: no such data file")

    monkeypatch.setattr(Lab, "_call", fails)
    first = {"recipe": "nano/clip", "then": "data check clip:absent.jsonl"}
    changes = {"first": {"clip": first}, "arms": {"llava": "nano/llava"}, "seeds": [0]}
    words = ["lab", str(study(tmp_path, **changes)), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    for _ in range(2):
        calls.clear()
        assert main(words) == 2 and "no such data file" in capsys.readouterr().err
        assert [command[0] for command in calls] == ["train", "data"]
    first["then"] = "data check clip:x.jsonl"
    study(tmp_path, **changes)
    calls.clear()
    assert main(words) == 0 and [command[0] for command in calls] == ["train", "data", "train", "eval"]


def test_a_run_waits_for_what_comes_first(tmp_path, calls, monkeypatch):
    real, done = Lab._call, []

    def slow(self: Lab, run: Run, command: list[str], environment: dict[str, str]) -> None:
        real(self, run, command, environment)
        if run.arm == "clip":
            time.sleep(0.2)
        done.append(run.label)

    monkeypatch.setattr(Lab, "_call", slow)
    path = study(tmp_path, first={"clip": "nano/clip"}, seeds=[0])
    assert main(["lab", str(path), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu", "--jobs", "3"]) == 0
    assert done[0] == "clip seed 0" and len(done) == 5


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, calls, monkeypatch, capsys):
    real = Lab._call

    def fails(self: Lab, run: Run, command: list[str], environment: dict[str, str]) -> None:
        if run.arm == "means" and run.seed == 0:
            raise UserError(run.label, "mmllm train ended with 2: error: no such file", hint="see lab.log")
        real(self, run, command, environment)

    monkeypatch.setattr(Lab, "_call", fails)
    words = ["lab", str(study(tmp_path)), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "means seed 0: mmllm train ended with 2" in printed.err
    assert "| llava | mvbench |" in printed.out and "| means | mvbench |" in printed.out
    scores = {row["arm"]: row["scores"] for row in json.loads((tmp_path / "out/study.json").read_text())["arms"]}
    assert scores == {"llava": {"0": 50.0, "1": 54.0}, "means": {"1": 49.0}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_runs_side_by_side(tmp_path, monkeypatch, capsys, number):
    """Each has its share of the cores; none is left behind, and none is started afterwards."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" > {tmp_path}/started.$$\nexec sleep 60\n')
    python.chmod(0o755)
    monkeypatch.setattr("mmllm.lab.runs.sys.executable", str(python))
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    ours = signal.signal(number, signal.default_int_handler)  # whatever the tests were started under, nohup say

    def started() -> list[Path]:
        return [path for path in tmp_path.glob("started.*") if path.read_text()]

    def terminate() -> None:
        end = time.monotonic() + 120
        while len(started()) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=terminate)
    killer.start()
    words = ["lab", str(study(tmp_path)), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu", "--jobs", "2"]
    try:
        assert main(words) == (143 if number == signal.SIGTERM else 130)
    finally:
        signal.signal(number, ours)
    killer.join()
    assert "the same command continues" in capsys.readouterr().err
    assert [path.read_text().strip() for path in started()] == ["3", "3"]
    for path in started():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.suffix[1:]), 0)


def test_a_closed_terminal_is_ignored_under_nohup():
    ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _terminated_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt), _terminated_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ours)


@pytest.mark.parametrize(
    ("device", "gpus", "jobs", "places"),
    [
        ("cpu", 2, None, [{}]),
        (None, 0, 2, [{"OMP_NUM_THREADS": "4"}] * 2),
        (None, 2, None, [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "4"} for gpu in "01"]),
        ("cuda", 2, 3, [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"} for gpu in "010"]),
        (None, 1, None, [{"CUDA_VISIBLE_DEVICES": "0"}]),
    ],
)
def test_runs_go_to_gpus_in_turn_or_share_the_cores(monkeypatch, device, gpus, jobs, places):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert _slots(device, jobs) == places


def test_no_run_at_a_time_is_refused(tmp_path, capsys):
    assert main(["lab", str(study(tmp_path)), "--jobs", "0"]) == 2
    assert "--jobs: out of range, expected int >= 1" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(tmp_path, calls, capsys):
    assert main(["lab", str(study(tmp_path)), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "4 runs, 0 finished" in capsys.readouterr().out
    assert calls == [] and not (tmp_path / "out").exists()


def test_intervals():
    assert estimate([3.0]).half is None
    three = estimate([1.0, 2.0, 3.0])
    assert three.mean == 2.0 and three.half == pytest.approx(4.303 / math.sqrt(3))


@pytest.mark.slow
def test_a_study_runs_from_nothing(tmp_path):
    """Two arms, one seed, real processes on the tiny world."""
    world = tmp_path / "world"
    assert main(["world", "make", "--out", str(world), "--level", "tiny", "--quiet", "--jobs", "1"]) == 0
    names = ("letters", "text", "caption", "instruct")
    steps = [f"stages.{name}.{setting}" for name in names for setting in ("steps=2", "batch=4")]
    path = study(tmp_path, seeds=[0], set=[f"roots.world={world}", *steps], limit=4)
    words = ["lab", str(path), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    assert main([*words, "--cache-dir", str(tmp_path / "cache")]) == 0
    file = StudyFile(path)
    rows = results(Lab(file, tmp_path / "out", cache=tmp_path / "cache"), file.facts())
    assert [row.arm for row in rows] == ["llava", "means"] and all(0 <= row.score.mean <= 100 for row in rows)
    assert "taken from" in (tmp_path / "out/runs/means-0/events.txt").read_text()  # the text stage was trained once
    assert "means" in render(rows, "llava")


def test_a_file_in_the_current_folder_is_not_imported_in_place_of_a_library(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    lab = Lab(StudyFile(study(tmp_path)), tmp_path / "out", cache=tmp_path, device="cpu", quiet=True)
    run = lab.runs[0]
    run.out.mkdir(parents=True)
    lab._call(run, ["recipe", "list"], dict(os.environ))
    assert not (tmp_path / "ran").exists()
    assert "nano/llava" in (run.out / "lab.log").read_text()
