"""Image towers of timm, frame by frame: every model that exposes its intermediate features."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, Unpack, get_args

from torch import Tensor, nn

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec
from mmllm.encoders.common.foreign import library, load_states, mark_initialized, write_missing
from mmllm.encoders.common.layered import LayeredEncoder, State
from mmllm.encoders.common.transform import PILLOW, Interpolation, PixelArguments, Transform

PACKAGE = "'mmllm[towers]'"


@register("encoder", "timm")
class TimmEncoder(LayeredEncoder):
    """A timm model with `forward_intermediates` on every frame of a clip (ViT, DINOv2, SigLIP, EVA, ConvNeXt, ...).

    Args:
        name: timm's model name, with or without a tag of weights, or `hf-hub:` and an id, or `local-dir:` and
            a folder.
        weights: None = random; "pretrained" = those of the name; otherwise a local .safetensors, .bin or .pth
            file (tensors only).
        architecture: timm's model name; filled in for an id or a folder.
        layer: which block's (or stage's) output gives the tokens, counted from 0, or a list whose outputs are joined
            along the width; -2 = the last but one, as everywhere.
        cls: keep the CLS token of every frame; the tokens then have no grid.
        norm: apply timm's last norm to the outputs, where the model supports that.
        frames: how many frames of a clip to read, evenly spaced; None = all.
        size: side of the input in pixels; for a size other than the model's own, timm resamples the positions when it
            loads the weights.
        model_args: further arguments of timm's constructor.
        mean, std, fit, short, interpolation: pixel transform, as in `Geometry`; the default is timm's own, with its
            crop percentage.
    """

    origins = ("weights",)  # the name stands for an architecture here

    def __init__(
        self,
        site: Site,
        *,
        name: str,
        weights: str | None = None,
        architecture: str | None = None,
        layer: int | tuple[int, ...] = -2,
        cls: bool = False,
        norm: bool = False,
        frames: int | None = None,
        size: int | None = None,
        model_args: dict | None = None,
        **pixels: Unpack[PixelArguments],
    ) -> None:
        architecture = architecture or name
        if ":" in architecture:
            raise ValueError(f"architecture: missing; that of {name} is filled in when the recipe is resolved")
        config = registered_config(architecture)
        transform = own_transform(config, size, pixels.get("fit"), architecture)
        super().__init__(site, transform.override(**pixels), layer=layer, cls=cls, frames=frames)
        self.name, self.weights, self.architecture, self.norm = name, weights, architecture, norm
        self.model_args = {**(model_args or {}), "num_classes": 0}
        if "img_size" in self.model_args:
            raise ValueError("model_args.img_size: use size instead")
        if config.get("fixed_input_size"):
            self.model_args["img_size"] = transform.size
        self.build_tower()

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Fill in architecture, constructor arguments and pixel transform, so that the recipe can be built offline."""
        name, completed = arguments.get("name"), dict(arguments)
        if not isinstance(name, str):
            return arguments
        if arguments.get("architecture") is None:
            completed["architecture"], config, model_args = model_source(name)
            completed["model_args"] = {**model_args, **(arguments.get("model_args") or {})}
            own = own_transform(config, arguments.get("size"), arguments.get("fit"), name)
            for key in ("size", "mean", "std", "interpolation", *(() if arguments.get("fit") else ("fit", "short"))):
                if arguments.get(key) is None:
                    value = getattr(own, key)
                    completed[key] = list(value) if isinstance(value, tuple) else value
        return completed

    def create(self) -> nn.Module:
        """timm's model with random weights and without a classifier."""
        model = library("timm", PACKAGE).create_model(self.architecture, **self.model_args)
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{self.architecture} does not give its intermediate features")
        return mark_initialized(model)

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """Outputs of blocks as maps [M, C, h, w], and the tokens before the patches."""
        takes = inspect.signature(tower.forward_intermediates).parameters
        before = getattr(tower, "num_prefix_tokens", 0) > 0 and "return_prefix_tokens" in takes
        options: dict[str, Any] = {"return_prefix_tokens": True} if before else {}
        options |= {"norm": True} if self.norm else {}
        outputs = tower.forward_intermediates(
            inputs, indices=layers, stop_early=True, output_fmt="NCHW", intermediates_only=True, **options
        )
        pairs = [output if before else (output, None) for output in outputs]
        states = [State(patches.permute(0, 2, 3, 1)[:, None], prefix) for patches, prefix in pairs]
        return dict(zip(range(len(states)) if layers is None else layers, states, strict=True))

    def reset_parameters(self) -> None:
        """Initialise tables that no checkpoint holds (rotary and relative positions) and whatever else one lacks."""
        write_missing(self.tower, self.create)

    def load_weights(self) -> None:
        """Load the weights that the arguments name; timm resamples them to this size where needed.

        Raises:
            UserError: they cannot be loaded, or do not match the architecture.
        """
        if self.weights is None:
            return
        timm = library("timm", PACKAGE)
        states, where = self._states(), self.name if self.weights == "pretrained" else self.weights
        heads = registered_config(self.architecture).get("classifier") or ()
        for head in (heads,) if isinstance(heads, str) else heads:
            states = {key: value for key, value in states.items() if key not in (f"{head}.weight", f"{head}.bias")}
        # timm's own loading, for its renaming and resampling; told of no classifier, it requires all the rest.
        overlay = {"state_dict": states, "classifier": None}
        options = {"pretrained": True, "pretrained_cfg_overlay": overlay, **self.model_args}
        try:
            source = timm.create_model(self.architecture, **options)
        except (RuntimeError, KeyError, AssertionError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(where, f"not the weights of {self.architecture}: {why}") from error
        load_states(self.tower, source.state_dict(), where)

    def _states(self) -> dict[str, Tensor]:
        models = library("timm.models", PACKAGE)
        kind, _, source = self.name.rpartition(":")
        try:
            if self.weights != "pretrained":
                return models.load_state_dict(self.weights)
            if kind == "local-dir":
                from timm.models._hub import load_state_dict_from_path

                return load_state_dict_from_path(source)
            hub = source if kind else registered_config(self.architecture).get("hf_hub_id")
            if hub is None:
                raise UserError(self.name, "has no weights on the hub", hint="weights: a local file")
            return models.load_state_dict_from_hf(hub)
        except (OSError, RuntimeError) as error:
            what = self.name if self.weights == "pretrained" else self.weights
            raise UserError(what, f"cannot read the weights ({error.__class__.__name__})") from error

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A ViT with registers, EVA with rotary positions, BEiT with relative ones, ConvNeXt; all tiny."""
        vit = {"embed_dim": 24, "depth": 3, "num_heads": 2}
        registers = {"name": "vit_small_patch14_reg4_dinov2", "size": 28, "model_args": vit}
        yield registers, (MediaSpec("video", 2),)
        yield {**registers, "layer": (-1, -3), "cls": True}, (MediaSpec("image", 1),)
        eva = {"name": "eva02_tiny_patch14_224", "size": 28, "model_args": vit}
        yield {**eva, "layer": -1, "norm": True}, (MediaSpec("video", 2),)
        yield {"name": "beitv2_base_patch16_224", "size": 32, "model_args": vit}, (MediaSpec("image", 1),)
        stages = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
        yield {"name": "convnext_atto", "size": 64, "model_args": stages}, (MediaSpec("video", 2),)


def model_source(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, timm's config of the weights, constructor arguments) of a name, an id or a folder.

    Raises:
        UserError: there is none.
    """
    kind, _, source = name.rpartition(":")
    if not kind:
        return name, registered_config(name), {}
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    readers = {"hf-hub": load_model_config_from_hf, "local-dir": load_model_config_from_path}
    if kind not in readers:
        raise UserError(name, "unknown source", expected="a timm name, hf-hub:ID or local-dir:FOLDER")
    try:
        config, architecture, model_args = readers[kind](source)
    except (OSError, RuntimeError) as error:
        raise UserError(name, f"no such model ({error.__class__.__name__})") from error
    decided = ("img_size", "num_classes")  # by `size`, and by having no classifier
    model_args = {key: value for key, value in (model_args or {}).items() if key not in decided}
    return architecture, {**registered_config(architecture), **dict(config)}, model_args


def registered_config(architecture: str) -> dict[str, Any]:
    """timm's config of a model that it knows by name.

    Raises:
        UserError: it knows none of that name or tag.
    """
    timm = library("timm", PACKAGE)
    if not timm.is_model(architecture):
        raise UserError(architecture, "no such timm model", hint=nearest(architecture, timm.list_models()))
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        raise UserError(architecture, str(error)) from error
    return config.to_dict() if config is not None else {}


def own_transform(config: dict[str, Any], size: int | None, fit: str | None, where: str) -> Transform:
    """timm's evaluation transform: frames are enlarged by the crop percentage, then the centre is cut out.

    Args:
        fit: what the recipe says; only timm's own fit implies the rest of timm's transform.

    Raises:
        UserError: the transform is one that a geometry cannot express.
    """
    data = library("timm.data", PACKAGE).resolve_data_config(pretrained_cfg=config or {"input_size": (3, 224, 224)})
    own, mean, std = data["input_size"][1:], tuple(data["mean"]), tuple(data["std"])
    if size is None and own[0] != own[1]:
        raise UserError(where, f"reads {own[0]}x{own[1]} pixels", hint="size: a square")
    if data["interpolation"] not in get_args(Interpolation):
        raise UserError(where, f"its frames are resized by {data['interpolation']}", hint="interpolation: bicubic")
    side = size or own[0]
    short, grey = math.floor(side / data["crop_pct"]), {round(255 * value) for value in mean}
    plain = {"mean": mean, "std": std, "size": side, "interpolation": data["interpolation"], **PILLOW}
    if data["crop_mode"] == "center" or fit is not None:
        return Transform(**plain, short=short)
    if short == side and data["crop_mode"] == "squash":
        return Transform(**plain, fit="squash")
    if short == side and data["crop_mode"] == "border" and len(grey) == 1:
        return Transform(**plain, fit="pad", fill=grey.pop())
    what = f"resizes to {short} ({data['crop_mode']}) and crops to {side}"
    raise UserError(where, what, hint="fit: squash, crop or pad")
