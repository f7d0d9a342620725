"""VideoChat2-IT: a video or an image with questions, `{"video", "QA": [{"i", "q", "a"}], "start", "end"}`.

`i` is an instruction on how to answer, given once, before the question that it comes with; `q` is empty in captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.data.records.conversations import Sample, Source
from mmllm.data.records.formats.turns import Turn, conversation
from mmllm.data.records.json_files import short, take


@register("format", "videochat2")
class VideoChat2(Source):
    """Questions under `QA`, the path under `video` or `image`, and its seconds under `start` and `end`."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the key `QA`."""
        return first is not None and "QA" in first

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        if not isinstance(record.get("QA"), list) or not record["QA"]:
            raise UserError(f"{where}:QA", "missing", expected="a list of questions and answers")
        return conversation(record, where, self.root, self.spill, _questions(record["QA"], where), "QA")


def _questions(pairs: list[Any], where: str) -> list[Turn]:
    turns: list[Turn] = []
    instruction = ""
    for index, pair in enumerate(pairs):
        if not isinstance(pair, dict) or not isinstance(pair.get("a"), str):
            raise UserError(f"{where}:QA[{index}].a", "has no text", got=short(pair))
        said = [take(pair, key, str, f"{where}:QA[{index}]", "") for key in ("i", "q")]
        if said[0] == instruction:
            said[0] = ""
        instruction = said[0] or instruction
        turns += [("user", "\n".join(text for text in said if text)), ("assistant", pair["a"])]
    return turns
