"""LLaVA-1.5: CLIP, a two-layer projector, any LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.model.foreign.family import (
    TOWERS,
    Family,
    encoder_prefix,
    llm_names,
    patches,
    projector_names,
    their_tower,
    tower_section,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Llava(Family):
    """`llava`. A video is its frames in a row; the published weights have only seen single images."""

    model_type = "llava"
    class_name = "LlavaForConditionalGeneration"

    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """One tower, every patch through the projector."""
        tower = tower_section(config, "clip", "siglip")
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
        return LlavaConfig(
            **their_tower(tower),
            text_config=text,
            image_token_index=tokens["image"],
            image_seq_length=patches(tower),
        )

    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Tower, projector, LLM."""
        (name,) = section["encoders"]
        (node,) = (node["name"] for node in section["connector"])
        return {"model.vision_tower.": (encoder_prefix(name),), **projector_names(node), **llm_names()}
