"""Several encoders over the same clips, each with its own transform, grid and number of frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Site
from mmllm.contract.registry import find, said_by
from mmllm.contract.types import MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens
from mmllm.model.chunks import encode_in_chunks

FRAMES_AT_ONCE = 64
"""Frames per call of a frozen encoder. Except for its tokens, a long clip takes no more memory than this many."""
KEPT = ("values", "positions", "sizes", "times")
"""Fields of tokens that a feature cache keeps, besides the extras."""
EXTRAS = "extras."
Keep = Callable[[str, dict[str, Any], dict[str, Tensor]], None]


class EncoderBank(nn.Module):
    """The encoders of a recipe, by name.

    Args:
        encoders: {name: {type: ..., arguments}}.
        where: key path for errors.

    Attributes:
        keep: called as `keep(key, clip, tensors)` with an encoder's output for a clip that gives it a key; what is
            kept may come back in the clip's `features`, and the encoder is not run again.
    """

    def __init__(self, encoders: dict[str, dict[str, Any]], where: str = "model.encoders") -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.keep: Keep | None = None
        for name, section in encoders.items():
            self.encoders[name] = build_encoder(section, f"{where}.{name}")

    def output_specs(self, media: MediaSpec) -> dict[str, TokenSpec]:
        """{encoder: its tokens for such a clip}.

        Raises:
            UserError: an encoder cannot read it.
        """
        specs = {}
        for name, encoder in self.encoders.items():
            try:
                specs[name] = encoder.output_spec(media)
            except ValueError as error:
                raise UserError(f"model.encoders.{name}", str(error)) from error
        return specs

    def forward(
        self, clips: list[dict[str, Any]], media: MediaSpec, needs: dict[str, Needs], used: set[str]
    ) -> dict[str, VisualTokens]:
        """Tokens of B equally shaped clips from each `used` encoder.

        Args:
            clips: `{"pixels": {geometry: uint8 [F, 3, h, w]}, "times": [F] seconds}`; in place of pixels `features`,
                {encoder: cached tensors}, and alongside `keys`, {encoder: the key under which to cache its output}.
            needs: what the parts that read each encoder declared.
        """
        return {name: self._tokens(name, clips, media, needs.get(name, Needs())) for name in sorted(used)}

    def _tokens(self, name: str, clips: list[dict[str, Any]], media: MediaSpec, needs: Needs) -> VisualTokens:
        """Cached tokens where they exist, the encoder's own for the other clips."""
        known = [clip.get("features", {}).get(name) for clip in clips]
        missing = [index for index, features in enumerate(known) if features is None]
        if missing:
            fresh = self._encode(name, [clips[index] for index in missing], media, needs)
            rows = [_row(fresh, row) for row in range(len(missing))]
            for index, row in zip(missing, rows, strict=True):
                key = clips[index].get("keys", {}).get(name)
                if key is not None and self.keep is not None:
                    self.keep(key, clips[index], row)
                known[index] = row
            if len(missing) == len(clips):
                return fresh
        return _join(known, media, self.encoders[name].output_spec(media))

    def _encode(self, name: str, clips: list[dict[str, Any]], media: MediaSpec, needs: Needs) -> VisualTokens:
        encoder: Encoder = self.encoders[name]
        step = media.frames // encoder.frames_of(media)
        pixels = _stack([clip["pixels"][encoder.geometry][::step] for clip in clips])
        times = torch.stack([clip["times"][::step] for clip in clips])
        if encoder.trainable and torch.is_grad_enabled():
            return at_times(encoder(pixels, media, needs), times)
        with torch.no_grad():
            if encoder.per_frame and pixels.shape[0] * pixels.shape[1] > FRAMES_AT_ONCE:
                at_once = max(1, FRAMES_AT_ONCE // len(clips))
                return at_times(encode_in_chunks(encoder, pixels, media, needs, at_once), times)
            return at_times(encoder(pixels, media, needs), times)

    def blank(self, media: MediaSpec, name: str, like: Tensor, needs: Needs) -> VisualTokens:
        """Zero features of one clip, with the dtype of `like`, to avoid running a frozen encoder for nothing."""
        encoder: Encoder = self.encoders[name]
        spec = encoder.output_spec(media)
        values = like.new_zeros(1, spec.tokens, spec.width)
        tokens = frame_tokens(values, media, spec.grid, encoder.frames_of(media))
        shapes = encoder.extras_spec(media, needs)
        return replace(tokens, extras={extra: like.new_zeros(1, *shape) for extra, shape in shapes.items()})


def _stack(rows: list[Tensor]) -> Tensor:
    """[B, ...]; a single row is not copied, as it may be a long clip."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _row(tokens: VisualTokens, row: int) -> dict[str, Tensor]:
    """What is cached for one clip of a group."""
    fields = {name: getattr(tokens, name)[row] for name in KEPT}
    return fields | {EXTRAS + name: value[row] for name, value in tokens.extras.items()}


def _join(rows: list[dict[str, Tensor]], media: MediaSpec, spec: TokenSpec) -> VisualTokens:
    """A group assembled from what was cached for its clips."""
    fields = {name: _stack([row[name] for row in rows]) for name in KEPT}
    named = [name for name in rows[0] if name.startswith(EXTRAS)]
    extras = {name.removeprefix(EXTRAS): _stack([row[name] for row in rows]) for name in named}
    return VisualTokens(media=media, grid=spec.grid, extras=extras, **fields)


def build_encoder(section: dict[str, Any], where: str) -> Encoder:
    """One encoder from its section of a recipe, without weights.

    Raises:
        UserError: no such encoder, or its arguments do not fit.
    """
    arguments = {key: value for key, value in section.items() if key != "type"}
    if "type" not in section:
        raise UserError(f"{where}.type", "missing", expected="the name of an encoder")
    cls = find("encoder", section["type"], f"{where}.type")
    bound = bind(cls, arguments, where)
    try:
        return cls(Site(), **bound)
    except (ValueError, RuntimeError, ArithmeticError) as error:  # torch refuses sizes when it creates tensors
        raise UserError(where, said_by(error)) from error
