"""BridgeTower as it was trained: image-text matching and embeddings, with our stack between transformers' own towers.

Source: Xu et al. 2023, arXiv 2206.08657; weights of the `BridgeTower` classes of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmllm.connectors.bridgetower.cross_modal import CrossModalStack, Sizes
from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LINKS = {"add": "add_norm", "scaled_add": "scaled_add", "interpolate": "interpolate"}
"""Names of the bridges in transformers -> our names."""
TASKS = {
    "features": "BridgeTowerModel",
    "matching": "BridgeTowerForImageAndTextRetrieval",
    "contrastive": "BridgeTowerForContrastiveLearning",
}
HEADS = {
    "matching": "itm_score",
    "text": "itc_text_head",
    "image": "itc_image_head",
    "cross": "itc_cross_modal_head",
}


@dataclass
class Features:
    """The features of image-text pairs: [B, L, D], [B, N, D] and, from both first tokens, [B, 2 D]."""

    text: Tensor
    image: Tensor
    pooled: Tensor


class PooledStack(nn.Module):
    """The stack and the two poolers: all of BridgeTower except its towers and heads."""

    def __init__(self, text_width: int, image_width: int, sizes: Sizes) -> None:
        super().__init__()
        self.stack = CrossModalStack(text_width, image_width, sizes)
        self.text_pooler, self.image_pooler = nn.Linear(sizes.width, sizes.width), nn.Linear(sizes.width, sizes.width)

    def forward(self, text: Sequence[Tensor], image: Sequence[Tensor], mask: Tensor | None = None) -> Features:
        """As the stack's `forward`; an image's first token is its class token."""
        fused = self.stack(text, image, mask)
        firsts = self.text_pooler(fused.text[:, 0]), self.image_pooler(fused.image[:, 0])
        return Features(fused.text, fused.image, torch.cat(firsts, dim=-1).tanh())


BASE = "bridgetower."
OURS = re.compile(r"cross_modal_(text|image)_(transform|layernorm|link_tower|layers|pooler)\.(?:(\d+)\.)?(.+)")
WITHIN = {
    "layernorm": {"": "first."},
    "pooler": {"dense.": ""},
    "link_tower": {"LayerNorm.": "norm.", "scaled_factor": "weight", "beta": "weight"},
    "layers": {
        "attention.self.": "self_attention.",
        "attention.output.dense.": "self_attention.out.",
        "attention.output.LayerNorm.": "self_attention.norm.",
        "crossattention.self.": "cross_attention.",
        "crossattention.output.dense.": "cross_attention.out.",
        "crossattention.output.LayerNorm.": "cross_attention.norm.",
        "intermediate.dense.": "feed_forward.up.",
        "output.dense.": "feed_forward.down.",
        "output.LayerNorm.": "feed_forward.norm.",
    },
}
"""{group of names in transformers: {prefix of the rest of a name there: prefix here}}."""


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a BridgeTower class of transformers (or of the authors' model) under the names of a `PooledStack`.

    Weights of the towers and the heads are left out.

    Raises:
        UserError: a weight of the cross-modal part with no counterpart in ours.
    """
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(BASE)
        if name == "token_type_embeddings.weight":
            if len(value) != 2:
                what = "type embeddings of other than one text and one image"
                raise UserError(key, what, expected="2 rows", got=len(value))
            ours["stack.text.embedding"], ours["stack.image.embedding"] = value
        elif name.startswith("cross_modal_"):
            ours[_our_name(name)] = value
    return ours


def _our_name(name: str) -> str:
    found = OURS.fullmatch(name)
    if found is None:
        raise UserError(name, "not a weight of BridgeTower's cross-modal part")
    modality, group, index, rest = found.groups()
    if group == "transform":
        return f"stack.{modality}.transforms.{index or 0}.{rest}"
    for theirs, ours in WITHIN[group].items():
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
            break
    else:
        raise UserError(name, "not a weight of BridgeTower's cross-modal part")
    if group == "pooler":
        return f"{modality}_pooler.{rest}"
    if group == "layernorm":
        return f"stack.{modality}.{rest}"
    if index is None:
        raise UserError(name, "bridges that share their weights", expected="one for each layer")
    return f"stack.{modality}.{'bridges' if group == 'link_tower' else 'layers'}.{index}.{rest}"


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The stack of a `BridgeTowerConfig`; transformers builds its layers from the text tower's config.

    Raises:
        UserError: ours cannot represent this stack.
    """
    text = config.text_config
    if text.hidden_size != config.hidden_size:
        what = "its layers have the text tower's width"
        raise UserError("config.hidden_size", what, expected=text.hidden_size, got=config.hidden_size)
    if text.hidden_act != "gelu":
        raise UserError("config.text_config.hidden_act", "unknown here", expected="gelu", got=text.hidden_act)
    if config.link_tower_type not in LINKS:
        raise UserError("config.link_tower_type", "unknown", expected=", ".join(LINKS), got=config.link_tower_type)
    return Sizes(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=text.num_attention_heads,
        feed_forward=text.intermediate_size,
        bridge=LINKS[config.link_tower_type],
        eps=config.layer_norm_eps,
        layer_eps=text.layer_norm_eps,
        dropout=text.hidden_dropout_prob,
        shared=config.share_cross_modal_transformer_layers,
    )


class ImageTextModel(nn.Module):
    """A BridgeTower model of transformers with its cross-modal part replaced by ours; towers and heads stay its own.

    Args:
        model: an instance of a class in `TASKS`, with random or loaded weights; its modules are used, not copied.

    Raises:
        UserError: ours cannot represent its cross-modal part.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        core = getattr(model, "bridgetower", model)
        config = core.config
        self.vision, self.text = core.vision_model, core.text_model
        self.fusion = PooledStack(config.text_config.hidden_size, config.vision_config.hidden_size, sizes_of(config))
        self.fusion.to(next(core.parameters()))
        self.fusion.load_state_dict(from_transformers(core.state_dict()))
        self.heads = nn.ModuleDict(
            {name: getattr(model, head).fc for name, head in HEADS.items() if hasattr(model, head)}
        )
        self.train(model.training)

    @classmethod
    def from_pretrained(
        cls, name: str, task: Literal["features", "matching", "contrastive"] = "matching", **options: Any
    ) -> ImageTextModel:
        """A hub id or a folder.

        Args:
            task: which heads to load.
            options: for the library's `from_pretrained` (`dtype`, `revision`).

        Raises:
            UserError: there is no such checkpoint, or it lacks what the task needs.
        """
        import transformers

        library = getattr(transformers, TASKS[task])
        try:
            model, info = pretrained(library, name, output_loading_info=True, **options)
        except (OSError, ValueError) as error:
            raise UserError(name, "cannot fetch the weights", hint=f"hf download {name}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(name, f"has no {missing[0]}, which {task} needs", hint="another task or checkpoint")
        return cls(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Features:
        """Ids and mask [B, L] and pixels [B, 3, h, w] of B pairs -> their features."""
        return self.fusion(*self._states(input_ids, attention_mask, pixel_values), attention_mask)

    def match(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Logits [B, 2] per pair: (does not match, matches)."""
        return self._head("matching")(self(input_ids, attention_mask, pixel_values).pooled)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """Unit-length `text`, `image` and `cross` [B, J]: from either tower alone, and from the pair.

        The image's class token passes the stack's projection and type embedding first, as in transformers (the
        authors' own heads read the tower).
        """
        text, image = self._states(input_ids, attention_mask, pixel_values)
        stack = self.fusion.stack
        seen = {
            "text": text[-1][:, 0],
            "image": stack.image.enter(stack.sizes.levels - 1, image[-1][:, 0]),
            "cross": self.fusion(text, image, attention_mask).pooled,
        }
        return {name: nn.functional.normalize(self._head(name)(rows), dim=-1) for name, rows in seen.items()}

    def _head(self, name: str) -> nn.Module:
        if name not in self.heads:
            task = "matching" if name == "matching" else "contrastive"
            raise UserError("ImageTextModel", f"was loaded without the head {name!r}", hint=f"task={task!r}")
        return self.heads[name]

    def _states(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The towers' last hidden states, the image's after the norm that all of them share."""
        levels, visual = self.fusion.stack.sizes.levels, self.vision.visual
        text = self.text(ids, mask, output_hidden_states=True).hidden_states[-levels:]
        image = visual.transformer(visual.forward_pre(pixels.to(self.vision.dtype)))[-levels:]
        return text, [visual.forward_post(state) for state in image]
