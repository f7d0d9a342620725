"""Image encoders of transformers: CLIP, SigLIP and DINOv2, frame by frame.

Sources: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), DINOv2 (Oquab et al. 2023).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Geometry, Grid, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.tokens import frame_tokens


class ImageTower(Encoder):
    """An image encoder of transformers over every frame of a clip.

    Args:
        name: hub id or folder of the weights; None = random weights (for tests and for loading a whole model).
        config: the tower's config, inline, so that the geometry is known offline.
        layer: which hidden state the tokens are (-2 = output of the last but one block), or a list whose states are
            joined along the width.
        cls: keep the CLS token of every frame; the tokens then have no grid.
        frames: how many frames of a clip to read, evenly spaced; None = all.
        size: side of the input in pixels, where it is not the tower's own: positions are interpolated.
    """

    model_type: ClassVar[str]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    prefix: ClassVar[int] = 1  # tokens before the patches
    asks_to_interpolate: ClassVar[bool] = True  # another input size has to be asked for

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        layer: int | tuple[int, ...] = -2,
        cls: bool = False,
        frames: int | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__(site)
        from transformers import AutoModel

        self.name, self.cls, self.frames = name, cls, frames
        self.layers = layer if isinstance(layer, tuple) else (layer,)
        tower_config = self._config(config or {})
        depth = tower_config.num_hidden_layers
        for index in self.layers:
            if not -depth - 1 <= index <= depth:
                raise ValueError(f"layer {index} of a tower of {depth} layers")
        if cls and not self.prefix:
            raise ValueError("cls: this tower has no CLS token")
        self.tower: nn.Module = AutoModel.from_config(tower_config)
        self.patch, self.hidden = tower_config.patch_size, tower_config.hidden_size
        if size is not None and size % self.patch:
            raise ValueError(f"size {size} is not a multiple of the patch of {self.patch}")
        size = self._own_size(tower_config) if size is None else size
        self.geometry = self._geometry(size)
        self.side = size // self.patch
        self.options: dict[str, Any] = {"output_hidden_states": True}
        if size != tower_config.image_size and self.asks_to_interpolate:
            self.options["interpolate_pos_encoding"] = True

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """With only a name, fetch the config, so that the recipe can later be built offline."""
        if arguments.get("config") is None and arguments.get("name"):
            config = cls._vision_config(arguments["name"])
            return {**arguments, "config": {k: v for k, v in config.to_diff_dict().items() if _plain(v)}}
        return arguments

    @classmethod
    def _vision_config(cls, name: str) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(name, f"no such tower ({error.__class__.__name__})", hint="a hub id or a folder") from error
        return getattr(config, "vision_config", config)

    def _config(self, config: dict) -> Any:
        from transformers import AutoConfig

        config = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        return AutoConfig.for_model(self.model_type, **config)

    def _own_size(self, config: Any) -> int:
        return config.image_size

    def _geometry(self, size: int) -> Geometry:
        return Geometry(size, size, fit="crop")

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """One token a patch of every frame it reads, and the CLS token where that is asked for."""
        frames = self.frames_of(media)
        patches = self.side * self.side
        width = self.hidden * len(self.layers)
        if self.cls:
            return TokenSpec(media, frames * (patches + 1), width)
        return TokenSpec(media, frames * patches, width, Grid(frames, self.side, self.side))

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """[B, F, 3, h, w] uint8 -> tokens [B, F * patches, C], frame by frame in row-major order."""
        batch, frames = pixels.shape[:2]
        states = self.tower(self.normalise(pixels.flatten(0, 1)), **self.options).hidden_states
        chosen = torch.cat([states[index] for index in self.layers], dim=-1)
        if self.prefix and not self.cls:
            chosen = chosen[:, self.prefix :]
        values = chosen.unflatten(0, (batch, frames)).flatten(1, 2)
        grid = None if self.cls else Grid(frames, self.side, self.side)
        return frame_tokens(values, media, grid, frames)

    def load_weights(self) -> None:
        """Weights of `name` into the tower.

        Raises:
            UserError: they cannot be had, or are of another size than the recipe's config.
        """
        if self.name is None:
            return
        from transformers import AutoModel

        try:
            loaded = AutoModel.from_pretrained(self.name, dtype=next(self.tower.parameters()).dtype)
        except OSError as error:
            raise UserError(self.name, "cannot fetch the weights", hint=f"hf download {self.name}") from error
        loaded = getattr(loaded, "vision_model", loaded) if "text_model" in dict(loaded.named_children()) else loaded
        ours, theirs = self.tower.state_dict(), _without_prefix(loaded.state_dict())
        ours_plain = _without_prefix(ours)
        for key, value in ours_plain.items():
            found = theirs.get(key)
            if found is None or found.shape != value.shape:
                got = "nothing" if found is None else list(found.shape)
                raise UserError(f"{self.name}:{key}", "differs from the recipe", expected=list(value.shape), got=got)
        self.tower.load_state_dict({own: theirs[plain] for own, plain in zip(ours, ours_plain, strict=True)})

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """Tiny towers over a short clip and an image."""
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = {**small, "image_size": 28, "patch_size": 14}
        yield {"config": config}, (MediaSpec("video", 2),)
        yield {"config": config, "layer": (-1, -3)}, (MediaSpec("image", 1),)
        yield {"config": config, "size": 42}, (MediaSpec("image", 1),)
        if cls.prefix:
            yield {"config": config, "cls": True}, (MediaSpec("video", 3),)


@register("encoder", "clip")
class ClipEncoder(ImageTower):
    """CLIP's image tower: no post-norm on hidden states, short side resized, centre cropped."""

    model_type = "clip_vision_model"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@register("encoder", "siglip")
class SiglipEncoder(ImageTower):
    """SigLIP's image tower: no CLS token, the frame squashed to a square."""

    model_type = "siglip_vision_model"
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    prefix = 0

    def _config(self, config: dict) -> Any:
        return super()._config({"vision_use_head": False, **config})

    def _geometry(self, size: int) -> Geometry:
        return Geometry(size, size, fit="squash")


@register("encoder", "dinov2")
class Dinov2Encoder(ImageTower):
    """DINOv2's image tower; reads 224 pixels, as its own processor gives, whatever its config says."""

    model_type = "dinov2"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    asks_to_interpolate = False

    def _own_size(self, config: Any) -> int:
        return min(224, config.image_size)

    def _geometry(self, size: int) -> Geometry:
        return Geometry(size, size, fit="crop", short=size * 256 // 224)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | list | type(None)) and not inspect.isclass(value)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "vision_model."
    return {key.removeprefix(prefix): value for key, value in state.items()}
