"""Grounding as a kind of items: read, asked, scored and reported beside the others; single tasks by name."""

from __future__ import annotations

import json

import pytest

from mmllm.contract.errors import UserError
from mmllm.contract.grounding import Box, Coordinates, TimeSpan, Tube
from mmllm.eval.benchmarks import BENCHMARKS, parse_tasks, title_of
from mmllm.eval.grounding import load
from mmllm.eval.grounding_scores import by_frame, recalls, span_iou, tube_iou
from mmllm.eval.kinds import KINDS
from mmllm.eval.protocol import CANONICAL, messages
from mmllm.eval.report import Report
from mmllm.eval.report_files import render
from mmllm.eval.runner import run_benchmark
from mmllm.processing.grounding import written

LAYOUT = Coordinates(time=16, height=24, width=24, first=0)
TRUTHS = {
    "when": {"time": [0.2, 0.8]},
    "where": {"box": [0.1, 0.2, 0.5, 0.6]},
    "track": {"tube": [[0.0, 0, 0, 0.5, 0.5], [0.3333, 0, 0, 0.5, 0.5], [1.0, 0.5, 0.5, 1, 1]]},
}


@pytest.fixture
def root(tmp_path):
    """Two items per task on empty clip files."""
    for task, truth in TRUTHS.items():
        (tmp_path / "video" / task).mkdir(parents=True)
        rows = []
        for number in range(2):
            (tmp_path / "video" / task / f"{number}.mp4").touch()
            rows.append({"video": f"{number}.mp4", "question": f"{task} {number}?", "frames": 16, "truth": truth})
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{task}.json").write_text(json.dumps(rows))
    return tmp_path


class Answers:
    """Says the truth about the first item of each task, but for the end of a track, and nonsense about the second."""

    vocabulary = LAYOUT

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, conversations, *, frames, max_new_tokens):
        said = []
        for (turn,) in conversations:
            question = turn["content"][-1]["text"]
            self.asked.append((question, max_new_tokens))
            task, number = question.rstrip("?").split()
            said.append(written(load_truth(task), LAYOUT) if number == "0" else "nowhere")
        return said


def load_truth(task: str):
    numbers = next(iter(TRUTHS[task].values()))
    if task == "track":
        return Tube(tuple((row[0], Box(*row[1:])) for row in numbers[:-1]))
    return TimeSpan(*numbers) if task == "when" else Box(*numbers)


def test_right_and_unreadable_answers(root, tmp_path):
    answers = Answers()
    report = run_benchmark(BENCHMARKS["grounding"], root, answers, tmp_path / "out", CANONICAL, baselines=())
    assert report.average == pytest.approx((50 + 50 + 100 / 3) / 3, abs=4) and report.unparsed == 3
    assert report.tasks["when"].chance is None and report.mean("chance") is None
    track = report.tasks["track"].measures
    assert track["vIoU"] == report.tasks["track"].score and set(track) > {"tIoU", "sIoU", "recall@0.5"}
    assert track["sIoU"] > 45 and report.tasks["track"].score == pytest.approx(100 / 3, abs=3)
    assert report.tasks["where"].measures["recall@0.5"] == 50
    assert {length for _, length in answers.asked} == {KINDS["grounding"].max_new_tokens}
    assert "track: tIoU" in render(report) and "overlap with the truth in %" in render(report)
    assert Report.read(report.folder).tasks["track"].measures == track
    row = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])
    assert 0.9 < row["score"] <= 1 and row["measures"].keys() == {"tIoU"}


def test_single_tasks(root, tmp_path):
    answers = Answers()
    options = {"baselines": (), "tasks": ("where",)}
    report = run_benchmark(BENCHMARKS["grounding"], root, answers, tmp_path / "out", CANONICAL, **options)
    assert set(report.tasks) == {"where"} and len(answers.asked) == 2
    assert report.folder == tmp_path / "out/tasks-where"
    whole = run_benchmark(BENCHMARKS["grounding"], root, answers, tmp_path / "out", CANONICAL, baselines=())
    assert set(whole.tasks) == set(TRUTHS) and len(answers.asked) == 6  # what is known is not asked again
    with pytest.raises(UserError, match=r"no such task.*Try: when"):
        run_benchmark(BENCHMARKS["grounding"], root, answers, tmp_path / "x", CANONICAL, tasks=("wen",))


def test_the_question_alone_is_asked_with_both_ends_of_the_clip(root):
    item = load(root)[0]
    (turn,) = messages(item)
    assert turn["content"][1]["text"] == item.question
    assert turn["content"][0]["sampler"] == "ends"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mvbench,mlvu", {"mvbench": (), "mlvu": ()}),
        ("mlvu:order,needle", {"mlvu": ("order", "needle")}),
        ("mlvu:order,mlvu", {"mlvu": ()}),
        ("mlvu,mlvu:order", {"mlvu": ()}),
        ("mlvu:order,needle,mvbench", {"mlvu": ("order", "needle"), "mvbench": ()}),
        ("grounding:when, mlvu:order", {"grounding": ("when",), "mlvu": ("order",)}),
        ("mvbench:Action Sequence,Fine-grained Pose", {"mvbench": ("Action Sequence", "Fine-grained Pose")}),
    ],
)
def test_tasks_by_name(text, found):
    assert parse_tasks(text) == found


def test_titles_and_unknown_names():
    assert title_of("mlvu", ()) == "mlvu" and title_of("mlvu", ("order", "needle")) == "mlvu:order,needle"
    for text in ("mlvuu", "mlvuu:order", "order,mlvu"):
        with pytest.raises(UserError, match="unknown benchmark"):
            parse_tasks(text)
    with pytest.raises(UserError, match="names no benchmark"):
        parse_tasks(",")


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (None, "wrong truth"),
        ({"time": [1]}, "wrong truth"),
        ({"box": [0, 0, 1, "1"]}, "wrong truth"),
        ({"tube": []}, "wrong truth"),
        ({"time": [0, 1], "box": [0, 0, 1, 1]}, "wrong truth"),
    ],
)
def test_damaged_items_are_named(root, truth, said):
    path = root / "json/where.json"
    rows = json.loads(path.read_text())
    rows[1]["truth"] = truth
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=f"where.json:item 1:truth: {said}"):
        load(root)


def test_overlaps():
    half, whole = Box(0, 0, 0.5, 1), Box(0, 0, 1, 1)
    assert half.iou(whole) == 0.5 and Box(1, 1, 0, 0).iou(whole) == 0
    assert span_iou(TimeSpan(0, 1), TimeSpan(2, 3)) == 0 == span_iou(TimeSpan(0, 1), TimeSpan(2, 3), reference=True)
    assert span_iou(TimeSpan(0, 2), TimeSpan(1, 3)) == pytest.approx(1 / 3)
    assert tube_iou({0: whole}, {0: whole, 1: whole}) == (1.0, 0.5)
    assert tube_iou({}, {0: whole}) == (0.0, 0.0)
    assert by_frame(Tube(((0.5, half), (0.52, whole))), 16) == {8: whole}
    assert recalls([0.2, 0.5, 0.9]) == {"recall@0.3": 200 / 3, "recall@0.5": 200 / 3, "recall@0.7": 100 / 3}
