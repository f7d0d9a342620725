"""Several encoders over the same clips, each with its own transform, grid and number of frames."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Site
from mmllm.contract.registry import find
from mmllm.contract.types import Geometry, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.tokens import at_times, frame_tokens


class EncoderBank(nn.Module):
    """The encoders of a recipe, by name.

    Args:
        encoders: {name: {type: ..., arguments}}.
        where: key path for errors.
    """

    def __init__(self, encoders: dict[str, dict[str, Any]], where: str = "model.encoders") -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
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
        self, pixels: dict[Geometry, Tensor], media: MediaSpec, times: Tensor, needs: dict[str, Needs], used: set[str]
    ) -> dict[str, VisualTokens]:
        """Tokens of B equally shaped clips from each of the encoders that are `used`.

        Args:
            pixels: {geometry: uint8 [B, F, 3, h, w]}.
            times: [B, F] seconds.
            needs: what the parts that read each encoder declared.
        """
        return {name: self._encode(name, pixels, media, times, needs.get(name, Needs())) for name in sorted(used)}

    def _encode(
        self, name: str, pixels: dict[Geometry, Tensor], media: MediaSpec, times: Tensor, needs: Needs
    ) -> VisualTokens:
        encoder: Encoder = self.encoders[name]
        step = media.frames // encoder.frames_of(media)
        with nullcontext() if encoder.trainable else torch.no_grad():
            tokens = encoder(pixels[encoder.geometry][:, ::step], media, needs)
        return at_times(tokens, times[:, ::step])

    def blank(self, media: MediaSpec, name: str, like: Tensor) -> VisualTokens:
        """Zero features of one clip, in place of running a frozen encoder for nothing, with the dtype of `like`."""
        encoder: Encoder = self.encoders[name]
        spec = encoder.output_spec(media)
        values = like.new_zeros(1, spec.tokens, spec.width)
        return frame_tokens(values, media, spec.grid, encoder.frames_of(media))


def build_encoder(section: dict[str, Any], where: str) -> Encoder:
    """One encoder out of its part of a recipe, without weights.

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
    except ValueError as error:
        raise UserError(where, str(error)) from error
