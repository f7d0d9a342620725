"""Tokens that we add to an LLM's tokenizer: a placeholder for each kind of media, and coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError
from mmllm.contract.grounding import Coordinates
from mmllm.processing.content import PLACEHOLDERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_placeholders(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Add the placeholders that it lacks; returns the ids of all of them."""
    missing = [token for token in PLACEHOLDERS.values() if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return {tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS.values()}


def add_coordinates(tokenizer: PreTrainedTokenizerBase, layout: Coordinates) -> None:
    """Add the tokens of the coordinates that it lacks, as ordinary ones: decoding without special tokens keeps them.

    Raises:
        UserError: their ids are not those of the layout.
    """
    from tokenizers import AddedToken

    tokens, known = list(layout.tokens()), tokenizer.get_vocab()
    missing = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in known]
    if missing:
        tokenizer.add_tokens(missing)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if ids != list(range(layout.first, layout.first + len(layout))):
        where, got = "model.vocabulary.first", f"{tokens[0]} is {ids[0]} in this tokenizer"
        raise UserError(where, "not the tokenizer's ids", expected=layout.first, got=got, hint=f"{where}={ids[0]}")


def first_free_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that a first coordinate has or will get, behind the placeholders; the placeholders are added."""
    add_placeholders(tokenizer)
    return tokenizer.get_vocab().get(Coordinates.token("time", 0), len(tokenizer))
