"""From single conversations to a batch: what the processor makes and the model's forward takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from mmllm.contract.types import Geometry, MediaSpec


@dataclass
class Medium:
    """One decoded clip or image, stored once per batch, however often it is used.

    Attributes:
        key: equal for equal media.
        source: the object given in memory, kept alive so that its identity is not reused.
        corrupt: (first, last) seconds within which its frames may be damaged.
        features: {encoder: its cached tensors}, in place of pixels.
        keys: {encoder: the key under which to cache its output}.
    """

    key: Any
    spec: MediaSpec
    times: Tensor
    pixels: dict[Geometry, Tensor]
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    source: Any = None
    corrupt: tuple[tuple[float, float], ...] = ()

    def for_model(self) -> dict[str, Any]:
        """What the front end needs of it, and its file if that is damaged."""
        names = ("spec", "times", "pixels", "features", "keys")
        taken = {name: getattr(self, name) for name in names}
        return taken | ({"damaged": str(self.source)} if self.corrupt else {})


@dataclass
class Example:
    """One conversation, ready to be batched.

    Attributes:
        ids: token ids with every medium expanded.
        labels: the same with -100 where nothing is learned, or None.
        media: its media in order.
        spans: (start, medium, stream) of every visual span.
        coordinates: (position, token below, token above, how far between them) of every exact place.
        prompt: {text source: ids} of what the user says.
        alignment_level: how completely text and media match, -1 = unknown.
        name: its name in errors.
    """

    ids: list[int]
    labels: list[int] | None
    media: list[Medium] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    coordinates: list[tuple[int, int, int, float]] = field(default_factory=list)
    prompt: dict[str, list[int]] = field(default_factory=dict)
    alignment_level: int = -1
    name: str = ""


class VisualBatch(BatchFeature):
    """A BatchFeature whose `.to` reaches into the visual part; a dtype does not cast times and pixels."""

    def to(self, *args: Any, **kwargs: Any) -> VisualBatch:
        """Move everything; if a dtype is given, floating-point tensors outside `visual` are also cast."""
        device = kwargs.get("device")
        if device is None and args and not isinstance(args[0], torch.dtype):
            device = args[0]
        visual = self.data.pop("visual", None)
        super().to(*args, **kwargs)
        if visual is not None:
            self.data["visual"] = visual if device is None else move(visual, device)
        return self


def move(value: Any, device: torch.device | str) -> Any:
    """Move every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


def joined(parts: list[dict[str, Any]], attention_mask: Tensor | None) -> dict[str, Any]:
    """The `visual` dicts of single rows joined into one, as the library's pipeline collates the rest.

    Args:
        attention_mask: [B, L] of the batch; padding before a row's first token shifts the row's spans. None = no row
            is padded.
    """
    offsets = [0] * len(parts) if attention_mask is None else attention_mask.long().argmax(dim=1).tolist()
    media, pairs, spans, prompts = [], [], [], 0
    for row, (part, offset) in enumerate(zip(parts, offsets, strict=True)):
        moved = part["spans"] + part["spans"].new_tensor([row, offset, len(pairs), 0])
        spans.append(moved)
        pairs += [(clip + len(media), -1 if prompt < 0 else prompt + prompts) for clip, prompt in part["pairs"]]
        media += part["media"]
        prompts += len(next(iter(part["prompts"].values()))["ids"]) if "prompts" in part else 0
    whole = {"media": media, "pairs": pairs, "spans": torch.cat(spans), **_located(parts, offsets)}
    asked = [part["prompts"] for part in parts if "prompts" in part]
    return whole | ({"prompts": {name: _stacked([part[name] for part in asked]) for name in asked[0]}} if asked else {})


def _located(parts: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
    """The coordinates of all rows, if any has some."""
    found = []
    for row, (part, offset) in enumerate(zip(parts, offsets, strict=True)):
        if "coordinates" in part:
            given = part["coordinates"]
            found.append({**given, "places": given["places"] + given["places"].new_tensor([row, offset])})
    return {"coordinates": {key: torch.cat([one[key] for one in found]) for key in found[0]}} if found else {}


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of prompts, right-padded to the longest as all text sources pad."""
    length = max(part["ids"].shape[1] for part in parts)

    def padded(value: Tensor) -> Tensor:
        return nn.functional.pad(value, (0, length - value.shape[1])) if value.ndim == 2 else value

    return {key: torch.cat([padded(part[key]) for part in parts]) for key in parts[0]}


class Visual:
    """Collects the `visual` dict of a batch: equal media, equal prompts and equal pairs of both appear once."""

    def __init__(self) -> None:
        self.media: dict[Any, Medium] = {}
        self.prompts: dict[str, Example] = {}
        self.pairs: dict[tuple[Any, str | None], int] = {}
        self.spans: list[tuple[int, int, int, int]] = []
        self.coordinates: list[tuple[int, int, int, int, float]] = []

    def add(self, example: Example, row: int, offset: int) -> None:
        """Add the spans of one row whose tokens start at `offset`."""
        prompt = json.dumps([example.prompt, example.alignment_level]) if example.prompt else None
        for start, index, stream in example.spans:
            medium = example.media[index]
            self.media.setdefault(medium.key, medium)
            if prompt is not None:
                self.prompts.setdefault(prompt, example)
            pair = self.pairs.setdefault((medium.key, prompt), len(self.pairs))
            self.spans.append((row, start + offset, pair, stream))
        self.coordinates += [(row, position + offset, *exact) for position, *exact in example.coordinates]

    def collected(self, prompts: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """The dict; `prompts` collates rows of ids and levels."""
        clips = {key: index for index, key in enumerate(self.media)}
        asked = {key: index for index, key in enumerate(self.prompts)}
        visual = {
            "media": [medium.for_model() for medium in self.media.values()],
            "pairs": [(clips[clip], -1 if prompt is None else asked[prompt]) for clip, prompt in self.pairs],
            "spans": torch.tensor(self.spans, dtype=torch.long).reshape(-1, 4),
        }
        if self.coordinates:
            rows, positions, lower, upper, ratios = zip(*self.coordinates, strict=True)
            places, ids = torch.tensor([rows, positions]).T, torch.tensor([lower, upper]).T
            visual["coordinates"] = {"places": places, "ids": ids, "ratio": torch.tensor(ratios)}
        said = self.prompts.values()
        rows, levels = [example.prompt for example in said], [example.alignment_level for example in said]
        return visual | ({"prompts": prompts(rows, levels)} if asked else {})


def collate(examples: list[Example], pad_id: int, padding_side: str, prompts: Callable) -> VisualBatch:
    """A batch: padded ids, mask, labels, and the `visual` dict.

    Args:
        pad_id: token id of padding.
        padding_side: "left" or "right".
        prompts: collates rows of ids (see `PromptBank.collate`).
    """
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100) if examples[0].labels is not None else None
    visual = Visual()
    for row, example in enumerate(examples):
        offset = length - len(example.ids) if padding_side == "left" else 0
        own = slice(offset, offset + len(example.ids))
        ids[row, own] = torch.tensor(example.ids)
        mask[row, own] = 1
        if labels is not None:
            labels[row, own] = torch.tensor(example.labels)
        visual.add(example, row, offset)
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels is not None:
        batch["labels"] = labels
    batch["visual"] = visual.collected(prompts)
    return VisualBatch(batch)
