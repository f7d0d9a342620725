"""Fresh visual tokens of an encoder, with the positions that its grid implies."""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.contract.types import Grid, MediaSpec, VisualTokens


def frame_tokens(values: Tensor, media: MediaSpec, grid: Grid | None, frames: int) -> VisualTokens:
    """Tokens [B, N, C] of `frames` frames whose times are not known yet (zero): the encoder bank fills them in."""
    batch, count = values.shape[:2]
    times = torch.zeros(batch, frames, device=values.device)
    sizes = torch.ones(batch, count, device=values.device)
    tokens = VisualTokens(values, media, grid, torch.zeros(batch, count, 3, device=values.device), sizes, times)
    return at_times(tokens, times)


def at_times(tokens: VisualTokens, times: Tensor) -> VisualTokens:
    """The tokens of frames at `times` [B, F] seconds: positions are (seconds, y, x) of each token's centre.

    A row of the grid need not be a frame: see `row_times`. The `times` of the result are those of its rows [B, T].
    """
    if tokens.grid is not None:
        times = row_times(times, tokens.grid.t)
    per_row = tokens.values.shape[1] // times.shape[1]
    centres = _centres(tokens.grid, per_row, times)
    positions = torch.cat(
        [
            times[:, :, None, None].expand(-1, -1, per_row, 1),
            centres.expand(times.shape[0], times.shape[1], -1, -1),
        ],
        dim=-1,
    ).flatten(1, 2)
    return VisualTokens(tokens.values, tokens.media, tokens.grid, positions, tokens.sizes, times, tokens.extras)


def row_times(times: Tensor, rows: int) -> Tensor:
    """Seconds of frames [B, F] -> of a grid's rows [B, T].

    Several frames per row (tubelets): their mean. Several rows per frame (a still that a video encoder reads as a
    clip): its own time.

    Raises:
        ValueError: neither number divides the other.
    """
    frames = times.shape[1]
    if rows and frames % rows == 0:
        return times if frames == rows else times.unflatten(1, (rows, -1)).mean(-1)
    if frames and rows % frames == 0:
        return times.repeat_interleave(rows // frames, dim=1)
    raise ValueError(f"{frames} frames do not make {rows} rows of tokens")


def _centres(grid: Grid | None, per_frame: int, like: Tensor) -> Tensor:
    """[per_frame, 2] y and x of the tokens of a frame; the middle where there is no grid."""
    if grid is None:
        return torch.full((per_frame, 2), 0.5, device=like.device, dtype=like.dtype)
    y = (torch.arange(grid.h, device=like.device, dtype=like.dtype) + 0.5) / grid.h
    x = (torch.arange(grid.w, device=like.device, dtype=like.dtype) + 0.5) / grid.w
    return torch.stack([y[:, None].expand(-1, grid.w), x[None].expand(grid.h, -1)], dim=-1).flatten(0, 1)
