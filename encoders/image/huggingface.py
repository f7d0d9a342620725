"""Image towers of transformers, frame by frame: any vision model, plus presets for CLIP, SigLIP and DINOv2.

Sources: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), DINOv2 (Oquab et al. 2023).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.layered import LayeredEncoder, State
from mmllm.encoders.common.pretrained import (
    build_tower,
    fetch_config,
    fetch_transform,
    hidden_states,
    load_tower,
    square_side,
    tower_config,
)
from mmllm.encoders.common.transform import CLIP, HALF, IMAGENET, PixelArguments, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils import ModelOutput

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@register("encoder", "huggingface")
class HuggingFaceEncoder(LayeredEncoder):
    """A vision model of transformers, applied to every frame of a clip.

    Transformers (tokens in a row) and convolutional networks (maps) alike: the number of tokens before the patches, the
    grid and the width are measured when it is built. A model that masks patches at random, or whose forward needs more
    than pixels, is refused.

    Args:
        name: hub id or folder of the weights; None = random weights (for tests and for loading a whole model).
        config: the tower's inline config, so that the geometry is known offline; filled in for a name.
        layer: which hidden state gives the tokens (-2 = output of the last but one block; a stage of a convolutional
            network), or a list whose states are joined along the width.
        cls: keep the CLS token of every frame; the tokens then have no grid.
        norm: take the tower's last hidden state, after its last norm, as layer -1.
        frames: how many frames of a clip to read, evenly spaced; None = all.
        size: side of the input in pixels, if not the tower's own: the library then interpolates the positions.
        mean, std, fit, short, interpolation: pixel transform, as in `Geometry`; filled in from the name's own image
            processor.
    """

    model_type: ClassVar[str | None] = None  # of a preset
    config_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        layer: int | tuple[int, ...] = -2,
        cls: bool = False,
        norm: bool = False,
        frames: int | None = None,
        size: int | None = None,
        **pixels: Unpack[PixelArguments],
    ) -> None:
        parsed = tower_config({**self.config_defaults, **(config or {})}, self.model_type)
        transform = self.own_transform(parsed, size, pixels).override(**pixels)
        super().__init__(site, transform, layer=layer, cls=cls, frames=frames)
        self.name, self.config, self.norm = name, parsed, norm
        self.patch = square_side(getattr(parsed, "patch_size", None))
        if self.patch and size is not None and size % self.patch:  # at its own size a tower may leave pixels over
            raise ValueError(f"size {size} is not a multiple of the patch of {self.patch}")
        self.build_tower()

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """The transform of such a tower; only the recipe knows it here.

        Raises:
            ValueError: mean, std or size is missing.
        """
        size = size or square_side(getattr(config, "image_size", None))
        for key, value in {"mean": given.get("mean"), "std": given.get("std"), "size": size}.items():
            if value is None:
                raise ValueError(f"{key}: missing; with a name, it is filled in when the recipe is resolved")
        return Transform(given["mean"], given["std"], size)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """With a name, fetch what config and transform lack, so that the recipe can be built offline."""
        name = arguments.get("name")
        if not name:
            return arguments
        completed = dict(arguments)
        if arguments.get("config") is None:
            completed["config"] = fetch_config(name, "vision_config")
        needed = ("mean", "std", "size", "fit", "interpolation")
        if cls.model_type is None and any(arguments.get(key) is None for key in needed):
            fetched = fetch_transform(name, arguments.get("size"))
            if arguments.get("fit") is not None:
                del fetched["short"]  # it belongs to the fit
            completed |= {key: value for key, value in fetched.items() if arguments.get(key) is None}
        return completed

    def shrunk(self, side: int) -> HuggingFaceEncoder:
        """The same tower, whose positions the library interpolates.

        Raises:
            ValueError: it has no patches, or cannot read such frames.
        """
        if not self.patch:
            raise ValueError("has no patches: reads one size of frames only")
        with torch.device("meta"):
            small = type(self)(self.site, **{**self.arguments, "size": side * self.patch})
        small.tower = self.tower
        return small.eval()

    def create(self) -> nn.Module:
        """A tower of the config with random weights."""
        return build_tower(self.config)

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Hidden states as patches, and the tokens before them."""
        count = len(self.shapes) if layers is not None else 0
        states = hidden_states(partial(self.call, tower, inputs), layers, self.norm, count)
        if layers is None:
            self.front = self._front(states[0])
        return {layer: self._as_state(state) for layer, state in states.items()}

    def _front(self, first: Tensor) -> int:
        """Number of tokens before the patches: what the first layer has beyond its patches."""
        if first.ndim == 4:
            return 0
        if not self.patch:
            raise ValueError("its layers are rows of tokens and its config has no patch_size")
        patches = (self.geometry.height // self.patch) ** 2
        if first.shape[1] < patches:
            raise ValueError(f"keeps only {first.shape[1]} of {patches} patches, so its tokens have no grid")
        return first.shape[1] - patches

    def call(self, tower: nn.Module, inputs: Tensor, **options: Any) -> ModelOutput:
        """The tower's forward; towers that must be told about a size other than the config's are told."""
        own = square_side(getattr(self.config, "image_size", None))
        asks = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        if asks and own != self.geometry.height:
            options["interpolate_pos_encoding"] = True
        return tower(inputs, **options)

    def _as_state(self, state: Tensor) -> State:
        if state.ndim == 4:  # a map [M, C, h, w]
            return State(state.permute(0, 2, 3, 1)[:, None])
        patches = state.shape[1] - self.front
        side = math.isqrt(max(0, patches))  # towers that halve their grid have fewer patches in later layers
        if not side or side * side != patches:
            raise ValueError(
                f"a layer of {state.shape[1]} tokens, {self.front} of them before the patches, is no square"
            )
        prefix = state[:, : self.front] if self.front else None
        return State(state[:, self.front :].unflatten(1, (1, side, side)), prefix)

    def load_weights(self) -> None:
        """Load the weights of `name` into the tower.

        Raises:
            UserError: they cannot be loaded, or are of another size than the recipe's config.
        """
        if self.name is not None:
            load_tower(self.tower, self.name)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """Tiny towers over a short clip and an image: a preset's own, or one of each kind."""
        patches = {**SMALL, "image_size": 28, "patch_size": 14}
        if cls.model_type is not None:
            yield {"config": patches}, (MediaSpec("video", 2),)
            yield {"config": patches, "layer": (-1, -3)}, (MediaSpec("image", 1),)
            yield {"config": patches, "size": 42}, (MediaSpec("image", 1),)
            return
        half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        registers = {**patches, "model_type": "dinov2_with_registers", "num_register_tokens": 2}
        yield {"config": registers, **half, "layer": (-1, -3)}, (MediaSpec("video", 2),)
        rotary = {**patches, "model_type": "dinov3_vit", "num_register_tokens": 4}
        yield {"config": rotary, **half, "cls": True, "norm": True, "layer": -1}, (MediaSpec("video", 3),)
        yield {"config": {**patches, "model_type": "ijepa"}, **half, "size": 56}, (MediaSpec("image", 1),)
        stages = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 64}
        yield {"config": {**stages, "model_type": "convnextv2"}, **half}, (MediaSpec("video", 2),)
        yield {"config": {**stages, "model_type": "dinov3_convnext"}, **half, "layer": -1}, (MediaSpec("image", 1),)


@register("encoder", "clip")
class ClipEncoder(HuggingFaceEncoder):
    """CLIP's image tower: no post-norm on hidden states, short side resized, centre cropped."""

    model_type = "clip_vision_model"

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """Short side to the size, then the centre."""
        return Transform(*CLIP, size or config.image_size)


@register("encoder", "siglip")
class SiglipEncoder(HuggingFaceEncoder):
    """SigLIP's image tower: no CLS token, the frame squashed to a square.

    SigLIP 2 checkpoints of a fixed resolution are of this kind too; NaFlex ones are of kind `siglip2`.
    """

    model_type = "siglip_vision_model"
    config_defaults = {"vision_use_head": False}

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """Both sides to the size."""
        return Transform(*HALF, size or config.image_size, "squash")


@register("encoder", "dinov2")
class Dinov2Encoder(HuggingFaceEncoder):
    """DINOv2's image tower; reads 224 pixels, as its processor says, whatever its config says."""

    model_type = "dinov2"

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """Short side to 8/7 of the size, then the centre."""
        size = size or min(224, config.image_size)
        return Transform(*IMAGENET, size, short=size * 256 // 224)
