"""Preference pairs as LLaVA-Hound and TRL write them: `{"id", "video", "prompt", "chosen", "rejected", ...}`.

The video is a folder of frames, as its authors distribute it, or a file; a name without a suffix finds `name.mp4`. The
prompt becomes the message, both answers stay fields. If `chosen` is missing, `answer` is used instead. Without a
prompt, `chosen` and `rejected` are whole conversations, and what they begin with is the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.data.records.conversations import Sample, Source
from mmllm.data.records.formats.turns import conversation
from mmllm.data.records.json_files import short


@register("format", "llava_hound")
class LlavaHound(Source):
    """A question with a better and a worse answer."""

    @classmethod
    def recognises(cls, path: Path, first: dict[str, Any] | None) -> bool:
        """By the keys `prompt` and `rejected`, or by two whole conversations, `chosen` and `rejected`."""
        if first is None or "rejected" not in first:
            return False
        return "prompt" in first or isinstance(first.get("chosen"), list)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        record = dict(record)
        record.setdefault("chosen", record.get("answer"))
        if "prompt" not in record:
            record |= _split(record, where)
        for key in ("prompt", "chosen", "rejected"):
            if not record.get(key):
                raise UserError(f"{where}:{key}", "missing", expected="a text")
            if not isinstance(record[key], str | list):
                raise UserError(f"{where}:{key}", "of the wrong type", expected="a text", got=short(record[key]))
        video = record.get("video")
        if isinstance(video, str) and video and not (self.root / video).exists():
            file = f"{video}.mp4"
            record["video"] = file if (self.root / file).is_file() else video
        return conversation(record, where, self.root, self.spill)


def _split(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Two conversations as the prompt that both begin with, and what follows."""
    both = [record.get(key) for key in ("chosen", "rejected")]
    if not all(isinstance(turns, list) and turns for turns in both):
        raise UserError(f"{where}:prompt", "missing", expected="a text, or whole conversations in chosen and rejected")
    same = next((i for i, (one, other) in enumerate(zip(*both, strict=False)) if one != other), min(map(len, both)))
    return {"prompt": both[0][:same], "chosen": both[0][same:], "rejected": both[1][same:]}
