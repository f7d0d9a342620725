"""BridgeTower in front of an LLM: the part `bridge`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmllm.connectors.bridgetower.connector import Bridge
from mmllm.connectors.bridgetower.cross_modal import masked_mean
from mmllm.connectors.common.pool import Pool
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens

CLIP = TokenSpec(MediaSpec("video", 3), 12, 10, Grid(3, 2, 2), {"hidden_states": (12, 2, 10)})
SMALL = {"width": 8, "heads": 2, "std": 0.4}


def bridge(plain: TokenSpec | None = None, **arguments) -> Bridge:
    """A bridge over a clip of three frames of 2 x 2 tokens."""
    torch.manual_seed(4)
    inputs = (CLIP,) if plain is None else (CLIP, plain)
    return Bridge(Site(inputs, 16, 6), **{**SMALL, **arguments}).eval()


def clips(count: int = 2, width: int = 10, seed: int = 5, levels: int = 2) -> VisualTokens:
    """Tokens with the layers of their encoder."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 12, width, generator=generator)
    tokens = at_times(frame_tokens(values, CLIP.media, CLIP.grid, 3), torch.arange(3.0).expand(count, -1))
    tokens.extras["hidden_states"] = torch.randn(count, 12, levels, width, generator=generator)
    return tokens


def prompts(count: int = 2, seed: int = 6, absent: tuple[int, ...] = ()) -> PromptFeatures:
    """Questions of five and fewer words; an absent one has one word unmasked."""
    generator = torch.Generator().manual_seed(seed)
    levels, mask = torch.randn(count, 5, 2, 6, generator=generator), torch.ones(count, 5, dtype=torch.long)
    mask[0, 3:] = 0
    present = torch.ones(count, dtype=torch.bool)
    for row in absent:
        mask[row, 1:], present[row] = 0, False
    return PromptFeatures(torch.zeros(count, 5, dtype=torch.long), mask, hidden_states=levels, present=present)


@torch.no_grad()
def test_a_fresh_bridge_is_the_plain_branch():
    seen, plain = clips(), clips(width=16, seed=7)
    for part, given in ((bridge(), (seen,)), (bridge(CLIP.to_width(16)), (seen, plain))):
        out = part(*given, prompt=prompts())
        assert torch.equal(out.values, given[-1].values)
        assert list(out.extras) == ["relevance"]
        assert out.spec == part.output_spec(*(tokens.spec for tokens in given))


@torch.no_grad()
def test_an_open_bridge_depends_on_the_question():
    part, seen = bridge(gate=1.0), clips()
    one, other = (part(seen, prompt=prompts(seed=seed)) for seed in (6, 8))
    assert (one.values - other.values).abs().amax(dim=(1, 2)).min() > 0.01
    torch.testing.assert_close(one.extras["relevance"].sum(1), torch.ones(2))
    assert not torch.allclose(one.extras["relevance"], other.extras["relevance"])


@torch.no_grad()
def test_without_a_prompt_the_tokens_are_plain_ones():
    part, seen = bridge(gate=1.0), clips()
    mixed, both = (part(seen, prompt=prompts(absent=absent)) for absent in ((1,), ()))
    assert torch.equal(mixed.values[1], seen.values[1])
    torch.testing.assert_close(mixed.values[0], both.values[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.extras["relevance"][1], torch.full((12,), 1 / 12))
    assert mixed.values.isfinite().all()
    dropped = bridge(gate=1.0, drop=1.0).train()
    assert torch.equal(dropped(seen, prompt=prompts()).values, seen.values)


def test_gradients_open_the_gate_first():
    part = bridge()
    part(clips(), prompt=prompts()).values.square().sum().backward()
    moved = {name for name, value in part.named_parameters() if value.grad is not None and bool(value.grad.any())}
    assert moved == {"gate"}
    part = bridge(gate=0.5)
    part(clips(), prompt=prompts(absent=(1,))).values.square().sum().backward()
    for name, value in part.named_parameters():
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name


@torch.no_grad()
def test_time_is_told_apart_once_it_is_learnt():
    part, seen = bridge(gate=1.0), clips()
    still = part(seen, prompt=prompts()).values
    later = at_times(seen, torch.tensor([[0.0, 5.0, 9.0]] * 2))
    assert torch.equal(part(later, prompt=prompts()).values, still)
    nn.init.normal_(part.moment.weight)
    one, other = (part(tokens, prompt=prompts()).values for tokens in (seen, later))
    assert not torch.allclose(one, other)


@torch.no_grad()
def test_the_lowest_layers_of_both_towers_enter_first():
    part, seen, asked = bridge(gate=1.0), clips(), prompts()
    image, text = part.norm(seen.extras["hidden_states"]).unbind(2), part.text_norm(asked.hidden_states).unbind(2)
    places = torch.zeros(1, 12, 8)  # moments are not learnt yet
    fused = part.stack(text, image, asked.mask, frames=3, positions=places, weigh=True)
    added = part.out(fused.image + masked_mean(fused.text, asked.mask)[:, None])
    torch.testing.assert_close(part(seen, prompt=asked).values, seen.values + added, atol=1e-6, rtol=0)
    turned = part.stack(text, image[::-1], asked.mask, frames=3, positions=places, weigh=True)
    assert not torch.allclose(turned.image, fused.image, atol=1e-2)


@torch.no_grad()
def test_a_bridge_behind_pooling_knows_when_its_rows_are():
    """Three frames in two rows: their seconds are means, and as many as there are rows."""
    pooled = Pool(Site((CLIP,)), grid=(2, 1, 1))(clips())
    site = Site((pooled.spec,), 16, 6)
    torch.manual_seed(4)
    part = Bridge(site, **SMALL, levels=(), gate=1.0).eval()
    nn.init.normal_(part.moment.weight)
    out = part(pooled, prompt=prompts())
    assert out.spec == part.output_spec(pooled.spec)
    later = replace(pooled, positions=pooled.positions + torch.tensor([1.0, 0, 0]))
    assert not torch.allclose(part(later, prompt=prompts()).values, out.values, atol=1e-3)


@torch.no_grad()
def test_layers_are_read_by_number_or_replaced_by_the_tokens():
    assert bridge(depth=2).needs().hidden_states == (-2, -1)
    assert bridge(depth=2, bridge="none").needs().hidden_states == (-1,)
    assert bridge(depth=2, levels=(3, 7), text_levels=(1, 2)).needs().prompt_hidden_states == (1, 2)
    part, seen = bridge(levels=(), gate=1.0), clips()
    assert part.needs().hidden_states == ()
    doubled = clips()
    doubled.extras["hidden_states"] = seen.values[:, :, None].expand(-1, -1, 2, -1)
    same = bridge(gate=1.0)
    one, other = part(seen, prompt=prompts()).values, same(doubled, prompt=prompts()).values
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused():
    for arguments, says in (
        ({"levels": (1, 2, 3)}, "3 layers for a stack that reads 2"),
        ({"text_levels": ()}, "0 layers for a stack that reads 2"),
        ({"heads": 3}, "3 heads do not divide"),
        ({"depth": 0}, "depth is at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            bridge(**arguments)
    with pytest.raises(ValueError, match="text source"):
        Bridge(Site((CLIP,), 16), **SMALL)
    with pytest.raises(ValueError, match="need a grid"):
        bridge().output_spec(TokenSpec(CLIP.media, 12, 10))
    with pytest.raises(ValueError, match="adds to tokens of the encoder's grid"):
        bridge(CLIP.to_width(16)).output_spec(CLIP, TokenSpec(CLIP.media, 6, 16, Grid(3, 1, 2)))
    wide = TokenSpec(CLIP.media, 12, 10, CLIP.grid, {"hidden_states": (12, 2, 5)})
    with pytest.raises(ValueError, match="layers have width 5"):
        bridge().output_spec(wide)


def test_norms_come_from_the_towers():
    from mmllm.contract.registry import find

    small = {"hidden_size": 10, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes = find("encoder", "clip")(Site(), config={**small, "image_size": 28, "patch_size": 14})
    text = {**small, "hidden_size": 6, "vocab_size": 20, "max_position_embeddings": 8, "projection_dim": 4}
    words = find("text", "clip_text")(Site(), config=text)
    for tower in (eyes, words):
        for parameter in tower.parameters():
            nn.init.normal_(parameter)
    part = bridge()
    part.initialise({"eyes": eyes, "words": words})
    assert torch.equal(part.norm.weight, eyes.tower.post_layernorm.weight)
    final = next(module for name, module in words.named_modules() if name.endswith("final_layer_norm"))
    assert torch.equal(part.text_norm.bias, final.bias)
    with pytest.raises(UserError, match="tower: one of them"):
        part.initialise({"eyes": eyes, "again": eyes, "words": words})
    beside = find("encoder", "clip_bt_adapter")(Site(), config={**small, "image_size": 28, "patch_size": 14}, depth=2)
    nn.init.normal_(beside.tower.post_layernorm.weight)  # the adapter has norms of its own
    part.initialise({"beside": beside, "words": words})
    assert torch.equal(part.norm.weight, beside.tower.post_layernorm.weight)
    bridge(tower="again").initialise({"eyes": eyes, "again": eyes, "words": words})
