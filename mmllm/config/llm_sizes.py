"""Sizes in the config of an LLM: which are possible."""

from __future__ import annotations

from typing import Any

from mmllm.contract.errors import UserError, shown

MOST = {"layers": 1000, "heads": 2**16, "_size": 2**24, "head_dim": 2**16, "experts": 2**16}
"""The upper bound of a size in an LLM's config, by the suffix of its key."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
"""Sizes that every LLM needs; others (of shared experts, say) may be 0."""


def check_sizes(values: dict[str, Any], where: str) -> None:
    """Refuse sizes that no LLM has, before anything is built from them.

    Raises:
        UserError: names the key.
    """
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((most for name, most in MOST.items() if key.endswith(name)), 2**31)
        least = 1 if key in NEEDED else 0 if key.endswith(tuple(MOST)) else -(2**31)
        if not least <= value <= most:
            raise UserError(f"{where}.{key}", "out of range", expected=f">= {least} and <= {most}", got=shown(value))
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        what = f"{shared} does not divide the {heads} heads of attention"
        raise UserError(f"{where}.num_key_value_heads", what, hint=f"num_key_value_heads={heads}")
