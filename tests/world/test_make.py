"""What `make_world` writes: layouts, balance, determinism, and clips that decode to what was drawn."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmllm.contract.errors import UserError
from mmllm.world.draw import render
from mmllm.world.groups import make_items
from mmllm.world.make import Job, Level, make_world, run_test
from mmllm.world.palette import HELD_OUT
from mmllm.world.sheet import contact_sheet, decode, seen
from mmllm.world.tasks import MLVU, MVBENCH, Task
from mmllm.world.training import draw_sample

SPLITS = ((0, "train"), (0, "text"), (0, "letters"), (1, "train"))
OPTIONS = "AS4 AP4 AA3 FA4 UA4 OE3 OI4 OS3 MD4 AL4 ST4 AC3 MC4 MA3 SC3 FP4 CO3 EN4 ER5 CI4"
FOLDERS = {
    "Action Sequence": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video",
    "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test",
    "Object Existence": "clevrer/video_validation",
    "Object Shuffle": "perception/videos",
    "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video",
    "Fine-grained Pose": "nturgbd",
    "Egocentric Navigation": "vlnqa",
    "Episodic Reasoning": "tvqa/frames_fps3_hq",
}


def read(root: Path, task: Task) -> list[dict]:
    """The items of a task."""
    return json.loads((root / "json" / f"{task.stem}.json").read_text(encoding="utf-8"))


def test_names_and_option_counts_are_the_benchmarks() -> None:
    short = ["".join(word[0] for word in task.name.split()).upper() for task in MVBENCH]
    short[3], short[15] = "FA", "FP"
    assert " ".join(f"{name}{task.options}" for name, task in zip(short, MVBENCH, strict=True)) == OPTIONS
    assert all(task.stem == task.name.lower().replace(" ", "_").replace("-", "_") for task in MVBENCH)
    assert {task.name: task.folder for task in MVBENCH if task.name in FOLDERS} == FOLDERS
    assert [task.name for task in MVBENCH if task.bounded] == [
        "Action Sequence", "Action Prediction", "Object Interaction", "Action Localization", "Episodic Reasoning",
    ]  # fmt: skip
    assert [task.stem for task in MLVU] == [
        "1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning", "8_sub_scene",
        "9_summary",
    ]  # fmt: skip


def test_files_and_schemas(tiny: Path) -> None:
    for root, tasks in (("mvbench", MVBENCH), ("mlvu", MLVU)):
        assert len(list((tiny / root / "json").iterdir())) == len(tasks)
        for task in tasks:
            items = read(tiny / root, task)
            assert len(items) == (task.options or 1)
            for item in items:
                path = tiny / root / "video" / task.folder / item["video"]
                assert path.is_dir() if task.reader == "frame" else path.is_file()
                assert ("start" in item) == ("end" in item) == task.bounded
                assert ("duration" in item) == ("question_type" in item) == (root == "mlvu")
                assert not task.options or item["answer"] in item["candidates"]
    jpgs = sorted(p.name for p in next((tiny / "mvbench/video/tvqa/frames_fps3_hq").iterdir()).iterdir())
    assert jpgs == [f"{i:05d}.jpg" for i in range(1, 33)]
    assert read(tiny / "mlvu", MLVU[7])[0]["scoring_points"]


@pytest.mark.parametrize("task", [task for task in MVBENCH + MLVU if task.options], ids=lambda task: task.stem)
def test_groups_are_balanced_and_blind_answerers_score_chance(task: Task) -> None:
    groups = 60 // task.options
    items = make_items(task, 0, groups, 48, 1)
    assert len(items) == 60
    blind: list[Callable[[str, tuple[str, ...]], str]] = [
        lambda text, options: options[0],
        lambda text, options: options[-1],
        lambda text, options: max(options, key=len),
        lambda text, options: options[zlib.crc32((text + str(options)).encode()) % len(options)],
    ]
    for group in range(groups):
        mine = [item for item in items if item.group == group]
        assert len({(item.question.text, item.options) for item in mine}) == 1
        assert Counter(item.question.answer for item in mine) == Counter(mine[0].options)
        assert len({len(item.scene.things) for item in mine}) == 1
    for answer in blind:
        right = sum(answer(item.question.text, item.options) == item.question.answer for item in items)
        assert right == groups
    by_place = sum(item.options[i % task.options] == item.question.answer for i, item in enumerate(items))
    assert by_place < groups + 4 * groups**0.5  # nor does an item's place in its group tell
    held = sum(any((thing.color, thing.shape) in HELD_OUT for thing in item.scene.things) for item in items)
    assert held >= 20


@pytest.mark.parametrize(("stem", "items"), [("action_antonym", 6), ("moving_direction", 4), ("9_summary", 7)])
def test_a_task_has_as_many_items_as_the_level_says(tmp_path: Path, stem: str, items: int) -> None:
    """Seven, rounded down to whole groups of three, of four, or of single items in free text."""
    task = next(task for task in MVBENCH + MLVU if task.stem == stem)
    root = tmp_path / ("mvbench" if task in MVBENCH else "mlvu")
    (root / "json").mkdir(parents=True)
    run_test(Job(tmp_path, stem, 0, 1, 0, Level(48, 0, 0, 7, 1, 0)))
    assert len(read(root, task)) == items
    assert len(list((root / "video" / task.folder).iterdir())) == items


def test_worlds_of_other_seeds_and_splits_of_one_have_other_scenes() -> None:
    one, other = (make_items(MVBENCH[8], seed, 4, 48, 1) for seed in (0, 1))
    assert [item.scene for item in one] == [item.scene for item in make_items(MVBENCH[8], 0, 4, 48, 1)]
    assert not {item.scene for item in one} & {item.scene for item in other}
    drawn = [[draw_sample(seed, split, i, 48, 1)[0].scene for i in range(20)] for seed, split in SPLITS]
    assert len({scene for scenes in drawn for scene in scenes}) == 20 * len(SPLITS)


def test_clips_decode_to_what_was_drawn(tiny: Path) -> None:
    for i in range(12):
        sample, _ = draw_sample(0, "train", i, 48, 1)
        frames = np.stack(decode(tiny / f"train/clips/{i:06d}.mp4")).astype(float)
        if not sample.bounded:
            assert frames.shape == render(sample.scene).shape
            assert np.abs(frames - render(sample.scene)).mean() < 8


def test_the_bounded_part_is_the_scene(tiny: Path) -> None:
    for task in [task for task in MVBENCH if task.bounded]:
        made = make_items(task, 0, 1, 48, 1)
        for item, made_item in zip(read(tiny / "mvbench", task), made, strict=True):
            path = tiny / "mvbench/video" / task.folder / item["video"]
            shown, drawn = np.stack(seen(item, path)).astype(float), render(made_item.scene)
            assert len(decode(path)) == 32
            first = [np.abs(drawn[i] - shown[0]).mean() for i in range(4)]
            last = [np.abs(drawn[i] - shown[-1]).mean() for i in range(12, 16)]
            assert min(first) < 8 and min(last) < 8


def test_same_bytes_again_and_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "again", "tiny", seed=0, jobs=2)
    files = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for name in files:
        assert (tiny / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_finished_worlds_are_kept_and_not_mixed(tiny: Path) -> None:
    stamp = (tiny / "train/text.jsonl").stat().st_mtime_ns
    calls: list[str] = []
    manifest = make_world(tiny, "tiny", seed=0, progress=lambda kind, done, total: calls.append(kind))
    assert not calls and (tiny / "train/text.jsonl").stat().st_mtime_ns == stamp
    assert manifest["counts"] == {
        "caption": 64,
        "grounding": 16,
        "instruct": 128,
        "letters": 100,
        "preference": 64,
        "review": 64,
        "text": 200,
    }
    with pytest.raises(UserError, match="holds another world"):
        make_world(tiny, "nano", seed=0)
    with pytest.raises(UserError, match="holds another world"):
        make_world(tiny, "tiny", seed=1)
    with pytest.raises(UserError, match="tiny"):
        make_world(tiny, "tinny")


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mvbench/json/action_antonym.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("[]")
    with pytest.raises(UserError, match="not of a world begun here, got mvbench"):
        make_world(tmp_path, "tiny")
    assert mine.read_text() == "[]"
    (tmp_path / "making.json").write_text('{"level": "hard", "seed": 0, "version": 2}')
    with pytest.raises(UserError, match="holds another world"):
        make_world(tmp_path, "tiny")
    (tmp_path / "making.json").write_text("{")
    with pytest.raises(UserError, match=r"making.json: damaged"):
        make_world(tmp_path, "tiny")
    (tmp_path / "world.json").write_text("[1]")
    with pytest.raises(UserError, match=r"world.json: damaged"):
        make_world(tmp_path, "tiny")


def test_a_world_that_was_interrupted_is_made_by_the_same_command(tiny: Path, tmp_path: Path) -> None:
    def interrupt(kind: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path, "tiny", jobs=1, progress=interrupt)
    make_world(tmp_path, "tiny", jobs=1)
    assert not (tmp_path / "making.json").exists()
    assert (tmp_path / "world.json").read_bytes() == (tiny / "world.json").read_bytes()


def test_training_lines(tiny: Path) -> None:
    lines = {
        name: [json.loads(line) for line in (tiny / f"train/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("letters", "text", "caption", "instruct", "preference")
    }
    for name in ("caption", "instruct", "preference"):
        for line in lines[name]:
            content = line["messages"][0]["content"]
            assert [part["type"] for part in content] == ["video", "text"]
            assert (tiny / "train" / content[0]["path"]).is_file()
    assert all(line["chosen"] != line["rejected"] for line in lines["preference"])
    replies = [turn["content"][0]["text"] for line in lines["instruct"] for turn in line["messages"][1::2]]
    lettered = sum(reply.endswith(("(A)", "(B)", "(C)", "(D)", "(E)")) for reply in replies)
    assert 0.45 < lettered / len(replies) < 0.8
    for line in lines["letters"]:
        ask, reply = (turn["content"][0]["text"] for turn in line["messages"])
        named = re.search(r"Which option is (.*)\?\n", ask)[1]
        assert reply.startswith(f"{named} (")
        assert f"\n{reply.removeprefix(named).strip()} {named}\n" in ask
    for line in lines["text"]:
        if len(line["messages"]) == 2 and line["messages"][0]["content"][0]["text"].startswith("Question"):
            continue  # asks about nothing
        assert line["messages"][0]["content"][0]["text"].startswith("The background ")
        assert [turn["role"] for turn in line["messages"]] == ["user", "assistant"] * (len(line["messages"]) // 2)


def test_contact_sheets(tiny: Path, tmp_path: Path) -> None:
    assert len(contact_sheet(tiny, tmp_path, rows=2)) == 29
    with pytest.raises(UserError, match="no finished world"):
        contact_sheet(tmp_path, tmp_path)
    (tmp_path / "world.json").write_text("{}")
    (tmp_path / "mvbench/json").mkdir(parents=True)
    for text in ("", "{}", "[5]", "[{}]"):
        (tmp_path / f"mvbench/json/{MVBENCH[0].stem}.json").write_text(text)
        with pytest.raises(UserError, match=f"{MVBENCH[0].stem}.json: damaged"):
            contact_sheet(tmp_path, tmp_path)
