"""Attention that shows a layer's queries and keys, on top of whatever implementation the LLM uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "reducible_"
Look = Callable[[Tensor, Tensor, Tensor], None]
"""Called with queries [B, H, n, d], keys [B, H', n, d] and the attention's result [B, n, H, d]."""


class Shown(Exception):
    """Ends a layer before its output projection, with what it has computed: most of its rows may not be needed."""

    def __init__(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        super().__init__("raised and caught by run_reduced")
        self.q, self.k, self.out = q, k, out


def stop(q: Tensor, k: Tensor, out: Tensor) -> None:
    """A `look` that ends the layer."""
    raise Shown(q, k, out)


def attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    look: Look | None = None,
    answer: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of `base`; shown to `look`, or replaced by an `answer` [B, n, H, d] that is known already."""
    if answer is not None:
        return answer, None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    out = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, query, key, value, mask, **kwargs)
    if look is not None:
        look(query, key, out[0])
    return out


def reducible(base: str) -> str:
    """The name under which the attention `base` shows what it computes; registered when first asked for."""
    if base.startswith(PREFIX):
        return base
    name = PREFIX + base
    AttentionInterface.register(name, partial(attend, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name
