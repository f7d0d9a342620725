"""Text towers of transformers as sources of prompt features: CLIP's and SigLIP's.

Sources: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.contract.parts import Site, TextSource
from mmllm.contract.registry import register
from mmllm.contract.types import Needs, PromptFeatures
from mmllm.encoders.common.extended_positions import extend_tower, extended_length
from mmllm.encoders.common.pretrained import fetch_config, hidden_states, load_tower, tower_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


class TransformersText(TextSource):
    """A text tower of transformers.

    Args:
        name: hub id or folder of the weights; None = random weights (for tests and for loading a whole model).
        config: the tower's inline config; filled in for a name.
        tokenizer: hub id or folder of the tokenizer; None = `name`.
        length: most tokens of a prompt that are read, including start and end; a longer prompt is cut but keeps its
            end. None = as many as the tower has positions; more are refused.
        extended: stretch the tower's positions, 77 to 248 and 64 to 196 (see `extended_positions`).
    """

    model_type: ClassVar[str]

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        tokenizer: str | None = None,
        length: int | None = None,
        extended: bool = False,
    ) -> None:
        super().__init__(site)
        own = (config or {}).get("model_type")
        self.config = tower_config(config or {}, own if own in self.model_types() else self.model_type)
        self.name, self.tokenizer_name = name, tokenizer or name
        self.positions, self.extended = self.position_count(), extended
        if extended:
            self.positions = extended_length(self.positions)
        self.length = self.positions if length is None else length
        if not 2 <= self.length <= self.positions:
            raise ValueError(f"length {length}: the tower has {self.positions} positions")
        self.tower: nn.Module = extend_tower(self.build()) if extended else self.build()
        self.width = self.config.hidden_size

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        """Model types that a config may name."""
        return (cls.model_type,)

    @classmethod
    def resolve(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """With only a name, fetch the config, so that the recipe can be built offline."""
        if arguments.get("config") is None and arguments.get("name"):
            return {**arguments, "config": fetch_config(arguments["name"], "text_config")}
        return arguments

    def position_count(self) -> int:
        """Number of tokens that the tower has positions for."""
        return self.config.max_position_embeddings

    def build(self) -> nn.Module:
        """The tower with random weights."""
        raise NotImplementedError

    def pooled(self, output: ModelOutput) -> Tensor | None:
        """[B, J] from the tower's output; None without a joint space."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tower's tokenizer, read when it is first needed.

        Raises:
            UserError: there is none.
        """
        if "_tokenizer" not in self.__dict__:
            self.__dict__["_tokenizer"] = read_tokenizer(self.tokenizer_name, f"text {self.registered_name}")
        return self.__dict__["_tokenizer"]

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt with its start and end, at most `length`."""
        return self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        """Tokens [B, L, C] after the last norm, pooled [B, J] in the joint space, hidden states before that norm."""
        layers = needs.prompt_hidden_states
        count = self.config.num_hidden_layers + 1
        if any(not -count <= layer < count for layer in layers):
            raise ValueError(f"layers {list(layers)}: this tower has the layers {-count} to {count - 1}")
        outputs: list[Any] = []

        def call(**options: Any) -> ModelOutput:
            outputs.append(self.run(ids, mask, **options))
            return outputs[0]

        indices = [layer % count for layer in layers]
        states = hidden_states(call, indices, False, count)
        layered = torch.stack([states[index] for index in indices], dim=2) if indices else None
        tokens = outputs[0].last_hidden_state if "tokens" in needs.prompt else None
        pooled = self.pooled(outputs[0]) if "pooled" in needs.prompt else None
        return PromptFeatures(ids, mask, tokens, pooled, layered, mask.sum(dim=1) > 1)

    def run(self, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
        """The tower's forward."""
        raise NotImplementedError

    def load_weights(self) -> None:
        """Load the weights of `name` into the tower.

        Raises:
            UserError: they cannot be loaded, or are of another size than the recipe's config.
        """
        if self.name is None:
            return
        if not self.extended:
            load_tower(self.tower, self.name)
            return
        original = self.build()
        load_tower(original, self.name)
        self.tower.load_state_dict(extend_tower(original).state_dict())


@register("text", "clip_text")
class ClipText(TransformersText):
    """CLIP's text tower: causal, pooled at the end token and projected into the space shared with the image tower."""

    model_type = "clip_text_model"

    def build(self) -> nn.Module:
        """The tower with its projection."""
        from transformers import CLIPTextModelWithProjection

        self.joint = self.config.projection_dim
        return CLIPTextModelWithProjection(self.config)

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the longest: what follows the end token never matters."""
        return pad(rows, 0, max([1, *map(len, rows)]))

    def run(self, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
        """Causal attention: padding comes after all real tokens, so it needs no mask and its values are never read."""
        return self.tower(input_ids=ids, **options)

    def pooled(self, output: ModelOutput) -> Tensor:
        """[B, J], projected, not normalised."""
        return output.text_embeds

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids between a start and an end."""
        config = {**SMALL, "vocab_size": 99, "max_position_embeddings": 12, "projection_dim": 24}
        config |= {"bos_token_id": 97, "eos_token_id": 98}
        rows = ([97, 5, 6, 98], [97, 7, 98], [97, 8, 9, 10, 11, 98])
        yield {"config": config}, rows
        yield {"config": config, "length": 6}, rows
        yield {"config": {**config, "max_position_embeddings": 24}, "extended": True}, rows


@register("text", "siglip_text")
class SiglipText(TransformersText):
    """SigLIP's text tower (and SigLIP 2's): bidirectional attention over a fixed length, padding included.

    It was trained to pool at the last position, so every prompt is padded to the tower's own number of positions.
    """

    model_type = "siglip_text_model"

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        """Both generations."""
        return ("siglip_text_model", "siglip2_text_model")

    def build(self) -> nn.Module:
        """The tower with its head."""
        from transformers import Siglip2TextModel, SiglipTextModel

        self.joint = self.config.projection_size
        return (Siglip2TextModel if self.config.model_type == "siglip2_text_model" else SiglipTextModel)(self.config)

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the tower's positions, with the tokenizer's padding where there is a tokenizer."""
        # an empty prompt needs no tokenizer
        known = any(rows) and (self.tokenizer_name is not None or "_tokenizer" in self.__dict__)
        padding = self.tokenizer.pad_token_id if known else self.config.pad_token_id
        return pad(rows, padding, self.positions)

    def run(self, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
        """Attention over all positions: the tower was trained without a mask."""
        return self.tower(input_ids=ids, **options)

    def pooled(self, output: ModelOutput) -> Tensor:
        """[B, J], not normalised."""
        return output.pooler_output

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids that finish with an end token; both generations."""
        config = {**SMALL, "vocab_size": 99, "max_position_embeddings": 8, "projection_size": 24}
        rows = ([5, 6, 1], [7, 1], [8, 9, 10, 11, 1])
        yield {"config": config}, rows
        yield {"config": {**config, "model_type": "siglip2_text_model"}}, rows


def attend_to_all(tower: nn.Module, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
    """The output of a tower in which every token attends to all real ones, before and after it."""
    seen = mask.bool()[:, None, None].expand(-1, 1, ids.shape[1], -1)  # the library never inspects such a mask
    return tower(input_ids=ids, attention_mask=seen, **options)


def read_tokenizer(name: str | None, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a folder.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    if name is None:
        raise UserError(where, "neither a tokenizer nor a name")
    try:
        return pretrained(AutoTokenizer, name)
    except (OSError, ValueError) as error:
        raise UserError(where, f"no tokenizer at {name}") from error


def pad(rows: list[list[int]], padding: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, length] and mask [B, length]; an empty row is one padding token, unmasked."""
    ids = torch.full((len(rows), length), padding, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : max(1, len(row))] = 1
    return ids, mask
