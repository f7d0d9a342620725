"""Multiply-adds by arithmetic against those that really run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config, Qwen2Model

from mmllm.checks.flops import LLMCost, Sizes, entering
from mmllm.cli import main
from mmllm.contract.types import LLMInputs
from mmllm.model.reduction.attention import reducible
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.run import run_reduced
from mmllm.reducers.aim import AIM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


class ByContent(AIM):
    """Chooses without multiplying anything."""

    def score(self, q, k, visual, voting):
        return k.float().abs().sum((0, 2))


@pytest.mark.parametrize("rates", [(1.0,) * 5, (1.0, 0.5, 0.25, 0.0, 0.0)])
@torch.no_grad()
def test_prefill_and_decoding_are_what_runs(rates):
    config = Qwen2Config(**SMALL)
    llm, reducer = Qwen2Model(config).eval(), ByContent(rates=rates)
    llm.config._attn_implementation = reducible("eager")  # the library's counter does not see every fused kernel
    visual, text = 40, 12
    seen = (torch.arange(visual + text)[None] >= 6) & (torch.arange(visual + text)[None] < 6 + visual)
    inputs = LLMInputs(torch.randn(1, visual + text, 32), torch.ones(1, visual + text, dtype=torch.long), None, seen)
    cost, schedule, cache = LLMCost(config), reducer.schedule(5), ReducedCache()
    read = entering(schedule, visual, text)
    passed = [count + text for count in schedule.counts(visual, text)]
    with FlopCounterMode(display=False) as counter:
        run_reduced(llm, inputs, reducer, cache)
    assert counter.get_total_flops() // 2 == pytest.approx(cost.prefill(read, passed), rel=1e-9)
    assert [layer.keys.shape[2] for layer in cache.layers] == read
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            one = LLMInputs(torch.randn(1, 1, 32), None, None, torch.zeros(1, 1, dtype=torch.bool))
            run_reduced(llm, one, reducer, cache)
    head = 3 * SMALL["hidden_size"] * SMALL["vocab_size"]
    assert counter.get_total_flops() // 2 + head == pytest.approx(cost.decoding(read, 3), rel=1e-9)


def test_sizes_are_read_from_any_config():
    assert Sizes.of(LlamaConfig(**SMALL)) == Sizes(32, 48, 4, 2, 5, 50)


def test_a_table_of_settings(capsys):
    words = ["flops", "nano/llava", "--reduce", "none", "--reduce", "random", "--reduce", "aim", "--keep", "0.5"]
    assert main([*words, "--json"]) == 0
    none, random, aim = json.loads(capsys.readouterr().out)["costs"]
    assert (none["first"], random["first"], none["tower"]) == (72, 36, aim["tower"])
    assert aim["prefill"] < none["prefill"] and aim["mean"] <= 36.5
    assert main(["flops", "nano/llava_onevision_video", "--reduce", "pixels", "--keep", "0.25", "--json"]) == 0
    (pixels,) = json.loads(capsys.readouterr().out)["costs"]
    assert main(["flops", "nano/llava_onevision_video", "--json"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)["costs"]
    assert pixels["tower"] == whole["tower"] // 9 and pixels["connector"] == whole["connector"] // 9  # 2 of 6 a side
    assert whole["first"] == 73 and pixels["first"] == 9  # 3 of 6 would be 33, more than a quarter
    assert main(words) == 0
    assert "visual tokens first/mean/last layer" in capsys.readouterr().out
    assert main(["flops", "nano/llava", "--reduce", "fastv", "--keep", "0.1"]) == 2
    assert "2 of 3 layers read everything" in capsys.readouterr().err
