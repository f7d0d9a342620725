"""Video towers of transformers: all frames in one call, several frames per token.

Sources: ViViT (Arnab et al. 2021), VideoMAE (Tong et al. 2022).
"""

from __future__ import annotations

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
    hidden_states,
    load_tower,
    square_side,
    tower_config,
)
from mmllm.encoders.common.transform import IMAGENET, PixelArguments, Transform
from mmllm.encoders.image.huggingface import SMALL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class VideoTower(LayeredEncoder):
    """A tower that reads `config.num_frames` frames at once and gives one row of tokens per tubelet.

    A token's time is the mean over the frames of its tubelet. A still (or a clip of one frame, which is the same to an
    encoder) is one frame repeated; every view of a tiled image is read as a clip of its own. The CLS token of the
    whole clip is left out.

    Args:
        name: hub id or folder of the weights; None = random weights (for tests and for loading a whole model).
        config: the tower's inline config, so that the geometry is known offline; filled in for a name.
        layer: which hidden state gives the tokens (-2 = output of the last but one block), or a list whose states are
            joined along the width.
        norm: take the tower's last hidden state, after its last norm, as layer -1.
        frames: must be the tower's own number of frames; allows picking them evenly from a longer clip, which is
            otherwise refused.
        size: must be the tower's own: the library does not interpolate positions in time and space.
        mean, std, fit, short, interpolation: pixel transform, as in `Geometry`.
    """

    model_type: ClassVar[str]
    per_frame = reads_frames = False

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        layer: int | tuple[int, ...] = -2,
        norm: bool = False,
        frames: int | None = None,
        size: int | None = None,
        **pixels: Unpack[PixelArguments],
    ) -> None:
        parsed = tower_config(config or {}, self.model_type)
        own = square_side(parsed.image_size)
        if size not in (None, own):
            raise ValueError(f"size {size}: this tower reads {own} pixels and cannot interpolate")
        if frames not in (None, parsed.num_frames):
            raise ValueError(f"frames {frames}: this tower reads {parsed.num_frames} frames at once")
        transform = self.own_transform(own).override(**pixels)
        super().__init__(site, transform, layer=layer, cls=False, frames=frames)
        self.name, self.config, self.norm = name, parsed, norm
        self.tubelet = self.own_tubelet(parsed)
        self.build_tower()

    @classmethod
    def own_transform(cls, size: int) -> Transform:
        """The pixel transform of the tower's own processor."""
        raise NotImplementedError

    @classmethod
    def own_tubelet(cls, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per token."""
        raise NotImplementedError

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """With only a name, fetch the config, so that the recipe can be built offline."""
        if arguments.get("config") is None and arguments.get("name"):
            return {**arguments, "config": fetch_config(arguments["name"], "vision_config")}
        return arguments

    def frames_of(self, media: MediaSpec) -> int:
        """All of the tower's frames for a clip, each view of an image.

        Raises:
            ValueError: a clip of another length, unless `frames` allows picking.
        """
        own = self.config.num_frames
        if self._still(media) or media.frames == own:
            return media.frames
        if self.frames is None:
            raise ValueError(f"reads {own} frames at once, the clip has {media.frames} (frames: {own} picks them)")
        if media.frames < own:
            raise ValueError(f"reads {own} frames at once, the clip has only {media.frames}")
        return super().frames_of(media)

    def _still(self, media: MediaSpec) -> bool:
        return media.kind == "image" or media.frames == 1

    def inputs_of(self, media: MediaSpec) -> int:
        """One input of the tower per clip, one per view of an image."""
        frames = self.frames_of(media)
        return frames if self._still(media) else 1

    def inputs(self, pixels: Tensor, media: MediaSpec) -> Tensor:
        """[B, F, 3, h, w] -> [B * inputs, num_frames, 3, h, w]."""
        if self._still(media):
            return pixels.flatten(0, 1)[:, None].expand(-1, self.config.num_frames, -1, -1, -1)
        return pixels

    def blank(self) -> Tensor:
        """One zero clip."""
        return torch.zeros(1, self.config.num_frames, 3, self.geometry.height, self.geometry.width)

    def create(self) -> nn.Module:
        """A tower of the config with random weights."""
        return build_tower(self.config)

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Hidden states as tubelets, and the CLS token before them."""
        count = len(self.shapes) if layers is not None else 0
        states = hidden_states(partial(tower, inputs), layers, self.norm, count)
        time, rows, columns = self.tubelet
        view = (self.config.num_frames // time, self.geometry.height // rows, self.geometry.width // columns)
        before = next(iter(states.values())).shape[1] - view[0] * view[1] * view[2]
        return {
            layer: State(state[:, before:].unflatten(1, view), state[:, :before] if before else None)
            for layer, state in states.items()
        }

    def load_weights(self) -> None:
        """Load the weights of `name` into the tower.

        Raises:
            UserError: they cannot be loaded, or are of another size than the recipe's config.
        """
        if self.name is not None:
            load_tower(self.tower, self.name)


@register("encoder", "vivit")
class VivitEncoder(VideoTower):
    """ViViT with joint attention over all tubelets of a clip (model 1 of its paper)."""

    model_type = "vivit"

    @classmethod
    def own_transform(cls, size: int) -> Transform:
        """Pixels end up in -3..1: its processor maps them to -1..1, then subtracts a half and divides by a half."""
        short = size * 256 // 224
        return Transform((0.75,) * 3, (0.25,) * 3, size, "crop", "bilinear", short=short, resampler="pillow")

    @classmethod
    def own_tubelet(cls, config: PreTrainedConfig) -> tuple[int, int, int]:
        """As the config says."""
        return tuple(config.tubelet_size)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip of its length, a longer one, an image."""
        config = {**SMALL, "image_size": 32, "num_frames": 4, "tubelet_size": (2, 16, 16)}
        yield {"config": config, "layer": -1, "norm": True}, (MediaSpec("video", 4),)
        yield {"config": config, "frames": 4}, (MediaSpec("video", 8),)
        yield {"config": config}, (MediaSpec("image", 1),)


@register("encoder", "videomae")
class VideoMaeEncoder(VideoTower):
    """VideoMAE's encoder; its positions are a fixed table of sines."""

    model_type = "videomae"

    @classmethod
    def own_transform(cls, size: int) -> Transform:
        """Short side to the size, then the centre."""
        return Transform(*IMAGENET, size, "crop", "bilinear")

    @classmethod
    def own_tubelet(cls, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Frames by `tubelet_size`, pixels by `patch_size`."""
        patch = square_side(config.patch_size)
        return (config.tubelet_size, patch, patch)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip of its length, a longer one, an image of two views."""
        config = {**SMALL, "image_size": 32, "patch_size": 16, "num_frames": 4, "tubelet_size": 2}
        yield {"config": config}, (MediaSpec("video", 4),)
        yield {"config": config, "frames": 4, "layer": (-1, -2)}, (MediaSpec("video", 8),)
        yield {"config": config}, (MediaSpec("image", 2),)
