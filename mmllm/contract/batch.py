"""What a batch is made of: plain dicts with known keys, as transformers' `generate` and `.to` take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from mmllm.contract.types import Geometry, MediaSpec

if TYPE_CHECKING:
    from torch import Tensor


class MediumInputs(TypedDict):
    """One clip or image as the encoders take it.

    Attributes:
        spec: its kind and number of frames.
        times: [F], seconds of the frames.
        pixels: {geometry: uint8 [F, 3, h, w]}.
        features: {encoder: tensors that were kept of it}, in place of pixels.
        keys: {encoder: key under which to keep what it makes}.
        damaged: its file, where the decoder found damage.
    """

    spec: MediaSpec
    times: Tensor
    pixels: dict[Geometry, Tensor]
    features: NotRequired[dict[str, dict[str, Tensor]]]
    keys: NotRequired[dict[str, str]]
    damaged: NotRequired[str]


class PromptInputs(TypedDict):
    """P prompts as one text source takes them.

    Attributes:
        ids: [P, L] token ids.
        mask: [P, L] of 1 (real) and 0.
        alignment_level: [P], the alignment level of each prompt's record, -1 where it carries none.
    """

    ids: Tensor
    mask: Tensor
    alignment_level: Tensor


class CoordinateInputs(TypedDict):
    """Exact places among a batch's coordinate tokens.

    Attributes:
        places: [K, 2], (row, position) of each.
        ids: [K, 2], the tokens on both sides of it.
        ratio: [K], how far it is from the first to the second.
    """

    places: Tensor
    ids: Tensor
    ratio: Tensor


class VisualInputs(TypedDict):
    """Everything visual in a batch: the only input of the model's forward that the library does not know.

    Attributes:
        media: each clip or image once.
        pairs: (index of a medium, index of a prompt or -1); connectors run once per pair.
        spans: [S, 4], (row, start, pair, stream) of every run of visual tokens.
        prompts: {text source: its prompts}, where the model is guided by what the user says.
        coordinates: places and moments in the media, where a conversation has some.
    """

    media: list[MediumInputs]
    pairs: list[tuple[int, int]]
    spans: Tensor
    prompts: NotRequired[dict[str, PromptInputs]]
    coordinates: NotRequired[CoordinateInputs]


class Batch(TypedDict):
    """What an objective prepares and the model's forward takes; an objective may add keys of its own.

    Attributes:
        input_ids: [B, L].
        attention_mask: [B, L] of 1 (real) and 0.
        labels: [B, L], -100 where nothing is learnt.
        position_ids: [B, L].
        visual: the media.
        names: of the samples, row by row, for errors.
        groups: (first row, last row, length) of the rows that go through the LLM together.
        segments: [B, L], 0 = prefix, 1 and 2 = branches that share it and do not see each other, -1 = padding.
        totals: {term: its count in the whole batch}, over all micro-batches and processes; the trainer's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    visual: NotRequired[VisualInputs]
    names: NotRequired[list[str]]
    groups: NotRequired[list[tuple[int, int, int]]]
    segments: NotRequired[Tensor]
    totals: NotRequired[dict[str, float]]
