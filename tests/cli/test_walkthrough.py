"""The path a user walks, end to end on the tiny world: make, train, evaluate, continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.cli import main
from mmllm.config import recipe as recipes
from mmllm.config.recipe import load

TWINS = [
    name for name in recipes.names() if name.startswith("nano/") and name.split("/")[1] not in ("base", "llava", "clip")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The tiny NanoWorld."""
    folder = tmp_path_factory.mktemp("walk") / "world"
    assert main(["world", "make", "--out", str(folder), "--level", "tiny", "--quiet", "--jobs", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A run of all stages, two steps each."""
    return train("nano/llava", world, world.parent / "run")


def train(recipe: str, world: Path, out: Path) -> Path:
    """A run of a nano twin, two steps a stage, with the text stages of the others, and the run that it starts from."""
    words = ["train", recipe, "--out", str(out), "--quiet", "--device", "cpu", "--jobs", "0"]
    words += ["--cache-dir", str(world.parent / "cache"), f"roots.world={world}"]
    made = load(recipe)
    for stage, values in made.stages.items():
        words += [f"stages.{stage}.steps=2", f"stages.{stage}.batch=4"]
        words += [f"stages.{stage}.validation=4"] if values.validation else []
    for root in {"teacher", "start"} & set(made.data["roots"]):
        other = "nano/small" if "small" in recipe else "nano/llava"
        words.append(f"roots.{root}={train(other, world, out.with_name(root))}")
    assert main(words) == 0
    return out


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_trains_and_is_evaluated(run, world, tmp_path, name):
    out = train(name, world, tmp_path / "run")
    words = ["eval", "--model", str(out), "--tasks", "mvbench", "--limit", "1", "--baselines", "none", "--quiet"]
    assert main([*words, "--device", "cpu"]) == 0
    assert json.loads((out / "report-limit-1.json").read_text())["benchmarks"]["mvbench"]["items"] == 20


def test_evaluation_reports_with_floors_and_denominator(run, capsys):
    words = ["eval", "--model", str(run), "--quiet", "--device", "cpu", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((run / "report.json").read_text())
    assert printed == report
    assert set(report["benchmarks"]) == {"mvbench", "mlvu"}
    for name, tasks in (("mvbench", 20), ("mlvu", 7)):
        found = report["benchmarks"][name]
        scored = {task: row for task, row in found["tasks"].items() if row["score"] is not None}
        assert len(scored) == tasks
        assert found["items"] == sum(row["items"] for row in scored.values())
        assert found["chance"] == pytest.approx({"mvbench": 27.5, "mlvu": 25.0}[name], abs=1.5)
    assert set(report["seconds"]) == {"letters", "text", "caption", "instruct", "eval_mvbench", "eval_mlvu"}
    assert {"report.md", "report.png", "eval"} <= {path.name for path in run.iterdir()}
    predictions = next((run / "eval" / "mvbench").glob("canonical-*/predictions.jsonl"))
    before = predictions.read_text()
    assert main(words) == 0
    assert predictions.read_text() == before


def test_answers_of_another_model_are_refused(run, world, capsys, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(run / "model", tmp_path / "model")
    state = load_file(other / "model.safetensors")
    name = next(iter(state))
    state[name] = state[name] + 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    words = [
        "eval",
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "mlvu",
        "--quiet",
        "--limit",
        "1",
        "--baselines",
        "none",
    ]
    assert main([*words, "--model", str(run)]) == 0
    assert main([*words, "--model", str(other)]) == 2
    assert "holds answers of another run; these differ: weights" in capsys.readouterr().err


def test_a_missing_clip_is_an_error_or_a_printed_hole(run, world, capsys, tmp_path):
    import shutil

    root = shutil.copytree(world / "mlvu", tmp_path / "mlvu")
    next((root / "video").rglob("*.mp4")).unlink()
    words = ["eval", "--model", str(run), "--tasks", "mlvu", "--root", f"mlvu={root}", "--out", str(tmp_path / "out")]
    assert main([*words, "--quiet", "--baselines", "none"]) == 2
    assert "missing" in capsys.readouterr().err
    assert main([*words, "--quiet", "--baselines", "none", "--missing", "skip"]) == 3
    assert main(["eval", "check", "--tasks", "mlvu", "--root", f"mlvu={root}"]) == 2
    assert main(["eval", "check", "--tasks", "mvbench", "--root", f"mvbench={world / 'mvbench'}"]) == 0


def test_evaluate_from_python(run, world):
    import mmllm

    model, processor = mmllm.load(run)
    report = mmllm.evaluate(model, processor, "mvbench", root=world / "mvbench", limit=3, baselines=())
    assert report.scored == 60
    assert report.missing == 0
    assert 0 <= report.average <= 100


def test_contact_sheets(world, capsys):
    assert main(["world", "show", "--out", str(world)]) == 0
    sheets = capsys.readouterr().out.split()
    assert len(sheets) == 29
    assert all(Path(path).is_file() for path in sheets)
