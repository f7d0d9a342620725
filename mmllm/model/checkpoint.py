"""Weights of a model folder into a model, exactly or not at all; a digest of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import tensor_bytes
from mmllm.model.folder import check_model_folder, model_folder

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration


def load_weights(
    model: MMLLMForConditionalGeneration, path: str | Path, modules: list[nn.Module] | None = None
) -> None:
    """Load the weights of another run into a model of the same recipe, or into some of its modules.

    Raises:
        UserError: they do not fit; lists missing, unexpected and mismatched keys.
    """
    folder = model_folder(path)
    check_model_folder(folder, needed=("config.json",))
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    own = model.state_dict()
    if modules is not None:
        inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is one for one in modules))
        own, state = ({key: side[key] for key in side if key.startswith(inside)} for side in (own, state))
        if not own:
            raise UserError(folder, f"nothing to take: {' and '.join(inside)} has no weights")
    tied = set(model.all_tied_weights_keys or {})
    mismatched = [
        (key, state[key].shape, own[key].shape) for key in own if key in state and state[key].shape != own[key].shape
    ]
    info = {
        "missing_keys": [key for key in own if key not in state and key not in tied],
        "unexpected_keys": [key for key in state if key not in own],
        "mismatched_keys": mismatched,
    }
    refuse_holes(folder, info)
    model.load_state_dict(state, strict=False)


def refuse_holes(folder: Path, info: dict[str, Any]) -> None:
    """Refuse weights that are not exactly the model's.

    Args:
        folder: they come from, for the error.
        info: `missing_keys`, `unexpected_keys` and `mismatched_keys`, as the library's loading reports them.

    Raises:
        UserError: lists the keys.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else _shapes(*key) for key in info[kind])
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{len(keys)} {kind.split('_')[0]}: {', '.join(keys[:4])}{more}")
    if problems:
        raise UserError(folder, "checkpoint of another recipe; " + "; ".join(problems))


def _shapes(key: str, found: Sequence[int], own: Sequence[int]) -> str:
    return f"{key} is {list(found)}, expected {list(own)}"


def weights_digest(model: MMLLMForConditionalGeneration) -> str:
    """A short digest of all weights and buffers, so that answers of two models are never mixed."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()[:16]
