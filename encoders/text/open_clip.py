"""Text towers of open_clip as sources of prompt features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site, TextSource
from mmllm.contract.registry import register
from mmllm.contract.types import Needs, PromptFeatures
from mmllm.encoders.common.foreign import library, load_states, mark_initialized, write_missing
from mmllm.encoders.image.open_clip import PACKAGE, build_pair, load_pair, model_config
from mmllm.encoders.text.huggingface import pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_IMAGE = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
"""An empty image tower to go with a text tower: open_clip builds towers in pairs."""


@register("text", "open_clip_text")
class OpenClipText(TextSource):
    """The text tower of an open_clip model. Every prompt is padded to the tower's own number of positions.

    Args:
        name, weights, config: as for the encoder `open_clip`; of the config, only text_cfg is read.
        length: most tokens of a prompt that are read, including start and end; a longer prompt is cut but keeps its
            end. None = as many as the tower has positions; more are refused.
    """

    origins = ("weights",)  # the name stands for an architecture here

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        weights: str | None = None,
        config: dict | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(site)
        self.name, self.weights, self.config = name, weights, config or model_config(name)
        if weights is not None and name is None:
            raise ValueError("weights: given without a name")
        if self.config["text_cfg"].get("hf_model_name"):
            raise ValueError(f"its text tower is {self.config['text_cfg']['hf_model_name']} of transformers")
        self.tower: nn.Module = self.create()
        self.positions = self.tower.context_length
        self.length = self.positions if length is None else length
        if not 2 <= self.length <= self.positions:
            raise ValueError(f"length {length}: the tower has {self.positions} positions")
        self.width = self.tower.width
        self.joint = None if self.tower.text_projection is None else self.config["embed_dim"]

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Fill in the config, so that the recipe can be built offline."""
        if arguments.get("config") is not None or arguments.get("name") is None:
            return arguments
        config = model_config(arguments["name"])
        keys = ("embed_dim", "text_cfg", "quick_gelu")
        return {**arguments, "config": {key: config[key] for key in keys if key in config}}

    def create(self) -> nn.Module:
        """The text tower with random weights."""
        return mark_initialized(build_pair(self.config, vision_cfg=NO_IMAGE, text_cfg=self.config["text_cfg"]).text)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, read when it is first needed.

        Raises:
            UserError: it cannot be loaded.
        """
        if "_tokenizer" not in self.__dict__:
            clip = library("open_clip", PACKAGE)
            try:
                made = clip.get_tokenizer(self.name, self.positions) if self.name else clip.SimpleTokenizer()
            except (OSError, ValueError) as error:
                raise UserError(f"text {self.name}", f"no tokenizer ({error.__class__.__name__})") from error
            self.__dict__["_tokenizer"] = made
        return self.__dict__["_tokenizer"]

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt up to its end token, at most `length`."""
        ids = self.tokenizer([text], context_length=self.length)[0].tolist()
        inner = getattr(self.tokenizer, "tokenizer", None)
        end = self.tokenizer.eot_token_id if inner is None else inner.eos_token_id
        return ids[: ids.index(end) + 1] if end in ids else ids

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the tower's positions with the padding that it was trained with."""
        padding = self.config["text_cfg"].get("pad_id", 0)
        if self.config["text_cfg"].get("hf_tokenizer_name"):
            padding = self.tokenizer.tokenizer.pad_token_id
        return pad(rows, padding, self.positions)

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        """Tokens [B, L, C] after the last norm, pooled [B, J] in the joint space, hidden states by block from 0."""
        layers = needs.prompt_hidden_states
        count = len(self.tower.transformer.resblocks)
        if any(not -count <= layer < count for layer in layers):
            raise ValueError(f"layers {list(layers)}: this tower has the layers {-count} to {count - 1}")
        wanted = sorted({layer % count for layer in layers} | {count - 1})
        found = self.tower.forward_intermediates(ids, indices=wanted, output_fmt="NLC")
        states = dict(zip(wanted, found["text_intermediates"], strict=True))
        layered = torch.stack([states[layer % count] for layer in layers], dim=2) if layers else None
        tokens = self.tower.ln_final(states[count - 1]) if "tokens" in needs.prompt else None
        pooled = found["text_features"] if "pooled" in needs.prompt else None
        return PromptFeatures(ids, mask, tokens, pooled, layered, mask.sum(dim=1) > 1)

    def reset_parameters(self) -> None:
        """Initialise the causal mask, which no checkpoint holds, and whatever else one lacks."""
        write_missing(self.tower, self.create)

    def load_weights(self) -> None:
        """Load the weights that the arguments name.

        Raises:
            UserError: they cannot be loaded, or do not match the config.
        """
        if self.weights is None:
            return
        model = load_pair(self.name, self.weights, self.config, None)
        states = getattr(model, "text", model).state_dict()
        own = self.tower.state_dict()
        load_states(self.tower, {key: value for key, value in states.items() if key in own}, self.weights)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids between a start and an end (the highest id)."""
        text = {"context_length": 10, "vocab_size": 99, "width": 32, "heads": 4, "layers": 3}
        rows = ([97, 5, 6, 98], [97, 7, 98], [97, 8, 9, 10, 11, 98])
        yield {"config": {"embed_dim": 24, "text_cfg": text}}, rows
        yield {"config": {"embed_dim": 24, "text_cfg": {**text, "pool_type": "last", "no_causal_mask": True}}}, rows
