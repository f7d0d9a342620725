"""Video-LLaVA: a tower for images and one for the frames of videos, behind one projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.model.foreign.family import (
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

NAMES = {"image": "image_mlp", "video": "video_mlp"}


class VideoLlava(Family):
    """`video_llava`. Frames of videos keep their CLS token, images do not. We keep a projector for each kind."""

    model_type = "video_llava"
    class_name = "VideoLlavaForConditionalGeneration"

    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Eight frames of 257 tokens, or an image of 256."""
        tower = tower_section(config, "clip")
        return {
            "media": {"frames": 8},
            "encoders": {"image": tower, "video": {**tower, "cls": True}},
            "connector": [
                {"type": "mlp", "name": name, "width": "llm", "in": kind, "only": kind} for kind, name in NAMES.items()
            ],
            "output": dict(NAMES),
        }

    def fits(self, section: dict[str, Any]) -> bool:
        """Two towers and two projectors by kind."""
        return section.get("output") == NAMES and set(section["encoders"]) == set(NAMES)

    def config(self, section: dict[str, Any], text: PreTrainedConfig, tokens: dict[str, int]) -> PreTrainedConfig:
        """As published."""
        from transformers import VideoLlavaConfig

        tower = section["encoders"]["image"]
        return VideoLlavaConfig(
            **their_tower(tower),
            text_config=text,
            image_token_index=tokens["image"],
            video_token_index=tokens["video"],
            image_seq_length=patches(tower),
            video_seq_length=section["media"]["frames"] * (patches(tower) + 1),
        )

    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Both towers, the shared projector, LLM."""
        towers = {f"model.{kind}_tower.": (encoder_prefix(kind),) for kind in NAMES}
        return {**towers, **projector_names(*NAMES.values()), **llm_names()}
