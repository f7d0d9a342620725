"""AIM's pruning inside the LLM against the authors' code: importance, kept sets, logits, decoding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2Model
from transformers.masking_utils import sdpa_mask

from mmllm.contract.types import LLMInputs
from mmllm.model.reduction.attention import attend, reducible
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.run import run_reduced
from mmllm.reducers.aim import AIM, falling, importance

SETTINGS = {"": {}, "_tau1": {"tau": 1.0}, "_iters1": {"iters": 1}, "_d015": {"damping": 0.15}}
NAMES = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "vocab_size", "theta")


@pytest.mark.golden("aim_importance", cases=r"(\w+)_q")
@pytest.mark.parametrize("setting", SETTINGS)
def test_importance(golden, case, setting):
    for q, k, wanted in zip(*(golden[f"{case}_{name}"] for name in ("q", "k", f"importance{setting}")), strict=True):
        found = importance(q, k, **SETTINGS[setting])
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def llm_of(golden) -> Qwen2Model:
    """The model of a file, in the library's class."""
    numbers = dict(zip(NAMES, golden["config"].tolist(), strict=True))
    config = Qwen2Config(
        num_hidden_layers=int(numbers["layers"]),
        hidden_size=int(numbers["hidden_size"]),
        intermediate_size=int(numbers["intermediate_size"]),
        num_attention_heads=int(numbers["heads"]),
        num_key_value_heads=int(numbers["kv_heads"]),
        vocab_size=int(numbers["vocab_size"]),
        rope_parameters={"rope_type": "default", "rope_theta": numbers["theta"]},
        rms_norm_eps=1e-6,
    )
    llm = Qwen2Model(config).eval()
    states = {name: golden[name] for name in ("embed_tokens.weight", "norm.weight")}
    for name, stacked in golden.under("layers.").items():
        states |= {f"layers.{number}.{name}": value for number, value in enumerate(stacked)}
    llm.load_state_dict(states)
    return llm


def inputs_of(golden) -> LLMInputs:
    """Embeddings and, for each row, where its visual block is; rows end where their text ends."""
    embeds, bounds = golden["inputs_embeds"], golden["bounds"]
    place = torch.arange(embeds.shape[1])[None]
    visual = (place >= bounds[:, :1]) & (place < bounds[:, 1:2])
    return LLMInputs(embeds, (place < bounds[:, 2:]).long(), None, visual)


def watched(llm: Qwen2Model) -> list[Tensor]:
    """The importance in every layer, noted while it runs: after pruned tokens were hidden or removed."""
    found: list[Tensor] = []

    def note(module, q, k, v, mask, answer=None, **kwargs):
        if answer is None and q.shape[2] > 1:
            hidden = torch.zeros(q.shape[0], k.shape[2], dtype=torch.bool)
            if mask is not None:
                hidden = ~mask[:, 0, -1]
            found.append(torch.stack([importance(*row[:2], ~row[2]) for row in zip(q, k, hidden, strict=True)]))
        return attend("sdpa", module, q, k, v, mask, answer=answer, **kwargs)

    AttentionInterface.register("watched", note)
    AttentionMaskInterface.register("watched", sdpa_mask)
    llm.config._attn_implementation = "watched"
    return found


def schedule_of(golden) -> AIM:
    """The schedule of a file by its two numbers, found among its rates."""
    rates = golden["keep_rate_after_layer"].tolist()
    l1 = next(number for number, rate in enumerate(rates) if rate < 1)
    l2 = l1 + round(1 / (1 - rates[l1]))
    assert falling(len(rates), l1, l2 - l1) == pytest.approx(rates, abs=1e-6)
    return AIM(l1=l1, l2=l2)


@pytest.mark.golden("aim_llm")
def test_off(golden):
    llm, inputs = llm_of(golden), inputs_of(golden)
    plain = llm(inputs_embeds=inputs.embeds, attention_mask=inputs.mask).last_hidden_state
    torch.testing.assert_close(plain @ golden["lm_head.weight"].T, golden["logits_off"], atol=1e-4, rtol=0)
    llm.config._attn_implementation = reducible("sdpa")
    everything = AIM(rates=(1.0,) * len(llm.layers))
    assert torch.equal(run_reduced(llm, inputs, everything).hidden, plain)


@pytest.mark.golden("aim_llm")
@pytest.mark.parametrize("mode", ["mask", "drop"])
def test_pruning(golden, mode):
    llm, inputs, reducer = llm_of(golden), inputs_of(golden), schedule_of(golden)
    noted, cache = watched(llm), ReducedCache()
    out = run_reduced(llm, inputs, reducer, cache, mode)
    kept = torch.stack([out.dropped > layer for layer in range(len(llm.layers))], dim=1)
    assert torch.equal(kept.long(), golden[f"{mode}_keep_after_layer"])
    wanted, before = golden[f"{mode}_importance"], torch.ones_like(kept[:, 0])
    for layer, found in enumerate(noted):
        theirs = wanted[:, layer]
        if mode == "drop":
            for row, (ours, alive) in enumerate(zip(found, before, strict=True)):
                torch.testing.assert_close(ours, theirs[row, alive], atol=1e-6, rtol=1e-4)
                assert (theirs[row, ~alive] == -1).all()
            before = kept[:, layer]
        else:
            torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-4)
    logits = out.hidden @ golden["lm_head.weight"].T
    theirs = golden[f"{mode}_logits"]
    there = ~theirs.isnan()
    torch.testing.assert_close(logits[there], theirs[there], atol=1e-4, rtol=0)
    if mode == "drop":
        assert torch.equal(there.all(-1), out.kept)
        lengths = torch.stack([real.sum(1) for real in cache.real], dim=1)
        assert torch.equal(lengths, golden["drop_cache_len"])
    _decode(
        golden, llm, cache, "drop_decode" if mode == "drop" else "decode", partial(run_reduced, llm, reducer=reducer)
    )


def _decode(golden, llm: Qwen2Model, cache: ReducedCache, name: str, run) -> None:
    """The reference's tokens, one after the other."""
    tokens, wanted = golden[f"{name}_tokens"], golden[f"{name}_logits"]
    for step in range(tokens.shape[1]):
        embeds = golden["embed_tokens.weight"][tokens[:, step : step + 1]]
        inputs = LLMInputs(embeds, None, None, torch.zeros(embeds.shape[:2], dtype=torch.bool))
        logits = run(inputs, cache=cache).hidden[:, -1] @ golden["lm_head.weight"].T
        torch.testing.assert_close(logits, wanted[:, step], atol=1e-4, rtol=0)
