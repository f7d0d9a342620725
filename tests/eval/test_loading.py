"""Annotation files become items; what is wrong with them is named."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mmllm.contract.errors import UserError
from mmllm.eval import mlvu, mvbench
from mmllm.eval.benchmarks import BENCHMARKS, find_benchmark
from mmllm.eval.items import media_exists
from mmllm.eval.kinds import KINDS
from mmllm.eval.protocol import CANONICAL, messages, prompt

Edit = Callable[[Path, Callable], None]


def test_mvbench_items(mvbench_root: Path) -> None:
    items = mvbench.load(mvbench_root)
    assert len(items) == 80
    assert len({item.id for item in items}) == 80
    assert list(dict.fromkeys(item.task for item in items)) == [task.name for task in mvbench.TASKS]
    assert all(media_exists(item) for item in items)
    assert [item.gold for item in items[:4]] == ["A", "B", "C", "D"]
    assert {(item.start, item.end) for item in items} == {(None, None), (1.0, 2.5)}
    bounded = {item.task for item in items if item.start is not None}
    assert {task.abbr for task in mvbench.TASKS if task.name in bounded} == {"AS", "AP", "OI", "AL", "ER"}
    assert {item.task for item in items if item.frame_folder} == {"Episodic Reasoning"}


def test_mvbench_replacement_clips(mvbench_root: Path) -> None:
    folder = mvbench_root / "video" / "clevrer" / "video_validation"
    moved = mvbench_root / "video" / "data0613" / "clevrer" / "video_validation"
    moved.mkdir(parents=True)
    (folder / "moving_count_2.mp4").rename(moved / "moving_count_2.mp4")
    item = next(i for i in mvbench.load(mvbench_root) if i.video.endswith("moving_count_2.mp4"))
    assert item.media_path == moved / "moving_count_2.mp4"
    assert item.video == "clevrer/video_validation/moving_count_2.mp4"


def test_mvbench_ids_follow_the_content(mvbench_root: Path, edit_json: Edit) -> None:
    before = {item.id for item in mvbench.load(mvbench_root)}
    path = mvbench_root / "json" / "scene_transition.json"
    edit_json(path, lambda rows: [{**rows[0], "question": "another?"}, *rows[1:]])
    after = {item.id for item in mvbench.load(mvbench_root)}
    assert len(before & after) == 79


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: {"a": rows}, "scene_transition.json: wrong content"),
        (lambda rows: [rows[0], 3], "item 1: wrong item, expected an object, got int"),
        (lambda rows: [rows[0], {"video": "x.mp4"}], "item 1:question: key missing"),
        (lambda rows: [{**rows[0], "candidates": "red"}], "item 0:candidates: wrong options"),
        (lambda rows: [{**rows[0], "candidates": ["red", None]}], "item 0:candidates[1]: wrong value"),
        (lambda rows: [{**rows[0], "candidates": ["x"] * 27}], "at most 26, got 27"),
    ],
)
def test_malformed_items_are_named(mvbench_root: Path, edit_json: Edit, change: Callable, words: str) -> None:
    edit_json(mvbench_root / "json" / "scene_transition.json", change)
    with pytest.raises(UserError) as error:
        mvbench.load(mvbench_root)
    assert words in str(error.value)


def test_missing_bound_file_and_folder_are_named(mvbench_root: Path, edit_json: Edit) -> None:
    edit_json(mvbench_root / "json" / "action_localization.json", lambda rows: [{**rows[0], "end": "soon"}])
    with pytest.raises(UserError, match="item 0:end: wrong bound"):
        mvbench.load(mvbench_root)
    (mvbench_root / "json" / "action_localization.json").write_text("[")
    with pytest.raises(UserError, match="not JSON"):
        mvbench.load(mvbench_root)
    (mvbench_root / "json" / "action_localization.json").unlink()
    with pytest.raises(UserError, match=r"action_localization\.json: annotation file missing"):
        mvbench.load(mvbench_root)
    with pytest.raises(UserError, match="no folder for mvbench"):
        mvbench.load(mvbench_root / "nowhere")


@pytest.mark.shared
def test_mvbench_items_of_the_real_clips(shared: Path, tmp_path: Path) -> None:
    questions = json.loads((shared / "data" / "videos" / "mini_questions.json").read_text())
    del questions["Episodic Reasoning"]  # a video file without bounds there, while the task reads bounded folders
    (tmp_path / "json").mkdir()
    for task in mvbench.TASKS:
        (tmp_path / "json" / f"{task.stem}.json").write_text(json.dumps(questions.get(task.name, [])))
        for row in questions.get(task.name, []):
            link = tmp_path / "video" / task.folder / row["video"]
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to((shared / "data" / "videos" / row["video"]).resolve())
    items = mvbench.load(tmp_path)
    assert len(items) == 15
    assert all(item.gold and not KINDS[item.kind].defect(item) and media_exists(item) for item in items)
    assert (items[0].start, items[0].end, items[0].gold) == (7.5, 10.0, "C")


@pytest.mark.shared
def test_mlvu_items_of_the_real_files(shared: Path) -> None:
    items = mlvu.load(shared / "data" / "mlvu")
    assert Counter(item.task for item in items) == {
        "plotQA": 539,
        "needle": 355,
        "ego": 352,
        "count": 206,
        "order": 259,
        "anomaly_reco": 200,
        "topic_reasoning": 264,
        "sub_scene": 201,
        "summary": 217,
    }
    assert len({item.id for item in items}) == 2593
    assert {item.task for item in items if item.kind == "open"} == {"sub_scene", "summary"}
    bad = {
        "/".join(item.id.split("/")[1:3]): KINDS[item.kind].defect(item)
        for item in items
        if KINDS[item.kind].defect(item)
    }
    assert bad == {
        "needle/0034": "the answer is not among the options",
        "needle/0338": "the answer is not among the options",
        "ego/0119": "the answer is empty",
        "ego/0313": "the answer is empty",
        "topic_reasoning/0026": "all options are empty",
    }


@pytest.mark.shared
def test_mlvu_duplicate_options_are_both_right(shared: Path) -> None:
    items = {"/".join(item.id.split("/")[1:3]): item for item in mlvu.load(shared / "data" / "mlvu")}
    item = items["anomaly_reco/0066"]
    right = [letter for letter in "ABCD" if item.is_right(letter)]
    assert len(right) == 2
    assert right[0] == item.gold
    assert not item.is_right(None)
    assert not item.is_right("E")


@pytest.mark.shared
@pytest.mark.parametrize(("json_folder", "video_folder"), [("json", "8_sub_scene"), ("upload_json", "subPlot")])
def test_mlvu_layouts(shared: Path, tmp_path: Path, json_folder: str, video_folder: str) -> None:
    shutil.copytree(shared / "data" / "mlvu", tmp_path / json_folder)
    name = json.loads((tmp_path / json_folder / "8_sub_scene.json").read_text())[0]["video"]
    (tmp_path / "video" / video_folder).mkdir(parents=True)
    (tmp_path / "video" / video_folder / name).touch()
    first = next(item for item in mlvu.load(tmp_path) if item.task == "sub_scene")
    assert media_exists(first)
    assert first.video == f"subPlot/{name}"


def test_prompt_and_messages(mvbench_root: Path) -> None:
    items = {item.task: item for item in mvbench.load(mvbench_root)}
    item = items["Episodic Reasoning"]
    options = "(A) red\n(B) green\n(C) blue\n(D) not sure"
    text = f"Question: Episodic Reasoning?\nOptions:\n{options}\nOnly give the best option."
    assert prompt(item) == text
    entry = {"type": "video", "path": str(item.media_path), "start": 1.0, "end": 2.5, "fps": 3.0}
    assert messages(item) == [{"role": "user", "content": [entry, {"type": "text", "text": text}]}]
    assert messages(item, blind=True) == [{"role": "user", "content": [{"type": "text", "text": text}]}]
    plain = messages(items["State Change"])[0]["content"][0]
    assert set(plain) == {"type", "path"}
    assert (CANONICAL.max_new_tokens, CANONICAL.sampler, CANONICAL.system) == (16, "uniform", "")
    assert CANONICAL.folder == f"canonical-{CANONICAL.hash}"


def test_benchmarks_by_name() -> None:
    assert {name: benchmark.average for name, benchmark in BENCHMARKS.items()} == {
        "mvbench": "micro",
        "mlvu": "macro",
        "grounding": "macro",
    }
    with pytest.raises(UserError, match="mvbench"):
        find_benchmark("mvbnch")
