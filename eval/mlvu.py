"""MLVU, dev set: seven multiple-choice tasks and two generation tasks on long videos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.eval.items import Item, TaskRow, gold_letter, item_id, items_of, need_root, options_of, text_of

NAME = "mlvu"
JSON_FOLDERS = ("json", "upload_json", ".")


@dataclass(frozen=True)
class MLVUTask(TaskRow):
    """One row of the task table; `stem` is also the name of the hub's video folder.

    Attributes:
        kind: "choice", or "open" for a generated answer.
    """

    kind: str = "choice"


TASKS = (
    MLVUTask("plotQA", "PQA", "1_plotQA", "plotQA"),
    MLVUTask("needle", "NQA", "2_needle", "needle"),
    MLVUTask("ego", "ER", "3_ego", "ego"),
    MLVUTask("count", "AC", "4_count", "count"),
    MLVUTask("order", "AO", "5_order", "order"),
    MLVUTask("anomaly_reco", "AR", "6_anomaly_reco", "anomaly_reco"),
    MLVUTask("topic_reasoning", "TR", "7_topic_reasoning", "topic_reasoning"),
    MLVUTask("sub_scene", "SSC", "8_sub_scene", "subPlot", kind="open"),
    MLVUTask("summary", "VS", "9_summary", "summary", kind="open"),
)


def load(root: Path | str) -> list[Item]:
    """All items of the nine dev tasks, in the order of `TASKS` and of the files.

    Args:
        root: folder with ``json/`` (or ``upload_json/``, or the nine files themselves) and ``video/`` with the
            authors' folders (``plotQA``) or the hub's (``1_plotQA``). The file determines the task: the field
            `question_type` of the items is not used.

    Raises:
        UserError: the folder or a file is missing, or an item is malformed (named by file, index and key).
    """
    root = Path(root)
    need_root(root, NAME)
    return items_of(TASKS, _json_folder(root), partial(_item, root))


def _json_folder(root: Path) -> Path:
    for name in JSON_FOLDERS:
        if any((root / name / f"{task.stem}.json").is_file() for task in TASKS):
            return root / name
    raise UserError(root / "json", "annotation files missing", expected=f"{TASKS[0].stem}.json and eight more")


def _item(root: Path, task: MLVUTask, index: int, row: dict[str, Any], where: str) -> Item:
    video, question, answer = (text_of(row, key, where) for key in ("video", "question", "answer"))
    options = options_of(row, where) if task.kind == "choice" else ()
    return Item(
        benchmark=NAME,
        task=task.name,
        id=item_id(NAME, task.name, index, video, question, options, answer),
        media_path=_media_path(root / "video", task, video),
        start=None,
        end=None,
        frame_folder=False,
        question=question,
        options=options,
        answer=answer,
        gold=gold_letter(options, answer),
        video=f"{task.folder}/{video}",
        kind=task.kind,
    )


def _media_path(videos: Path, task: MLVUTask, video: str) -> Path:
    paths = [videos / folder / video for folder in (task.folder, task.stem)]
    found = [path for path in paths if path.is_file()] or [path for path in paths if path.parent.is_dir()] or paths
    return found[0]
