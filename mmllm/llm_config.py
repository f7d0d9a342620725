"""Sizes in the config of an LLM: which are possible at all."""

from __future__ import annotations

from typing import Any

from mmllm.contract.errors import UserError, shown

MOST = {"layers": 1000, "heads": 2**16, "_size": 2**24, "head_dim": 2**16, "experts": 2**16}
"""The largest size of an LLM's config, by how its key ends; the smallest is 1."""


def check_sizes(values: dict[str, Any], where: str) -> None:
    """Refuse sizes that no LLM has, before anything is made of them.

    Raises:
        UserError: names the key.
    """
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((most for name, most in MOST.items() if key.endswith(name)), 2**31)
        least = 1 if key.endswith(tuple(MOST)) else -(2**31)
        if not least <= value <= most:
            raise UserError(f"{where}.{key}", "out of range", expected=f">= {least} and <= {most}", got=shown(value))
