"""Which reducer is meant: by name and budget, by file, or as a section."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmllm.contract.arguments import bind
from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError, shown
from mmllm.contract.reducer import Reducer
from mmllm.contract.registry import find

Setting = str | Path | dict[str, Any] | None
"""A reducer by name, by file, or as a section `{type: ..., arguments}`; None = off."""


def build_reducer(section: dict[str, Any]) -> Reducer:
    """A reducer from `{type: ..., arguments}`.

    Raises:
        UserError: no such reducer, or its arguments do not fit.
    """
    name = section.get("type")
    cls = find("reducer", name, "reduce")
    arguments = bind(cls, {key: value for key, value in section.items() if key != "type"}, f"reduce.{name}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"reduce.{name}", str(error)) from error


def read_setting(reduce: Setting, keep: float | None = None) -> dict[str, Any] | None:
    """The section that a setting stands for, or None for `none`.

    Args:
        keep: the budget, beside a name; a file or a section has its own.

    Raises:
        UserError: an unreadable file, or a budget given twice or not at all.
    """
    if reduce is None or reduce == "none":
        return None
    if isinstance(reduce, dict):
        section = dict(reduce)
    elif isinstance(reduce, Path) or Path(reduce).suffix in (".yaml", ".yml"):
        section = read_yaml(Path(reduce))
        if not isinstance(section, dict) or "type" not in section:
            raise UserError(reduce, "no reducer", expected="{type: aim, ...}", got=shown(section))
    elif isinstance(reduce, str):
        if keep is None:
            raise UserError(f"reduce {reduce}", "no budget", hint="keep=0.5 (of the visual tokens, over the layers)")
        section = {"type": reduce}
    else:
        raise UserError("reduce", "wrong type", expected="a name, a file or a dict", got=shown(reduce))
    if keep is not None:
        if "keep" in section:
            raise UserError("keep", "given twice", got=keep)
        section["keep"] = keep
    return section


def label(section: dict[str, Any] | None) -> str:
    """A short name of a setting, for tables and folders: `aim-0.5`, or with a digest where it says more."""
    if section is None:
        return "none"
    if set(section) == {"type", "keep"}:
        return f"{section['type']}-{section['keep']:g}"
    text = json.dumps(section, sort_keys=True)
    return f"{section['type']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
