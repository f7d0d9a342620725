"""LLaVA-1.5: CLIP, a two-layer projector, any LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.model.foreign.family import (
    Family,
    encoder_prefix,
    layer_of,
    llm_names,
    only,
    projector_names,
    tower_section,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}


class Llava(Family):
    """`llava`. A video is its frames in a row; the published weights have only seen single images."""

    model_type = "llava"
    class_name = "LlavaForConditionalGeneration"

    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """One tower, every patch through the projector."""
        tower = tower_section(config.vision_config, TOWERS)
        only(config, "vision_feature_select_strategy", "default" if tower["type"] == "clip" else "full")
        only(config, "projector_hidden_act", "gelu")
        only(config, "multimodal_projector_bias", True)
        tower["layer"] = layer_of(config)
        return {
            "media": {"frames": 4},
            "encoders": {"tower": tower},
            "connector": [{"type": "mlp", "width": "llm"}],
        }

    def fits(self, section: dict[str, Any]) -> bool:
        """A tower and an `mlp`."""
        encoders = list(section["encoders"].values())
        return (
            len(encoders) == 1
            and encoders[0]["type"] in TOWERS.values()
            and [node["type"] for node in section["connector"]] == ["mlp"]
            and not section["media"].get("tiles")
        )

    def config(self, section: dict[str, Any], text: PreTrainedConfig, tokens: dict[str, int]) -> PreTrainedConfig:
        """As published."""
        from transformers import LlavaConfig

        (tower,) = section["encoders"].values()
        side = tower["config"]["image_size"] // tower["config"]["patch_size"]
        return LlavaConfig(
            vision_config=their_tower(tower),
            text_config=text,
            image_token_index=tokens["image"],
            image_seq_length=side * side,
            vision_feature_layer=tower.get("layer", -2),
            vision_feature_select_strategy="default" if tower["type"] == "clip" else "full",
        )

    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Tower, projector, LLM."""
        (name,) = section["encoders"]
        (node,) = (node["name"] for node in section["connector"])
        return {"model.vision_tower.": (encoder_prefix(name),), **projector_names(node), **llm_names()}


def their_tower(section: dict[str, Any]) -> PreTrainedConfig:
    """The config of a tower, from our encoder's section."""
    from transformers import AutoConfig

    model_type = next(name for name, own in TOWERS.items() if own == section["type"])
    return AutoConfig.for_model(model_type, **section["config"])
