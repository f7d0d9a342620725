"""LanguageBind's video tower: CLIP's, with attention over time before each of its blocks.

Source: Zhu et al. 2024, LanguageBind, arXiv 2310.01852; it is the first of MERV's four encoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.foreign import load_states
from mmllm.encoders.common.layered import State
from mmllm.encoders.common.transform import CLIP, CropArguments, PixelArguments, Transform
from mmllm.encoders.image.huggingface import SMALL, ClipEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_ROWS = 2**15
"""Attention kernels take at most 65,535 rows, and each token position of each group is a row."""


class TimeAttention(Part):
    """Each token attends to itself in the other frames of its group; modules are named as in the published weights.

    Args:
        config: of the tower.
        group: number of frames that attend to each other.
    """

    def __init__(self, config: PreTrainedConfig, group: int) -> None:
        from transformers.models.clip.modeling_clip import CLIPAttention

        super().__init__(Site())
        self.temporal_embedding = nn.Parameter(torch.empty(1, group, config.hidden_size))
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attn = CLIPAttention(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with small time embeddings."""
        from transformers import initialization as init

        init.normal_(self.temporal_embedding, std=self.temporal_embedding.shape[-1] ** -0.5)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[M, L, C] of M / frames groups -> the same shape; a shorter group takes the first times."""
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)  # [groups, L, frames, C]
        x = x + self.temporal_embedding[:, :frames]
        rows = self.temporal_layer_norm1(x).flatten(0, 1).split(MOST_ROWS)
        moved = torch.cat([self.temporal_attn(part, attention_mask=None)[0] for part in rows])
        return (x + moved.view_as(x)).transpose(1, 2).flatten(0, 1)


@register("encoder", "languagebind")
class LanguageBindEncoder(ClipEncoder):
    """LanguageBind's video tower.

    Frames attend to each other within groups, independently; the views of an image do not. The authors crop
    the middle of a frame and mirror every second one at random, even in evaluation: here nothing is mirrored.

    Args:
        name, config, layer, frames, size, fit, short, interpolation: as for `clip`; the config's activation defaults to
            `gelu`.
        group: number of frames that attend to each other, as many as the weights have times; a clip has a multiple of
            it, or fewer.
    """

    per_frame = False
    config_defaults: ClassVar[dict[str, Any]] = {"hidden_act": "gelu"}  # it grew from open_clip's CLIP

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        layer: int | tuple[int, ...] = -2,
        frames: int | None = None,
        size: int | None = None,
        group: int = 8,
        **pixels: Unpack[CropArguments],
    ) -> None:
        super().__init__(site, name=name, config=config, layer=layer, frames=frames, size=size, **pixels)
        self.group = group
        self.times = nn.ModuleList(TimeAttention(self.tower.config, group) for _ in self.tower.encoder.layers)

    @classmethod
    def own_transform(cls, config: PreTrainedConfig, size: int | None, given: PixelArguments) -> Transform:
        """Short side to the size, then the centre; by Pillow, like the encoders beside it in MERV, to share frames."""
        return Transform(*CLIP, size or config.image_size, resampler="pillow")

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Its published configs are of a type that the library does not know, so the recipe has to give one."""
        if arguments.get("name") and arguments.get("config") is None:
            raise UserError(arguments["name"], "config: missing", hint="vision_config of the published config.json")
        return arguments

    def frames_of(self, media: MediaSpec) -> int:
        """The requested number of frames.

        Raises:
            ValueError: they do not make whole groups.
        """
        frames = super().frames_of(media)
        if media.kind == "video" and frames > self.group and frames % self.group:
            raise ValueError(f"reads groups of {self.group} frames, which {frames} frames do not fill")
        return frames

    def inputs(self, pixels: Tensor, media: MediaSpec) -> Tensor:
        """[B, F, 3, h, w] -> groups of frames [groups, frames, 3, h, w]."""
        together = min(self.group, pixels.shape[1]) if media.kind == "video" else 1
        return pixels.unflatten(1, (-1, together)).flatten(0, 1)

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Hidden states, frame by frame; their shapes are those of the image tower."""
        if layers is None:
            return super().read(tower, inputs, None)
        resized = self.geometry.height != self.config.image_size
        state = tower.pre_layrnorm(tower.embeddings(inputs.flatten(0, 1), interpolate_pos_encoding=resized))
        states = {0: state} if 0 in layers else {}
        for index, (time, block) in enumerate(zip(self.times, tower.encoder.layers, strict=True), start=1):
            state = block(time(state, inputs.shape[1]), attention_mask=None)
            if index in layers:
                states[index] = state
        return {layer: self._as_state(kept) for layer, kept in states.items()}

    def load_weights(self) -> None:
        """Load the weights of `name` into the tower and its time attention.

        Raises:
            UserError: they cannot be loaded, or are of another size than the recipe's config or group.
        """
        if self.name is None:
            return
        tower, times = {}, {}
        for key, value in published(self.name).items():
            inside = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+\.temporal_.+)", key)
            if inside:
                times[inside[1]] = value
            elif key.startswith("vision_model.") and not key.endswith("position_ids"):  # a table in old checkpoints
                tower[key.removeprefix("vision_model.")] = value
        load_states(self.tower, tower, self.name)
        load_states(self.times, times, self.name)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """Two groups, one that is not full, views of an image at another size."""
        config = {**SMALL, "image_size": 28, "patch_size": 14}
        yield {"config": config, "group": 2}, (MediaSpec("video", 4),)
        yield {"config": config, "layer": (-1, 1)}, (MediaSpec("video", 3),)
        yield {"config": config, "size": 42}, (MediaSpec("image", 2),)


def published(name: str) -> dict[str, Tensor]:
    """The weights of a hub id or a folder under their own names.

    Raises:
        UserError: there are none.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    for file in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise UserError(name, "cannot fetch the weights", hint=f"hf download {name}") from error
        if path is not None:
            return load_file(path) if file.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    raise UserError(name, "no model.safetensors and no pytorch_model.bin there", hint=f"hf download {name}")
