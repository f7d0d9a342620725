"""LLaVA-Hound's preference pairs: `{"id", "video", "prompt", "chosen", "rejected", ...}`.

The video is a folder of frames, as its authors distribute it, or a file; a name without a suffix finds `name.mp4`. The
prompt becomes the message, both answers stay fields. If `chosen` is missing, `answer` is used instead.
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
        """By the keys `prompt` and `rejected`."""
        return first is not None and {"prompt", "rejected"} <= set(first)

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """See :class:`Source`."""
        record = dict(record)
        record.setdefault("chosen", record.get("answer"))
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
