"""MVBench: twenty tasks on short clips, some of them on a bounded part of the clip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.eval.items import Item, TaskRow, gold_letter, item_id, items_of, need_root, options_of, seconds_of, text_of

NAME = "mvbench"
REPLACEMENTS = "data0613"  # clips of the June 2024 replacement, shipped in a separate folder


@dataclass(frozen=True)
class MVBenchTask(TaskRow):
    """One row of the task table.

    Attributes:
        reader: "video" for files, "frame" for folders of jpg files at 3 frames per second.
        bounded: True where `start` and `end` of an item apply.
    """

    reader: str = "video"
    bounded: bool = False


TASKS = (
    MVBenchTask("Action Sequence", "AS", "action_sequence", "star/Charades_v1_480", bounded=True),
    MVBenchTask("Action Prediction", "AP", "action_prediction", "star/Charades_v1_480", bounded=True),
    MVBenchTask("Action Antonym", "AA", "action_antonym", "ssv2_video"),
    MVBenchTask("Fine-grained Action", "FA", "fine_grained_action", "Moments_in_Time_Raw/videos"),
    MVBenchTask("Unexpected Action", "UA", "unexpected_action", "FunQA_test/test"),
    MVBenchTask("Object Existence", "OE", "object_existence", "clevrer/video_validation"),
    MVBenchTask("Object Interaction", "OI", "object_interaction", "star/Charades_v1_480", bounded=True),
    MVBenchTask("Object Shuffle", "OS", "object_shuffle", "perception/videos"),
    MVBenchTask("Moving Direction", "MD", "moving_direction", "clevrer/video_validation"),
    MVBenchTask("Action Localization", "AL", "action_localization", "sta/sta_video", bounded=True),
    MVBenchTask("Scene Transition", "ST", "scene_transition", "scene_qa/video"),
    MVBenchTask("Action Count", "AC", "action_count", "perception/videos"),
    MVBenchTask("Moving Count", "MC", "moving_count", "clevrer/video_validation"),
    MVBenchTask("Moving Attribute", "MA", "moving_attribute", "clevrer/video_validation"),
    MVBenchTask("State Change", "SC", "state_change", "perception/videos"),
    MVBenchTask("Fine-grained Pose", "FP", "fine_grained_pose", "nturgbd"),
    MVBenchTask("Character Order", "CO", "character_order", "perception/videos"),
    MVBenchTask("Egocentric Navigation", "EN", "egocentric_navigation", "vlnqa"),
    MVBenchTask("Episodic Reasoning", "ER", "episodic_reasoning", "tvqa/frames_fps3_hq", reader="frame", bounded=True),
    MVBenchTask("Counterfactual Inference", "CI", "counterfactual_inference", "clevrer/video_validation"),
)


def load(root: Path | str) -> list[Item]:
    """All items of the twenty tasks, in the order of `TASKS` and of the files.

    Args:
        root: folder with ``json/`` (twenty files) and ``video/``. Keys of an item beyond those used are ignored.

    Raises:
        UserError: the folder or a file is missing, or an item is malformed (named by file, index and key).
    """
    root = Path(root)
    need_root(root, NAME)
    return items_of(TASKS, root / "json", partial(_item, root))


def _item(root: Path, task: MVBenchTask, index: int, row: dict[str, Any], where: str) -> Item:
    video, question = text_of(row, "video", where), text_of(row, "question", where)
    options, answer = options_of(row, where), text_of(row, "answer", where)
    start = seconds_of(row, "start", where) if task.bounded else None
    end = seconds_of(row, "end", where) if task.bounded else None
    return Item(
        benchmark=NAME,
        task=task.name,
        id=item_id(NAME, task.stem, index, video, start, end, question, options, answer),
        media_path=_media_path(root / "video", task.folder, video),
        start=start,
        end=end,
        frame_folder=task.reader == "frame",
        question=question,
        options=options,
        answer=answer,
        gold=gold_letter(options, answer),
        video=f"{task.folder}/{video}",
    )


def _media_path(videos: Path, folder: str, video: str) -> Path:
    path = videos / folder / video
    if not path.exists():
        replacement = videos / REPLACEMENTS / folder / video
        if replacement.exists():
            return replacement
    return path
