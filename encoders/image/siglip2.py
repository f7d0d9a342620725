"""SigLIP 2's image tower for any aspect ratio (NaFlex), read at one square size (Tschannen et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.transform import HALF, PixelArguments, Transform
from mmllm.encoders.image.huggingface import SMALL, HuggingFaceEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils import ModelOutput


@register("encoder", "siglip2")
class Siglip2Encoder(HuggingFaceEncoder):
    """SigLIP 2 NaFlex, the frame squashed to a square of `size`; see `huggingface` for the arguments.

    Default size: the square with as many patches as its position table has rows. The tower itself resizes the table to
    any other grid. SigLIP 2 checkpoints of a fixed resolution are of kind `siglip`.
    """

    model_type = "siglip2_vision_model"
    config_defaults = {"vision_use_head": False}

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """Both sides to the size, bilinear as in its own processor."""
        own = math.isqrt(config.num_patches) * config.patch_size
        return Transform(*HALF, size or own, "squash", "bilinear")

    def call(self, tower: nn.Module, inputs: Tensor, **options: Any) -> ModelOutput:
        """The tower's forward over patches [M, N, p * p * 3], all of them real."""
        side = self.geometry.height // self.patch
        tiles = inputs.unflatten(3, (side, self.patch)).unflatten(2, (side, self.patch))
        patches = tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        # The tower reads these numbers even on the meta device, and moves what it makes of them itself.
        shapes = torch.tensor([[side, side]], device="cpu")
        return tower(patches, None, shapes.expand(len(inputs), -1), **options)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A tiny tower at its own size and at another."""
        config = {**SMALL, "num_patches": 9, "patch_size": 14}
        yield {"config": config}, (MediaSpec("video", 2),)
        yield {"config": config, "size": 28, "layer": (-1, -3)}, (MediaSpec("image", 1),)
