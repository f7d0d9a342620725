"""Weights of the library's LLaVA-like models in ours, to compare the two."""

from __future__ import annotations

from torch import nn

from mmllm.model.foreign.convert import FAMILIES, renamed

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Sizes of a tower or an LLM in such a comparison."""


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Everything, by the converter's own names."""
    names = FAMILIES[theirs.config.model_type].names(ours.config.model_section)
    ours.load_state_dict(renamed(theirs.state_dict(), names, set(ours.state_dict())))
