"""LLaVA-OneVision: SigLIP, images in tiles, videos resized to a quarter of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.contract.errors import UserError
from mmllm.model.foreign.family import Family, encoder_prefix, llm_names, projector_names, their_tower, tower_section
from mmllm.model.foreign.llava_next import grids, pinpoints

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ASPECT = "anyres_max_"
NEWLINES = {"any_resolution": "newline", "newline": "embedding"}
"""Parts that hold the newline, and its name there; the second in recipe `llava_onevision_video`."""


class LlavaOnevision(Family):
    """`llava_onevision`."""

    model_type = "llava_onevision"
    class_name = "LlavaOnevisionForConditionalGeneration"

    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The parts of recipe `llava_onevision`."""
        tower = tower_section(config, "siglip")
        most = config.vision_aspect_ratio.removeprefix(ASPECT)
        if not most.isdigit():
            raise UserError(
                "vision_aspect_ratio", "no part for it", expected=f"{ASPECT}9", got=config.vision_aspect_ratio
            )
        return {
            "media": {"frames": 32, "tiles": {"among": grids(config)}},
            "encoders": {"tower": tower},
            "connector": [
                {"type": "mlp", "width": "llm"},
                {"type": "pool", "kernel": [1, 2, 2], "mode": "bilinear", "only": "video"},
                {"type": "any_resolution", "most": int(most)},
            ],
        }

    def fits(self, section: dict[str, Any]) -> bool:
        """`mlp`, `pool` of videos, `any_resolution`, behind SigLIP."""
        nodes, encoders = section["connector"], list(section["encoders"].values())
        return (
            [node["type"] for node in nodes] == ["mlp", "pool", "any_resolution"]
            and (list(nodes[1].get("kernel", ())), nodes[1].get("mode")) == ([1, 2, 2], "bilinear")
            and [encoder["type"] for encoder in encoders] == ["siglip"]
        )

    def config(self, section: dict[str, Any], text: PreTrainedConfig, tokens: dict[str, int]) -> PreTrainedConfig:
        """As published."""
        from transformers import LlavaOnevisionConfig

        (tower,) = section["encoders"].values()
        most = next(node.get("most", 9) for node in section["connector"] if node["type"] == "any_resolution")
        return LlavaOnevisionConfig(
            **their_tower(tower),
            text_config=text,
            image_token_index=tokens["image"],
            video_token_index=tokens["video"],
            image_grid_pinpoints=pinpoints(section, tower["config"]["image_size"]),
            vision_aspect_ratio=f"{ASPECT}{most}",
        )

    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Tower, projector, newline, LLM."""
        (name,) = section["encoders"]
        nodes = {node["type"]: node["name"] for node in section["connector"]}
        newline = next(f"{nodes[kind]}.{own}" for kind, own in NEWLINES.items() if kind in nodes)
        return {
            "model.vision_tower.": (encoder_prefix(name),),
            "model.image_newline": (f"model.front_end.parts.{newline}",),
            **projector_names(nodes["mlp"]),
            **llm_names(),
        }
