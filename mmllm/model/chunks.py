"""Encoding a long clip a few frames at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from mmllm.contract.parts import Encoder
from mmllm.contract.types import Grid, MediaSpec, Needs, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens


def chunks_of(encoder: Encoder, pixels: Iterable[Tensor], media: MediaSpec, needs: Needs) -> Iterator[VisualTokens]:
    """Tokens of consecutive chunks of B clips, one chunk in memory at a time.

    Args:
        encoder: one that processes each frame on its own (`per_frame`).
        pixels: uint8 [B, f, 3, h, w] chunks, in order.
        media: spec of the whole clips.
    """
    for piece in pixels:
        yield encoder(piece, replace(media, frames=piece.shape[1]), needs)


def encode_in_chunks(encoder: Encoder, pixels: Tensor, media: MediaSpec, needs: Needs, at_once: int) -> VisualTokens:
    """The same tokens of B clips as from a single call, `at_once` frames at a time.

    Args:
        pixels: uint8 [B, F, 3, h, w].
    """
    frames = pixels.shape[1]
    whole: dict[str, Tensor] = {}
    grid, start = None, 0
    for part in chunks_of(encoder, pixels.split(at_once, dim=1), media, needs):
        share = (frames, pixels[:, start : start + at_once].shape[1])
        for name, value in {"values": part.values, **part.extras}.items():
            if name not in whole:  # one buffer, filled chunk by chunk: joining a list would need everything twice
                whole[name] = value.new_empty(value.shape[0], value.shape[1] * share[0] // share[1], *value.shape[2:])
            rows = value.shape[1] // share[1]
            whole[name][:, start * rows : start * rows + value.shape[1]] = value
        grid, start = part.grid, start + share[1]
    if grid is not None:
        grid = Grid(frames, grid.h, grid.w, grid.raster)
    tokens = frame_tokens(whole.pop("values"), media, grid, frames)
    return replace(tokens, extras=whole) if whole else tokens
