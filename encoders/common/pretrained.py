"""Towers of transformers: config, pixel transform, layers and weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.library import check_attention, pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NOT_SHAPES = ("architectures", "id2label", "label2id", "transformers_version", "dtype", "_name_or_path")
"""Config keys that say nothing about how the tower is built."""


def tower_config(config: dict[str, Any], model_type: str | None = None) -> PreTrainedConfig:
    """A config object from a recipe's inline config.

    Args:
        model_type: the preset's; None = the config's own `model_type`.

    Raises:
        ValueError: no such model type, or a value that it does not accept.
    """
    from transformers import AutoConfig

    check_attention(config, "config")
    kind = model_type or config.get("model_type")
    if kind is None:
        raise ValueError("config.model_type: missing, a name's own config is filled in when its recipe is resolved")
    values = {key: value for key, value in config.items() if key not in ("model_type", *NOT_SHAPES)}
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # the library checks values its own way and raises many error types
        raise ValueError(f"config of a {kind}: {' '.join(str(error).split())[:200]}") from error


def fetch_config(name: str, part: str) -> dict[str, Any]:
    """The config of a hub id or a folder as plain values, or its `part` (vision_config, text_config) if it has one.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoConfig

    try:
        config = pretrained(AutoConfig, name)
    except (OSError, ValueError) as error:
        raise UserError(name, f"no such tower ({error.__class__.__name__})", hint="a hub id or a folder") from error
    config = getattr(config, part, config)
    plain = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_SHAPES and _plain(value)}
    return {"model_type": config.model_type, **plain}


def fetch_transform(name: str, size: int | None) -> dict[str, Any]:
    """Transform arguments from the image processor of a hub id or a folder.

    Args:
        size: a side other than the processor's; the short side before a crop is scaled with it.

    Raises:
        UserError: there is none, or it does something that a geometry cannot express.
    """
    from transformers import AutoImageProcessor

    try:
        processor = pretrained(AutoImageProcessor, name)
    except (OSError, ValueError) as error:
        hint = "give mean, std, size, fit and interpolation"
        raise UserError(name, f"no image processor ({error.__class__.__name__})", hint=hint) from error
    factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6 or not getattr(processor, "do_normalize", True):
        raise UserError(name, "its image processor scales pixels in an unusual way", hint="give mean and std")
    own, short = _own_size(processor, name)
    side = size or own
    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    if int(processor.resample) not in names:
        raise UserError(f"{name}: resample", "unknown", expected="nearest, bilinear or bicubic", got=processor.resample)
    return {
        "size": side,
        "fit": "squash" if short is None else "crop",
        "short": None if short is None else short * side // own,
        "interpolation": names[int(processor.resample)],
        "mean": [float(value) for value in processor.image_mean],
        "std": [float(value) for value in processor.image_std],
    }


def _own_size(processor: dict[str, Any], name: str) -> tuple[int, int | None]:
    """(side of the input, length of the short side before the crop or None where the frame is squashed)."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    cropped, short = bool(getattr(processor, "do_center_crop", False)), size.get("shortest_edge")
    zoom = getattr(processor, "crop_pct", None)
    if zoom and short:  # ConvNeXt's own rule: below 384 zoom and crop, from 384 on squash
        return (short, int(short / zoom)) if short < 384 else (short, None)
    if cropped and short and crop.get("height") == crop.get("width"):
        return crop["height"], short
    if not cropped and size.get("height") is not None and size.get("height") == size.get("width"):
        return size["height"], None
    what = f"resizes to {size}" + (f" and crops to {crop}" if cropped else "")
    raise UserError(name, f"its image processor {what}", hint="give size, fit, short, interpolation, mean and std")


def build_tower(config: PreTrainedConfig) -> nn.Module:
    """A tower with random weights, without its pooling layer, which no layer's tokens pass through.

    Raises:
        ValueError: the library has no model for such a config.
    """
    from transformers import MODEL_MAPPING, AutoModel

    try:
        cls = MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise ValueError(f"config.model_type: no tower of type {config.model_type}") from error
    cls = cls[0] if isinstance(cls, tuple | list) else cls
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls).parameters else {}
    return AutoModel.from_config(config, **options)


def hidden_states(call: Callable, layers: Iterable[int] | None, norm: bool, count: int) -> dict[int, Tensor]:
    """{layer: hidden state} of one forward; layer 0 enters the first block.

    Args:
        call: runs the tower with `output_hidden_states` and any other options.
        layers: None = all.
        norm: take the tower's last hidden state, after its last norm, as the last layer.
        count: number of layers; only read where `layers` is given.

    Raises:
        ValueError: the tower has no hidden states, or no norm after the last of them.
    """
    last = count - 1
    wanted = True if layers is None else [layer for layer in layers if not (norm and layer == last)]
    output = call(output_hidden_states=wanted or None)
    states = dict(enumerate(output.hidden_states or ()))
    if layers is None:
        if not states:
            raise ValueError("this tower gives no hidden states")
        last = len(states) - 1
        if norm and output.last_hidden_state is states[last]:
            raise ValueError("norm: this tower has no norm after its last layer")
        layers = list(states)
    if norm and last in layers:
        states[last] = output.last_hidden_state
    return {layer: states[layer] for layer in layers}


def load_tower(tower: nn.Module, name: str) -> None:
    """Load the weights of a hub id or a folder into a tower; of a model with several towers, those of the matching one.

    Raises:
        UserError: they cannot be loaded, lack something, or are of another size than the recipe's config.
    """
    try:
        theirs, random = _published(tower, name)
    except (OSError, ValueError) as error:
        raise UserError(name, "cannot fetch the weights", hint=f"hf download {name}") from error
    for key, value in tower.state_dict().items():
        found = None if key in random else theirs.get(key)
        if found is None or found.shape != value.shape:
            got = "nothing" if found is None else list(found.shape)
            raise UserError(f"{name}:{key}", "differs from the recipe", expected=list(value.shape), got=got)
    tower.load_state_dict({key: theirs[key] for key in tower.state_dict()})


def _published(tower: nn.Module, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """Weights under the tower's own names, and the names of those that are random."""
    from transformers import AutoConfig, AutoModel

    # A lone tower is loaded as itself; one of several with its neighbours, or the library would list all of them.
    alone = pretrained(AutoConfig, name).model_type == tower.config.model_type
    options = {"dtype": next(tower.parameters()).dtype, "output_loading_info": True}
    loaded, info = pretrained(type(tower) if alone else AutoModel, name, **options)
    prefix = next((f"{name}." for name, part in loaded.named_modules() if name and type(part) is type(tower)), "")
    states = {key.removeprefix(prefix): value for key, value in loaded.state_dict().items() if key.startswith(prefix)}
    return states, {str(key).removeprefix(prefix) for key in info["missing_keys"]}


def square_side(value: object) -> int | None:
    """The side of a square that a config gives as a number or a pair; None where it gives none.

    Raises:
        ValueError: not a square.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{list(value)}: only square inputs and patches are read")
    return value[0]


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return isinstance(value, int | float | str | bool | type(None))
