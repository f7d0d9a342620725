"""Branches of a shared prefix against rows of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, LlamaConfig, Qwen2Config, Qwen3Config

from mmllm.contract.types import LLMInputs
from mmllm.model.branches import branch_mask, split, takes_masks

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}


def inputs() -> LLMInputs:
    torch.manual_seed(0)
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [0] * 2 + [1] * 4 + [2] * 2 + [-1] * 4])
    positions = torch.tensor([[*range(8), *range(5, 9)], [*range(6), 2, 3, 0, 0, 0, 0]])
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 1:3] = True
    return LLMInputs(torch.randn(2, 12, 32), (segments >= 0).long(), positions, visual, segments)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_mask_gives_what_rows_of_their_own_give(config, attention):
    llm = AutoModel.from_config(config(**SIZES), attn_implementation=attention).eval()
    given = inputs()
    assert takes_masks(llm.config)
    mask = branch_mask(given.segments, llm.config, given.embeds.dtype)
    embeds = given.embeds.clone().requires_grad_()
    masked = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=given.positions).last_hidden_state
    own = given.embeds.clone().requires_grad_()
    rows, where = split(replace(given, embeds=own))
    assert rows.embeds.shape == (4, 9, 32)
    apart = llm(inputs_embeds=rows.embeds, attention_mask=rows.mask, position_ids=rows.positions).last_hidden_state
    apart = apart.flatten(0, 1)[where]
    real = given.segments >= 0
    torch.testing.assert_close(masked[real], apart[real], atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 12, 32) * (given.segments > 0)[..., None]
    (masked * weights).sum().backward()
    (apart * weights).sum().backward()
    torch.testing.assert_close(embeds.grad, own.grad, atol=1e-5, rtol=1e-4)


def test_branches_do_not_see_each_other():
    llm = AutoModel.from_config(LlamaConfig(**SIZES)).eval()
    given = inputs()
    mask = branch_mask(given.segments, llm.config, given.embeds.dtype)
    changed = given.embeds.clone()
    changed[0, 5:8] = 0  # the first branch
    first, second = (
        llm(inputs_embeds=embeds, attention_mask=mask, position_ids=given.positions).last_hidden_state
        for embeds in (given.embeds, changed)
    )
    assert torch.equal(first[0, :5], second[0, :5])
    assert torch.equal(first[0, 8:], second[0, 8:])
    assert not torch.allclose(first[0, 5:8], second[0, 5:8])


def test_a_sliding_window_takes_no_mask():
    kinds = ["full_attention", "sliding_attention"]
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    assert not takes_masks(AutoModel.from_config(config).config)
