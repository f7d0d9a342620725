"""Fewer visual tokens in our models: off is off, and however it is computed, the same tokens are kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.tiny import conversations, tiny_model, tiny_processor, tiny_recipe
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

import mmllm
from mmllm.api import stream_answer
from mmllm.contract.errors import UserError
from mmllm.contract.registry import parts, register
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.llm import check_llm
from mmllm.model.reduction.run import CACHE, run_reduced
from mmllm.reducers.aim import AIM, importance, uniform

PROMPT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYERS = 6


@register("reducer", "by_content")
class ByContent(AIM):
    """Keeps the tokens whose own keys are largest, whatever else is in the row: a choice that can be repeated."""

    def score(self, q: Tensor, k: Tensor, visual: Tensor, voting: Tensor) -> Tensor:
        return k.float().norm(dim=-1).sum(0)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def pair(request):
    """(model, processor) with enough layers to have a schedule."""
    recipe = tiny_recipe(llm=request.param, overrides=("model.encoders.nano.size=64", "model.encoders.nano.grid=4,4"))
    recipe.model["llm"]["config"]["num_hidden_layers"] = LAYERS
    return tiny_model(recipe), tiny_processor(recipe)


@pytest.fixture(autouse=True)
def _off(request):
    """Every test begins with all tokens."""
    if "pair" in request.fixturenames:
        mmllm.reduce(request.getfixturevalue("pair")[0], None)


def batched(processor, messages, side: str = "left"):
    """The batch of some conversations, padded on one side."""
    return processor.apply_chat_template(messages, **PROMPT, processor_kwargs={"padding_side": side})


def reducers() -> list[str]:
    """Every shipped reducer that asks nothing of the tower."""
    return sorted(name for name, cls in parts("reducer").items() if name != "by_content" and not cls.cls_attention)


@pytest.mark.parametrize("name", reducers())
@torch.no_grad()
def test_everything_kept_is_the_plain_model_to_the_bit(pair, name):
    model, processor = pair
    batch = batched(processor, conversations())
    plain, said = model(**batch).logits, model.generate(**copy.deepcopy(batch), **GREEDY)
    mmllm.reduce(model, name, keep=1)
    assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.generate(**copy.deepcopy(batch), **GREEDY), said)
    mmllm.reduce(model, name, keep=0.5)
    assert not torch.equal(model(**batch).logits, plain)
    mmllm.reduce(model, None)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", reducers())
@torch.no_grad()
def test_text_alone_is_never_touched(pair, name):
    model, processor = pair
    batch = batched(processor, conversations()[:1])
    plain = model(**batch).logits
    mmllm.reduce(model, name, keep=0.5)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.4])
@pytest.mark.parametrize("name", reducers())
@torch.no_grad()
def test_the_budget_is_kept(pair, name, keep):
    model, processor = pair
    batch = batched(processor, conversations()[3:])
    mmllm.reduce(model, name, keep=keep)
    model(**batch)
    visual = 4 * 16
    found = model.model.reduction.last
    spent = torch.stack(found.entering).float().mean() / visual
    # no more than asked, up to the rounding of one layer's count; pooling cannot hit every number
    assert spent <= keep + 1 / visual
    assert spent >= keep - (0.35 if name in ("pool", "pixels") else 2 / visual)
    text = batch["attention_mask"].bool() & ~model.embed(batch).visual
    assert (found.kept | ~text).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*reducers(), "by_content"])
@torch.no_grad()
def test_batch_is_single(pair, name, side):
    """Padding has no vote, and every row its own counts."""
    model, processor = pair
    mmllm.reduce(model, name, keep=0.5)
    batch = batched(processor, conversations(), side)
    together = model(**batch).logits
    kept = model.model.reduction.last.kept
    for row, messages in enumerate(conversations()):
        alone = model(**batched(processor, [messages], side)).logits[0]
        real = batch["attention_mask"][row].bool()
        there = kept[row][real]
        torch.testing.assert_close(together[row][real][there], alone[there], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["random", "pool", "merge", "by_content"])
@torch.no_grad()
def test_cached_decoding_is_recomputation(pair, name):
    model, processor = pair
    mmllm.reduce(model, name, keep=0.5)
    batch = batched(processor, conversations())
    cached = model.generate(**copy.deepcopy(batch), **GREEDY)
    assert torch.equal(model.generate(**copy.deepcopy(batch), **GREEDY, use_cache=False), cached)


@pytest.mark.parametrize("name", ["aim", "fastv"])
@torch.no_grad()
def test_rows_of_a_batch_say_what_they_say_alone(pair, name):
    model, processor = pair
    mmllm.reduce(model, name, keep=0.5)
    batch = batched(processor, conversations())
    together = model.generate(**copy.deepcopy(batch), **GREEDY)[:, batch["input_ids"].shape[1] :]
    beams = model.generate(**copy.deepcopy(batch), **GREEDY, num_beams=3)[:, batch["input_ids"].shape[1] :]
    for row, messages in enumerate(conversations()):
        single = batched(processor, [messages])
        start = single["input_ids"].shape[1]
        assert torch.equal(model.generate(**copy.deepcopy(single), **GREEDY)[0, start:], together[row])
        assert torch.equal(model.generate(**copy.deepcopy(single), **GREEDY, num_beams=3)[0, start:], beams[row])


@torch.no_grad()
def test_streaming_says_the_same(pair):
    model, processor = pair
    mmllm.reduce(model, "aim", keep=0.5)
    batch = batched(processor, conversations()[3:])
    ids = model.generate(**copy.deepcopy(batch), max_new_tokens=8, do_sample=False)
    streamed = "".join(stream_answer(model, processor, batch, max_new_tokens=8))
    said = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert streamed.strip() == said.strip()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_dropped_is_masked_on_what_survives(pair, attention):
    """Kept sets forced equal; positions keep their gaps."""
    model, processor = pair
    llm = model.model.language_model
    llm.set_attn_implementation(attention)
    mmllm.reduce(model, {"type": "by_content", "l1": 1, "l2": 4})
    reducer = model.model.reduction.reducer
    inputs = model.embed(batched(processor, conversations()))
    caches = {mode: ReducedCache() for mode in ("drop", "mask")}
    dropped, masked = (run_reduced(llm, inputs, reducer, cache, mode) for mode, cache in caches.items())
    assert torch.equal(dropped.dropped, masked.dropped)
    torch.testing.assert_close(dropped.hidden[dropped.kept], masked.hidden[dropped.kept], atol=3e-5, rtol=0)
    assert caches["drop"].bytes() < caches["mask"].bytes()
    after = model.embed({"input_ids": torch.tensor([[7], [8], [9], [10]])})
    position = inputs.mask.sum(1, keepdim=True)
    after = replace(after, mask=torch.cat([inputs.mask, inputs.mask.new_ones(4, 1)], 1), positions=position)
    ours, theirs = (run_reduced(llm, after, reducer, cache).hidden for cache in caches.values())
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
    mmllm.reduce(model, None)
    llm.set_attn_implementation("sdpa")


@torch.no_grad()
def test_layers_of_the_cache_have_the_lengths_of_the_schedule(pair):
    model, processor = pair
    mmllm.reduce(model, {"type": "aim", "l1": 2, "l2": 4})
    batch = batched(processor, conversations()[3:])
    output = model(**batch, use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    length, visual = batch["input_ids"].shape[1], 64
    # everything into layers 0, 1 and 2; half after it; nothing after the next
    assert [layer.keys.shape[2] for layer in cache.layers] == [length] * 3 + [length - visual // 2] + [
        length - visual
    ] * 2
    assert cache.get_seq_length() == length
    model(torch.tensor([[7]]), torch.ones(1, length + 1), torch.tensor([[length]]), **{CACHE: cache})
    assert cache.get_seq_length() == length + 1


def test_gradients_reach_what_is_kept(pair):
    model, processor = pair
    mmllm.reduce(model, "aim", keep=0.5)
    inputs = model.embed(batched(processor, conversations(), "right"))
    embeds = inputs.embeds.detach().requires_grad_()
    hidden, kept = model.run(replace(inputs, embeds=embeds))
    assert (hidden[~kept] == 0).all()
    hidden.square().sum().backward()
    reached = embeds.grad.abs().sum(-1) > 0
    entered = model.model.reduction.last.dropped >= 0
    assert torch.equal(reached, inputs.mask.bool() & (entered | reached))
    model.gradient_checkpointing_enable()
    model.train()
    again = inputs.embeds.detach().requires_grad_()
    hidden, _ = model.run(replace(inputs, embeds=again))
    hidden.square().sum().backward()
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(again.grad, embeds.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_needle_at_the_end_survives_with_debias(pair):
    """All visual tokens alike: votes flow to the front, so that without `debias` the last frames go first."""
    model, processor = pair
    inputs = model.embed(batched(processor, conversations()[3:]))
    place = inputs.visual[0].nonzero()[:, 0]
    embeds = inputs.embeds.clone()
    embeds[0, place] = embeds[0, place].mean(0)
    late, last = {}, place[-len(place) // 4 :]
    for debias in (False, True):
        reducer = AIM(l1=1, l2=3, debias=debias, iters=5)
        found = run_reduced(_reducible(model), replace(inputs, embeds=embeds), reducer)
        late[debias] = (found.dropped[0, last] > 1).float().mean()
    assert late[True] > late[False]


def test_votes_without_preference_flow_to_the_front():
    """Spec section 7: uniform attention over 1,668 tokens, 1,568 of them visual in 32 frames."""
    blank = torch.zeros(1, 1668, 8)
    found = importance(blank, blank)
    assert (found.diff() < 0).all()
    visual = found[50:1618] / found[50:1618].sum()
    assert visual[: 1568 // 32].sum() > 0.5
    assert visual[-1568 // 4 :].sum() < 1e-4
    torch.testing.assert_close(found / uniform(1668, 5).float(), torch.ones(1668), atol=1e-3, rtol=0)


def _reducible(model):
    mmllm.reduce(model, "aim", keep=0.5)
    return model.model.language_model


def test_bad_settings_say_what_is_possible(pair):
    model, _ = pair
    for arguments, said in (
        (("aimm", 0.5), "no reducer is called 'aimm'"),
        (("aim",), "no budget"),
        (({"type": "aim", "keep": 0.1, "merge": 1.0},), "keeps at least 0.167"),
        (("fastv", 0.1), "2 of 6 layers read everything"),
        (("random", 1.5), "1.5"),
        (({"type": "aim", "l1": 4, "l2": 2},), "l1 is below l2"),
        (({"type": "aim", "rates": [1.0, 0.5]},), "the LLM has 6 layers"),
    ):
        with pytest.raises(UserError, match=said.replace("(", r"\(")):
            mmllm.reduce(model, *arguments)
        assert model.model.reduction is None


class Scaled(Qwen2Model):
    """An LLM that scales its inputs before the layers."""

    def forward(self, inputs_embeds=None, **kwargs):
        return super().forward(inputs_embeds=inputs_embeds * 3, **kwargs)


def test_an_llm_that_does_more_than_its_layers_is_refused():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    check_llm(Qwen2Model(Qwen2Config(**sizes)))
    windows = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(UserError, match="only a window"):
        check_llm(Qwen2Model(windows))
    config = Qwen2Config(**sizes)
    scaled = Scaled(config)
    with torch.no_grad():
        scaled.embed_tokens.weight.normal_()
    with pytest.raises(UserError, match="does more than call its layers"):
        check_llm(scaled)


def test_a_reducer_that_cannot_be_switched_on_leaves_the_other(pair):
    model, _ = pair
    mmllm.reduce(model, "random", keep=0.5)
    with pytest.raises(UserError):
        mmllm.reduce(model, "fastv", keep=0.1)
    assert model.reduction.section == {"type": "random", "keep": 0.5}
