"""Options of a call to the processor: how media are sampled, and how the batch is laid out."""

from __future__ import annotations

from typing import Any, Literal

from mmllm.contract.arguments import Count, Positive, parse
from mmllm.contract.errors import UserError, nearest
from mmllm.processing.content import SPELLINGS

SAMPLING = {
    "frames": Count | None,
    "fps": Positive | None,
    "sampler": str | None,
    "max_frames": Count | None,
}
OPTIONS = {
    **SAMPLING,
    "padding_side": Literal["left", "right"],
    "padding": Literal[True, False, "longest"],  # a batch is always padded to its longest row
    "return_tensors": Literal["pt"],
}
"""The options of a call, and their types."""


def read_options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the processor by name, None where absent; the rest) of keyword arguments.

    Raises:
        UserError: a value of a wrong type, or an option given twice under two spellings.
    """
    options: dict[str, Any] = dict.fromkeys(OPTIONS)
    rest = {}
    for key, value in given.items():
        name = SPELLINGS.get(key, key)
        if name not in OPTIONS:
            rest[key] = value
        elif value is not None:
            if options[name] is not None:
                raise UserError(f"processor: {key}", f"given twice, also as {name}")
            options[name] = parse(value, OPTIONS[name], f"processor: {key}")
    return options, rest


def refuse_unknown(names: list[str], where: str) -> None:
    """Raise if there are any; the message suggests the nearest known name."""
    for name in names:
        raise UserError(f"{where}: {name}", "unknown argument", hint=nearest(name, [*OPTIONS, *SPELLINGS]))
