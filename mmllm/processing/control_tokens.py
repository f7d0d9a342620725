"""Text that spells a control token: somebody typed it, so it stays text."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Extent = tuple[int, int]
"""(start, end) characters."""


class ControlTokens:
    """The tokens of a tokenizer that mean more than their letters.

    Args:
        tokenizer: of transformers, backed by a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {str(token): number for number, token in added if token.special}

    def spelled(self, text: str, typed: list[Extent]) -> list[Extent]:
        """Where the typed parts of a text spell a control token."""
        found = []
        for start, end in typed:
            for token in self.ids:
                at = text.find(token, start, end)
                while at >= 0:
                    found.append((at, at + len(token)))
                    at = text.find(token, at + 1, end)
        return found

    def ids_of(self, token: int, text: str, extent: Extent, spelled: list[Extent]) -> list[int]:
        """A token's id, or the ids of its text if it is a control token that somebody typed.

        Args:
            extent: where it is in the text; surrounding spaces may be included.
        """
        start, end = extent
        if token not in self.ids.values() or not any(start < last and first < end for first, last in spelled):
            return [token]
        return self._plain.encode(text[start:end], add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """A copy without control tokens: switching them off in the original would affect other threads using it."""
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy
