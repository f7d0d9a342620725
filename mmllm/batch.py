"""From single conversations to a batch: what the processor makes and the model's forward takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from mmllm.contract.types import Geometry, MediaSpec


@dataclass
class Medium:
    """One decoded clip or image: what a batch holds of it once, however often it is used.

    Attributes:
        key: equal for equal media. source: what was given in memory, kept so that its identity stays its own.
    """

    key: Any
    spec: MediaSpec
    times: Tensor
    pixels: dict[Geometry, Tensor]
    source: Any = None


@dataclass
class Example:
    """One conversation, ready to be batched.

    Attributes:
        ids: token ids with every medium expanded. labels: the same with -100 where nothing is learnt, or None.
        media: its media in order. spans: (start, medium, stream) of every visual span.
        name: what to call it in errors.
    """

    ids: list[int]
    labels: list[int] | None
    media: list[Medium] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    name: str = ""


class VisualBatch(BatchFeature):
    """A BatchFeature whose `.to` reaches into the visual part; a dtype casts no times and no pixels."""

    def to(self, *args: Any, **kwargs: Any) -> VisualBatch:
        """Move everything; floating-point tensors outside `visual` are cast too where a dtype is given."""
        device = kwargs.get("device")
        if device is None and args and not isinstance(args[0], torch.dtype):
            device = args[0]
        visual = self.data.pop("visual", None)
        super().to(*args, **kwargs)
        if visual is not None:
            self.data["visual"] = visual if device is None else move(visual, device)
        return self


def move(value: Any, device: torch.device | str) -> Any:
    """Every tensor in nested dicts, lists and tuples, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


def collate(examples: list[Example], pad_id: int, padding_side: str) -> VisualBatch:
    """A batch: padded ids, mask, labels, and the `visual` dict in which equal media appear once.

    Args:
        pad_id: token id of padding. padding_side: "left" or "right".
    """
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100) if examples[0].labels is not None else None
    media: dict[Any, int] = {}
    clips: list[dict[str, Any]] = []
    spans: list[tuple[int, int, int, int]] = []
    for row, example in enumerate(examples):
        offset = length - len(example.ids) if padding_side == "left" else 0
        place = slice(offset, offset + len(example.ids))
        ids[row, place] = torch.tensor(example.ids)
        mask[row, place] = 1
        if labels is not None:
            labels[row, place] = torch.tensor(example.labels)
        for start, index, stream in example.spans:
            medium = example.media[index]
            if medium.key not in media:
                media[medium.key] = len(clips)
                clips.append({"spec": medium.spec, "times": medium.times, "pixels": medium.pixels})
            spans.append((row, start + offset, media[medium.key], stream))
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels is not None:
        batch["labels"] = labels
    table = torch.tensor(spans, dtype=torch.long).reshape(-1, 4)
    batch["visual"] = {"media": clips, "pairs": [(i, -1) for i in range(len(clips))], "spans": table}
    return VisualBatch(batch)
