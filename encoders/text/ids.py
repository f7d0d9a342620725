"""The prompt's token ids alone, for a part that has a table of embeddings of its own (a Q-Former)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site, TextSource
from mmllm.contract.registry import register
from mmllm.contract.types import Needs, PromptFeatures
from mmllm.encoders.text.huggingface import pad, read_tokenizer


@register("text", "ids")
class PromptIds(TextSource):
    """Ids of a prompt, without any features.

    Args:
        tokenizer: hub id or folder of the tokenizer; "llm" = the LLM's own.
        length: most tokens of a prompt that are read: the last ones, since a question ends its instruction.
    """

    width = 0
    layered = False
    origins = ()  # the tokenizer decides what the ids mean

    def __init__(self, site: Site, *, tokenizer: str = "llm", length: int = 256) -> None:
        super().__init__(site)
        if length < 2:
            raise ValueError(f"length is 2 or more, not {length}")
        self.tokenizer_name, self.length = tokenizer, length

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt as the tokenizer frames it; of one that is too long the first words are left out."""
        tokenizer = self.__dict__.get("_tokenizer")
        if tokenizer is None and self.tokenizer_name != "llm":
            tokenizer = self.__dict__["_tokenizer"] = read_tokenizer(self.tokenizer_name, "text ids")
        if tokenizer is None:
            raise UserError("text ids", "needs the LLM's tokenizer, but got none")
        ids, words = (tokenizer(text, add_special_tokens=framed)["input_ids"] for framed in (True, False))
        if len(ids) > self.length:
            before = next(at for at in range(len(ids)) if ids[at : at + len(words)] == words)
            ids = ids[:before] + ids[before + len(ids) - self.length :]
        return ids * 2 if len(ids) == 1 else ids

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the longest."""
        return pad(rows, 0, max([1, *map(len, rows)]))

    def forward(self, ids: Tensor, mask: Tensor, needs: Needs, embed_tokens: nn.Module | None = None) -> PromptFeatures:
        """The ids as they came.

        Raises:
            ValueError: features are asked for.
        """
        if needs.prompt_hidden_states or set(needs.prompt) - {"ids"}:
            raise ValueError("gives ids, no features")
        return PromptFeatures(ids, mask, present=mask.sum(dim=1) > 1)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids."""
        yield {"length": 5}, ([5, 6, 7], [8, 8], [9, 10, 11, 12])
