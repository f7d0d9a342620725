"""Image towers of open_clip, frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.foreign import library, load_states, mark_initialized, write_missing
from mmllm.encoders.common.layered import LayeredEncoder, State
from mmllm.encoders.common.transform import PILLOW, PixelArguments, Transform

PACKAGE = "'mmllm[towers]'"
NO_TEXT = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
"""An empty text tower to go with an image tower: open_clip builds towers in pairs."""


@register("encoder", "open_clip")
class OpenClipEncoder(LayeredEncoder):
    """The image tower of an open_clip model, applied to every frame of a clip (ViT, ResNet, or a wrapped timm model).

    Args:
        name: open_clip's model name, `hf-hub:` and an id, or `local-dir:` and a folder; None = `config` alone.
        weights: None = random; otherwise a tag of the name, a local file, or "pretrained" with an id or a folder.
        config: the model's inline config as open_clip writes it (embed_dim, vision_cfg, ...); filled in for a name.
        layer: which block's output gives the tokens, counted from 0, or a list whose outputs are joined along the
            width; -2 = the last but one, as everywhere.
        cls: keep the CLS token of every frame; the tokens then have no grid.
        norm: apply the tower's last norm to the outputs.
        frames: how many frames of a clip to read, evenly spaced; None = all.
        size: side of the input in pixels; for a size other than the model's own, open_clip resamples the positions when
            it loads the weights.
        mean, std, fit, short, interpolation: pixel transform, as in `Geometry`; the default is that of the weights.
    """

    origins = ("weights",)  # the name stands for an architecture here

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        weights: str | None = None,
        config: dict | None = None,
        layer: int | tuple[int, ...] = -2,
        cls: bool = False,
        norm: bool = False,
        frames: int | None = None,
        size: int | None = None,
        **pixels: Unpack[PixelArguments],
    ) -> None:
        parsed = config or model_config(name)
        if weights is not None and name is None:
            raise ValueError("weights: given without a name")
        own = parsed["vision_cfg"].get("image_size", 224)
        if size is None and not isinstance(own, int):
            raise ValueError(f"reads {own} pixels, give size: a square")
        if all(pixels.get(key) is not None for key in ("mean", "std", "fit", "interpolation")):  # already resolved
            base = Transform(pixels["mean"], pixels["std"], size or own)
        else:  # look it up in the library
            base = own_transform(name, weights, size or own)
        super().__init__(site, base.override(**pixels), layer=layer, cls=cls, frames=frames)
        self.name, self.weights, self.config, self.norm = name, weights, parsed, norm
        self.resized = size is not None and size != own
        self.build_tower()

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Fill in the config and the pixel transform, so that the recipe can be built offline."""
        name, completed = arguments.get("name"), dict(arguments)
        if name is None or arguments.get("config") is not None:
            return arguments
        config = model_config(name)
        completed["config"] = {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}
        own = own_transform(name, arguments.get("weights"), 0)
        for key in ("mean", "std", "fit", "interpolation"):
            if arguments.get(key) is None:
                value = getattr(own, key)
                completed[key] = list(value) if isinstance(value, tuple) else value
        return completed

    def create(self) -> nn.Module:
        """The image tower with random weights."""
        vision = {**self.config["vision_cfg"], "image_size": self.geometry.height, "timm_model_pretrained": False}
        tower = build_pair(self.config, vision_cfg=vision, text_cfg=NO_TEXT).visual
        if self.resized and hasattr(tower, "set_input_size"):
            tower.set_input_size(self.geometry.height)
        return mark_initialized(tower)

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Outputs of blocks as maps [M, C, h, w], and the tokens before the patches."""
        trunk = getattr(tower, "trunk", None)
        before = hasattr(tower, "class_embedding") if trunk is None else getattr(trunk, "num_prefix_tokens", 0) > 0
        found = tower.forward_intermediates(
            inputs,
            indices=layers,
            stop_early=True,
            normalize_intermediates=self.norm,
            intermediates_only=True,
            output_fmt="NCHW",
            output_extra_tokens=before,
        )
        maps = found["image_intermediates"]
        prefixes = found.get("image_intermediates_prefix") or [None] * len(maps)
        pairs = zip(range(len(maps)) if layers is None else layers, maps, prefixes, strict=True)
        return {layer: State(patches.permute(0, 2, 3, 1)[:, None], prefix) for layer, patches, prefix in pairs}

    def reset_parameters(self) -> None:
        """Initialise what a checkpoint lacks."""
        write_missing(self.tower, self.create)

    def load_weights(self) -> None:
        """Load the weights that the arguments name; open_clip resamples them to this size where needed.

        Raises:
            UserError: they cannot be loaded, or do not match the config.
        """
        if self.weights is None:
            return
        model = load_pair(self.name, self.weights, self.config, self.geometry.height if self.resized else None)
        load_states(self.tower, model.visual.state_dict(), self.weights)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A tiny ViT with and without its CLS token, a ResNet, and a wrapped timm model."""
        vit = {"image_size": 28, "layers": 3, "width": 32, "head_width": 8, "patch_size": 14}
        config = {"embed_dim": 16, "vision_cfg": vit, "quick_gelu": True}
        yield {"config": config}, (MediaSpec("video", 2),)
        yield {"config": config, "cls": True, "layer": (-1, -2), "norm": True}, (MediaSpec("image", 1),)
        resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
        yield {"config": {"embed_dim": 16, "vision_cfg": resnet}}, (MediaSpec("image", 1),)
        inside = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}
        yield {"config": {"embed_dim": 16, "vision_cfg": inside}, "layer": -1}, (MediaSpec("video", 2),)


def model_config(name: str | None) -> dict[str, Any]:
    """open_clip's config of a model, by name, id or folder.

    Raises:
        UserError: there is none.
    """
    if name is None:
        raise ValueError("neither name nor config")
    clip = library("open_clip", PACKAGE)
    try:
        config = clip.get_model_config(name.replace("/", "-") if ":" not in name else name)
    except (OSError, ValueError) as error:
        raise UserError(name, f"no such open_clip model ({error.__class__.__name__})") from error
    if config is None:
        raise UserError(name, "no such open_clip model", hint=nearest(name, clip.list_models()))
    return config


def build_pair(config: dict[str, Any], **towers: dict[str, Any]) -> nn.Module:
    """open_clip's two towers with random weights, one of them replacing the config's own.

    Raises:
        ValueError: the config does not fit.
    """
    clip = library("open_clip", PACKAGE)
    options = {key: config[key] for key in ("embed_dim", "quick_gelu") if key in config}
    try:
        return clip.CustomTextCLIP(**options, **towers)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"config: {' '.join(str(error).split())[:200]}") from error


def load_pair(name: str, weights: str, config: dict[str, Any], size: int | None) -> nn.Module:
    """A whole open_clip model with pretrained weights.

    Raises:
        UserError: they cannot be loaded, or were trained with an activation other than the config's.
    """
    clip = library("open_clip", PACKAGE)
    plain = name.replace("/", "-")
    if ":" not in name:
        tag = clip.get_pretrained_cfg(plain, weights) or {}
        if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
            fits = "with" if tag.get("quick_gelu") else "without"
            raise UserError(f"{name}: {weights}", f"trained {fits} quick_gelu", hint="the other name of this model")
    options = {"force_image_size": size} if size is not None else {}
    try:
        pretrained = weights if ":" not in name else None
        return clip.create_model(name, pretrained, require_pretrained=True, pretrained_text=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: {weights}", f"cannot load the weights: {why}") from error


def own_transform(name: str | None, weights: str | None, size: int) -> Transform:
    """open_clip's evaluation transform for these weights.

    Raises:
        UserError: the id or folder does not say.
    """
    clip = library("open_clip", PACKAGE)
    if name and ":" in name:
        given = _published(name).get("preprocess_cfg", {})
    else:
        given = (clip.get_pretrained_cfg(name.replace("/", "-"), weights) if name and weights else None) or {}
    given = {key: value for key, value in given.items() if value is not None}
    fits = {"shortest": "crop", "squash": "squash", "longest": "pad"}
    return Transform(
        tuple(given.get("mean", clip.OPENAI_DATASET_MEAN)),
        tuple(given.get("std", clip.OPENAI_DATASET_STD)),
        size,
        fits[given.get("resize_mode", "shortest")],
        given.get("interpolation", "bicubic"),
        fill=given.get("fill_color", 0),
        **PILLOW,
    )


def _published(name: str) -> dict[str, Any]:
    """The JSON config beside the weights of an id or in a folder."""
    kind, _, source = name.partition(":")
    try:
        if kind == "hf-hub":
            from open_clip.pretrained import download_pretrained_from_hf

            path = Path(download_pretrained_from_hf(source, filename="open_clip_config.json"))
        else:
            path = Path(source) / "open_clip_config.json"
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(name, f"no config of an open_clip model ({error.__class__.__name__})") from error
