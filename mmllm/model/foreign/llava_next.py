"""LLaVA-NeXT (LLaVA-1.6): CLIP over tiles, a two-layer projector, a newline after each row of the joined tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmllm.contract.errors import UserError
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

ENDLESS = 1_000_000
"""Views beyond which the joined tiles would be scaled down: never."""


class LlavaNext(Family):
    """`llava_next`, for conversations of one image: of several, we read each as a single view."""

    model_type = "llava_next"
    class_name = "LlavaNextForConditionalGeneration"

    def section(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Tiles at the places that the pinpoints allow."""
        tower = tower_section(config, "clip", "siglip")
        return {
            "media": {"frames": 4, "tiles": {"among": grids(config)}},
            "encoders": {"tower": tower},
            "connector": [{"type": "mlp", "width": "llm"}, {"type": "any_resolution", "most": ENDLESS}],
        }

    def fits(self, section: dict[str, Any]) -> bool:
        """A tower, an `mlp`, and `any_resolution` without a limit."""
        nodes = section["connector"]
        return [node["type"] for node in nodes] == ["mlp", "any_resolution"] and nodes[1].get("most", 9) >= ENDLESS

    def config(self, section: dict[str, Any], text: PreTrainedConfig, tokens: dict[str, int]) -> PreTrainedConfig:
        """As published."""
        from transformers import LlavaNextConfig

        (tower,) = section["encoders"].values()
        return LlavaNextConfig(
            **their_tower(tower),
            text_config=text,
            image_token_index=tokens["image"],
            image_seq_length=patches(tower),
            image_grid_pinpoints=pinpoints(section, tower["config"]["image_size"]),
        )

    def names(self, section: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Tower, projector, newline, LLM."""
        (name,) = section["encoders"]
        nodes = {node["type"]: node["name"] for node in section["connector"]}
        return {
            "model.vision_tower.": (encoder_prefix(name),),
            "model.image_newline": (f"model.front_end.parts.{nodes['any_resolution']}.newline",),
            **projector_names(nodes["mlp"]),
            **llm_names(),
        }


def grids(config: PreTrainedConfig) -> list[list[int]]:
    """(rows, columns) of tiles, in the order in which they are tried.

    Raises:
        UserError: a size that is no whole number of views.
    """
    side, found = config.vision_config.image_size, []
    for height, width in config.image_grid_pinpoints:
        if height % side or width % side:
            raise UserError(
                "image_grid_pinpoints", "no whole number of views", expected=f"of {side}", got=[height, width]
            )
        found.append([height // side, width // side])
    return found


def pinpoints(section: dict[str, Any], side: int) -> list[list[int]]:
    """The sizes that our tiling tries, in pixels."""
    tiles = section["media"]["tiles"]
    rows, columns = tiles.get("up_to", (6, 6))
    among = tiles.get("among") or [[r, c] for r in range(1, rows + 1) for c in range(1, columns + 1)]
    return [[r * side, c * side] for r, c in among]
