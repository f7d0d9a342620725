"""Weights of the library's LLaVA-like models in ours, to compare the two."""

from __future__ import annotations

from torch import nn

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Sizes of a tower or an LLM in such a comparison."""


def copy_weights(ours: nn.Module, theirs: nn.Module, encoder: str) -> None:
    """Tower, two-layer projector, LLM and head of a LLaVA-like model of the library into ours."""
    front = ours.model.front_end
    tower = {k.removeprefix("vision_model."): v for k, v in theirs.model.vision_tower.state_dict().items()}
    own = {k.removeprefix("vision_model."): k for k in front.bank.encoders[encoder].tower.state_dict()}
    front.bank.encoders[encoder].tower.load_state_dict({own[key]: value for key, value in tower.items()})
    projector = theirs.model.multi_modal_projector
    front.parts["mlp"].layers[0].load_state_dict(projector.linear_1.state_dict())
    front.parts["mlp"].layers[2].load_state_dict(projector.linear_2.state_dict())
    ours.model.language_model.load_state_dict(theirs.model.language_model.state_dict())
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
