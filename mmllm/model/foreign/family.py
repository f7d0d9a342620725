"""What a family of published models is: two maps, of the config and of the weights' names, both ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOWER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
    "vision_use_head",
)
"""What of a tower's config shapes its weights or its numbers."""


class Family(ABC):
    """A model type of transformers.

    Attributes:
        model_type: in its config.json.
        class_name: of transformers.
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]

    @abstractmethod
    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our `model` section without the LLM, from their config.

        Raises:
            UserError: the checkpoint uses something that we have no part for.
        """

    @abstractmethod
    def fits(self, section: dict[str, Any]) -> bool:
        """Whether a model of ours can be written as one of this family."""

    @abstractmethod
    def config(self, section: dict[str, Any], text: PreTrainedConfig, tokens: dict[str, int]) -> PreTrainedConfig:
        """Their config, from our section, the LLM's config and the ids of the placeholders."""

    @abstractmethod
    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """{their prefix: our prefixes}; more than one of ours where they share what we keep apart."""


def llm_names() -> dict[str, tuple[str, ...]]:
    """The LLM and its head, the same in every family."""
    return {"model.language_model.": ("model.language_model.",), "lm_head.": ("lm_head.",)}


def encoder_prefix(name: str) -> str:
    """Where a tower's weights are in our model."""
    return f"model.front_end.bank.encoders.{name}.tower."


def projector_names(*nodes: str) -> dict[str, tuple[str, ...]]:
    """The two-layer projector, as the layers of our `mlp` nodes."""
    theirs = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
    return {
        f"model.multi_modal_projector.{name}": tuple(f"model.front_end.parts.{node}.{layer}" for node in nodes)
        for name, layer in theirs.items()
    }


TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""{model type of a tower: our encoder}."""


def tower_section(config: PreTrainedConfig, *kinds: str) -> dict[str, Any]:
    """An encoder, `{type, config, layer}`, from the config of a model with a tower and a two-layer projector.

    Args:
        kinds: our encoders that the family may have.

    Raises:
        UserError: another kind of tower, or a setting of it or the projector that we have no part for.
    """
    vision = config.vision_config
    kind = TOWERS.get(vision.model_type)
    if kind not in kinds:
        expected = " or ".join(name for name, own in TOWERS.items() if own in kinds)
        raise UserError("vision_config.model_type", "no tower for it", expected=expected, got=vision.model_type)
    only(config, "vision_feature_select_strategy", strategy_of(kind))
    only(config, "projector_hidden_act", "gelu")
    only(config, "multimodal_projector_bias", True)
    values = vision.to_dict()
    own = {key: values[key] for key in TOWER_KEYS if key in values}
    return {"type": kind, "config": own, "layer": layer_of(config)}


def strategy_of(kind: str) -> str:
    """Which tokens of a tower count: CLIP's without CLS, all of SigLIP's."""
    return "default" if kind == "clip" else "full"


def their_tower(section: dict[str, Any]) -> dict[str, Any]:
    """What their config says of a tower, from our encoder's section."""
    from transformers import AutoConfig

    model_type = next(name for name, own in TOWERS.items() if own == section["type"])
    return {
        "vision_config": AutoConfig.for_model(model_type, **section["config"]),
        "vision_feature_layer": section.get("layer", -2),
        "vision_feature_select_strategy": strategy_of(section["type"]),
    }


def patches(section: dict[str, Any]) -> int:
    """Tokens of one view of an encoder."""
    return (section["config"]["image_size"] // section["config"]["patch_size"]) ** 2


def only(config: PreTrainedConfig, key: str, *allowed: object) -> Any:
    """The value of a key of their config, if it is one that we can express.

    Raises:
        UserError: it is another one.
    """
    value = getattr(config, key, None)
    if value not in allowed:
        expected = " or ".join(map(str, allowed))
        raise UserError(f"{config.model_type}: {key}", "no part for it", expected=expected, got=value)
    return value


def layer_of(config: PreTrainedConfig) -> int:
    """The one layer whose tokens are read.

    Raises:
        UserError: several are joined.
    """
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(f"{config.model_type}: vision_feature_layer", "one layer, not several", got=layer)
    return layer
