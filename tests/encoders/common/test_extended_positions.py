"""Text towers whose positions are stretched, for longer prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    SiglipTextConfig,
    SiglipTextModel,
)

from mmllm.contract.parts import Site
from mmllm.contract.registry import find
from mmllm.contract.types import Needs
from mmllm.encoders.common.extended_positions import extend_positions, extend_tower

CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
TEXT = {**CLIP, "vocab_size": 50, "max_position_embeddings": 30, "eos_token_id": 49, "bos_token_id": 48}


@pytest.mark.parametrize(
    ("kind", "model", "config"),
    [
        ("clip_text", CLIPTextModelWithProjection, CLIPTextConfig),
        ("siglip_text", SiglipTextModel, SiglipTextConfig),
    ],
)
@torch.no_grad()
def test_weights_of_a_shorter_tower_are_stretched_where_they_are_loaded(kind, model, config, tmp_path):
    torch.manual_seed(0)
    original = model(config(**TEXT)).eval()
    original.save_pretrained(tmp_path)
    source = find("text", kind)(Site(), name=str(tmp_path), config=TEXT, extended=True).eval()
    source.load_weights()
    assert source.positions == 20 + 4 * 10
    table = next(value for name, value in original.state_dict().items() if name.endswith("position_embedding.weight"))
    ours = next(value for name, value in source.state_dict().items() if name.endswith("position_embedding.weight"))
    assert torch.equal(ours, extend_positions(table))
    ids = torch.zeros(2, source.positions, dtype=torch.long)
    ids[0], ids[1, :4] = torch.tensor([48, *range(1, 48), *range(1, 12), 49]), torch.tensor([48, 1, 2, 49])
    found = source(ids, torch.ones_like(ids), Needs(prompt=("tokens", "pooled")))
    assert found.tokens.isfinite().all() and found.pooled.shape[0] == 2
    if kind == "clip_text":  # rows that were kept, and a causal tower: a short prompt is what it was
        short = original(input_ids=torch.tensor([[48, 1, 2, 49]]))
        torch.testing.assert_close(found.pooled[1:], short.text_embeds, atol=1e-5, rtol=0)


def test_stretched_positions():
    table = torch.randn(77, 6)
    longer = extend_positions(table)
    assert longer.shape == (4 * 77 - 60, 6)
    assert torch.equal(longer[:20], table[:20])
    torch.testing.assert_close(longer[20::4], table[20:])
    start, step = torch.randn(6), torch.randn(6)
    line = extend_positions(start + torch.arange(64.0)[:, None] * step)
    places = torch.cat([torch.arange(20.0), 20 + torch.arange(4.0 * 44) / 4])
    torch.testing.assert_close(line, start + places[:, None] * step, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="nothing to stretch"):
        extend_positions(table[:21])


def test_a_stretched_tower_reads_short_prompts_as_before_and_long_ones_too():
    torch.manual_seed(0)
    tower = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=8)).eval()
    ids = torch.randint(0, 48, (2, 20))
    ids[:, -1] = 49
    before = tower(input_ids=ids).text_embeds
    extend_tower(tower)
    torch.testing.assert_close(tower(input_ids=ids).text_embeds, before)
    longer = torch.cat([ids[:, :-1].repeat(1, 3), ids[:, -1:]], dim=1)  # 58 tokens, of 30 that it had
    other = longer.clone()
    other[:, 45] = (other[:, 45] + 1) % 48
    said = tower(input_ids=longer).text_embeds
    assert (said - tower(input_ids=other).text_embeds).abs().max() > 1e-4
    said.sum().backward()
    rows = tower.text_model.embeddings.position_embedding.weight.grad
    assert rows.shape[0] == 60
    assert not rows[:20].any()
    assert rows[20:58].any(1).all()
