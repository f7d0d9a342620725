"""Towers from libraries that know nothing of transformers: how their weights survive it.

transformers re-initialises every Linear, Conv and LayerNorm that is not marked as initialised, and it builds a model
on the meta device before it loads a checkpoint. So a tower that was built with memory is marked as initialised; one
that was built on the meta device gets whatever the checkpoint lacks (above all tables that are never saved) from a
fresh tower.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType


def library(name: str, package: str) -> ModuleType:
    """Import an optional library.

    Args:
        name: module.
        package: the package that provides it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(name, "not installed, and this tower needs it", hint=f"pip install {package}") from error


def mark_initialized(tower: nn.Module) -> nn.Module:
    """Mark a fresh tower, so that the library leaves its values alone where it has any."""
    tower.in_memory = not any(tensor.is_meta for tensor in _tensors(tower).values())
    if tower.in_memory:
        for module in tower.modules():
            module._is_hf_initialized = True
    return tower


def write_missing(tower: nn.Module, create: Callable[[], nn.Module]) -> None:
    """Fill in what no checkpoint brought to a tower that was built on the meta device.

    Args:
        create: builds such a tower on the current default device.
    """
    from transformers import initialization as init

    tensors = _tensors(tower)
    missing = {name: value for name, value in tensors.items() if not getattr(value, "_is_hf_initialized", False)}
    if tower.in_memory or not missing or any(value.is_meta for value in missing.values()):
        return
    # Usually only tables are missing: then the fresh tower needs no memory for weights.
    tables = not missing.keys() & tower.state_dict().keys()
    with torch.device(next(iter(missing.values())).device), _without_parameters() if tables else nullcontext():
        fresh = _tensors(create())
    for name, value in missing.items():
        init.copy_(value, fresh[name])


def load_states(tower: nn.Module, states: dict[str, Tensor], where: str) -> None:
    """Load weights into a tower, all of them.

    Raises:
        UserError: some are missing, left over or of another size.
    """
    own = tower.state_dict()
    for key in {**own, **states}:
        sizes = [list(side[key].shape) if key in side else "nothing" for side in (own, states)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{where}:{key}", "differs from the recipe", expected=sizes[0], got=sizes[1])
    tower.load_state_dict(states)


def _tensors(tower: nn.Module) -> dict[str, Tensor]:
    return {**dict(tower.named_parameters()), **dict(tower.named_buffers())}


def _without_parameters() -> Any:
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)
