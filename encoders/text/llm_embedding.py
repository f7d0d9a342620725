"""The LLM's own embedding table as a source of prompt features (AlignGPT)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site, TextSource
from mmllm.contract.registry import register
from mmllm.contract.types import Needs, PromptFeatures
from mmllm.encoders.text.huggingface import pad


@register("text", "llm_embedding")
class LLMEmbedding(TextSource):
    """Rows of the LLM's embedding table for the words of a prompt, without start and end; no space shared with images.

    Args:
        length: most tokens of a prompt that are read.
    """

    tokenizer_name = "llm"
    layered = False

    def __init__(self, site: Site, *, length: int = 512) -> None:
        super().__init__(site)
        self.width, self.length = site.llm_width, length

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt, at most `length`; a single id is repeated, which leaves the mean unchanged."""
        tokenizer = self.__dict__.get("_tokenizer")
        if tokenizer is None:
            raise UserError("text llm_embedding", "needs the LLM's tokenizer, but got none")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: self.length]
        return ids * 2 if len(ids) == 1 else ids

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the longest."""
        return pad(rows, 0, max([1, *map(len, rows)]))

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        """tokens [B, L, D].

        Raises:
            ValueError: layers are asked for, or there is no table.
        """
        if needs.prompt_hidden_states or embed_tokens is None:
            raise ValueError("gives no layers" if needs.prompt_hidden_states else "reads the LLM's table of embeddings")
        return PromptFeatures(ids, mask, embed_tokens(ids), present=mask.sum(dim=1) > 1)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids."""
        yield {"length": 5}, ([5, 6, 7], [8, 8], [9, 10, 11, 12])
