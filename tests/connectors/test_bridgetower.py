"""BridgeTower: the library's classes with our stack, what the stack keeps, and the bridge in front of an LLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerModel,
)

from mmllm.connectors.bridgetower import Bridge
from mmllm.connectors.cross_modal import BRIDGES, CrossModalStack, Sizes, masked_mean
from mmllm.connectors.image_text import ImageTextModel, PooledStack, from_transformers, sizes_of
from mmllm.connectors.pool import Pool
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, TokenSpec, VisualTokens
from mmllm.encoders.tokens import at_times, frame_tokens

TOLERANCE = 1e-5


def library_config(**changes) -> BridgeTowerConfig:
    """A small BridgeTower: the library's image tower has 64 channels a head."""
    text = {
        "vocab_size": 50,
        "hidden_size": changes.get("hidden_size", 32),
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
    }
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 24}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "contrastive_hidden_size": 12, "logit_scale_init_value": 2.6}
    return BridgeTowerConfig(text_config=text, vision_config=vision, **{**sizes, **changes})


def library_model(cls: type, **changes) -> nn.Module:
    """One with every weight random, norms and biases too."""
    torch.manual_seed(0)
    model = cls(library_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def pairs() -> dict[str, torch.Tensor]:
    """Three pairs; two texts are padded, one of them to a single word."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2, 1:] = 0, 0
    pixels = torch.randn(3, 3, 24, 24, generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "pixel_values": pixels}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"link_tower_type": "scaled_add"},
        {"link_tower_type": "interpolate", "num_hidden_layers": 3},
        {"share_cross_modal_transformer_layers": False},
        {"layer_norm_eps": 1e-12},
    ],
    ids=str,
)
def test_equals_the_librarys_model(changes, pairs):
    theirs = library_model(BridgeTowerModel, **changes)
    ours = ImageTextModel(theirs)
    with torch.no_grad():
        expected, found = theirs(**pairs), ours(**pairs)
    real = pairs["attention_mask"].bool()
    for one, other in [
        (found.text[real], expected.text_features[real]),
        (found.text, expected.text_features),
        (found.image, expected.image_features),
        (found.pooled, expected.pooler_output),
    ]:
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_matching_equals_the_librarys_and_loads_from_a_folder(pairs, tmp_path):
    theirs = library_model(BridgeTowerForImageAndTextRetrieval)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(**pairs).logits
        for ours in (ImageTextModel(theirs), ImageTextModel.from_pretrained(str(tmp_path), "matching").eval()):
            torch.testing.assert_close(ours.match(**pairs), expected, atol=TOLERANCE, rtol=0)
        with pytest.raises(UserError, match="loaded without the head 'text'"):
            ours.embed(**pairs)
    with pytest.raises(UserError, match="has no itc_"):
        ImageTextModel.from_pretrained(str(tmp_path), "contrastive")
    with pytest.raises(UserError, match="cannot fetch"):
        ImageTextModel.from_pretrained(str(tmp_path / "nothing"))


def test_embeddings_equal_the_librarys(pairs):
    theirs = library_model(BridgeTowerForContrastiveLearning, hidden_size=64)  # it takes towers of one width only
    with torch.no_grad():
        expected, found = theirs(**pairs), ImageTextModel(theirs).embed(**pairs)
    for name in ("text", "image", "cross"):
        torch.testing.assert_close(found[name], expected[f"{name}_embeds"], atol=TOLERANCE, rtol=0)


def test_weights_are_strict():
    state = library_model(BridgeTowerModel).state_dict()
    fusion = PooledStack(32, 64, sizes_of(library_config()))
    fusion.load_state_dict(from_transformers(state))
    bare = {name: value for name, value in state.items() if "link_tower.0" not in name}
    with pytest.raises(RuntimeError, match="bridges"):
        fusion.load_state_dict(from_transformers(bare))
    with pytest.raises(UserError, match="not a weight of BridgeTower"):
        from_transformers({"cross_modal_text_layers.0.surprise.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="share their weights"):
        from_transformers({"cross_modal_text_link_tower.LayerNorm.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="2 rows, got 3"):
        from_transformers({"token_type_embeddings.weight": torch.zeros(3, 4)})
    for changes in ({"hidden_size": 64}, {"link_tower_type": "product"}):
        config = library_config()
        vars(config).update(changes)
        with pytest.raises(UserError, match=r"config\."):
            sizes_of(config)


def small_stack(bridge: str = "add_norm", depth: int = 2, **options) -> CrossModalStack:
    """Towers of width 6 and 10, a stack of width 8."""
    torch.manual_seed(2)
    stack = CrossModalStack(6, 10, Sizes(8, depth, 2, 16, bridge), **options).eval()
    stack.reset_parameters(0.4)
    return stack


def states(words: int, places: int, count: int, seed: int = 3, batch: int = 2) -> tuple[list, list]:
    """Hidden states of both towers."""
    generator = torch.Generator().manual_seed(seed)
    text = [torch.randn(batch, words, 6, generator=generator) for _ in range(count)]
    return text, [torch.randn(batch, places, 10, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("bridge", list(BRIDGES))
@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_padding_never_matters(bridge, depth):
    stack = small_stack(bridge, depth)
    text, image = states(5, 9, stack.sizes.levels)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    short = stack([state[:, :3] for state in text], image, mask[:, :3], weigh=True)
    longer = stack([state + 9 * (1 - mask[..., None]) for state in text], image, mask, weigh=True)
    torch.testing.assert_close(longer.image, short.image, atol=5e-6, rtol=0)
    torch.testing.assert_close(longer.relevance, short.relevance, atol=5e-6, rtol=0)
    torch.testing.assert_close(longer.text[0, :3], short.text[0], atol=5e-6, rtol=0)
    assert longer.text.isfinite().all()


@torch.no_grad()
def test_both_layers_read_what_enters_the_other():
    """Y_1 depends on the text only through x_1, so the first text layer's weights cannot change it."""
    stack = small_stack(depth=1)
    text, image = states(3, 4, 1)
    before = stack(text, image).image
    nn.init.normal_(stack.text.layers[0].feed_forward.up.weight)
    assert torch.equal(stack(text, image).image, before)
    nn.init.normal_(stack.text.first.weight)
    assert not torch.allclose(stack(text, image).image, before)


@torch.no_grad()
def test_frames_see_one_another_only_through_the_prompt():
    for depth, reaches in ((1, False), (2, True)):
        stack = small_stack(depth=depth)
        text, image = states(3, 3 * 4, depth)
        changed = [state.clone() for state in image]
        for state in changed:
            state[:, 8:] += 1.0
        one, other = (stack(text, given, frames=3).image for given in (image, changed))
        assert torch.allclose(one[:, :8], other[:, :8], atol=1e-6) != reaches
        assert not torch.allclose(one[:, 8:], other[:, 8:])
    single = stack(text, [state[:, :4] for state in image], frames=1)
    assert torch.equal(single.image, stack(text, [state[:, :4] for state in image]).image)


@torch.no_grad()
def test_places_have_no_order_within_a_frame():
    stack = small_stack()
    text, image = states(3, 6, 2)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    plain = stack(text, image, frames=2, weigh=True)
    moved = stack(text, [state[:, order] for state in image], frames=2, weigh=True)
    torch.testing.assert_close(moved.image, plain.image[:, order], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved.relevance, plain.relevance[:, order], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("words", "places"), [(1, 1), (1, 7), (5, 1)])
@torch.no_grad()
def test_single_tokens(words, places):
    fused = small_stack(depth=3)(*states(words, places, 3), weigh=True)
    assert fused.image.shape == (2, places, 8)
    assert fused.image.isfinite().all()
    torch.testing.assert_close(fused.relevance.sum(1), torch.ones(2))


def test_without_its_last_text_layer_the_image_stream_is_the_same():
    whole, short = small_stack(), small_stack(last_text=False)
    short.load_state_dict({name: whole.state_dict()[name] for name in short.state_dict()})
    given = states(3, 4, 2)
    assert torch.equal(whole(*given).image, short(*given).image)
    assert len(list(short.parameters())) < len(list(whole.parameters()))


def test_sizes_of_the_paper():
    """Parameters and multiply-adds as the paper and its cost notes count them (millions, thousands, milliards)."""
    from mmllm.walk import count_macs

    with torch.device("meta"):
        for depth, millions in ((2, 37.8), (3, 56.8), (4, 75.6), (6, 113.4)):
            stack = CrossModalStack(768, 768, Sizes(depth=depth))
            layers = sum(p.numel() for side in (stack.text, stack.image) for p in side.layers.parameters())
            assert layers / 1e6 == pytest.approx(millions, abs=0.15)
        norms = [*stack.text.bridges, stack.text.first, *stack.image.bridges, stack.image.first]
        assert sum(p.numel() for norm in norms for p in norm.parameters()) == 18432  # 18.4 k
        stack = CrossModalStack(512, 512, Sizes(512, 2, 8, 2048))
        layers = sum(p.numel() for side in (stack.text, stack.image) for p in side.layers.parameters())
        assert layers / 1e6 == pytest.approx(16.8, abs=0.05)
        stack.text.transforms[0], stack.image.transforms[0] = nn.Identity(), nn.Identity()
        image, text = [torch.zeros(1, 16 * 197, 512)] * 2, [torch.zeros(1, 32, 512)] * 2
        macs = count_macs(stack, text, image, frames=16, weigh=True)
    assert macs / 1e9 == pytest.approx(28.4, abs=0.1)


CLIP = TokenSpec(MediaSpec("video", 3), 12, 10, Grid(3, 2, 2), {"levels": (12, 2, 10)})
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
    tokens.extras["levels"] = torch.randn(count, 12, levels, width, generator=generator)
    return tokens


def prompts(count: int = 2, seed: int = 6, absent: tuple[int, ...] = ()) -> PromptFeatures:
    """Questions of five and fewer words; an absent one has one word unmasked."""
    generator = torch.Generator().manual_seed(seed)
    levels, mask = torch.randn(count, 5, 2, 6, generator=generator), torch.ones(count, 5, dtype=torch.long)
    mask[0, 3:] = 0
    present = torch.ones(count, dtype=torch.bool)
    for row in absent:
        mask[row, 1:], present[row] = 0, False
    return PromptFeatures(torch.zeros(count, 5, dtype=torch.long), mask, levels=levels, present=present)


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
    image, text = part.norm(seen.extras["levels"]).unbind(2), part.text_norm(asked.levels).unbind(2)
    places = torch.zeros(1, 12, 8)  # moments are not learnt yet
    fused = part.stack(text, image, asked.mask, frames=3, places=places, weigh=True)
    added = part.out(fused.image + masked_mean(fused.text, asked.mask)[:, None])
    torch.testing.assert_close(part(seen, prompt=asked).values, seen.values + added, atol=1e-6, rtol=0)
    turned = part.stack(text, image[::-1], asked.mask, frames=3, places=places, weigh=True)
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
    assert bridge(depth=2).needs().levels == (-2, -1)
    assert bridge(depth=2, bridge="none").needs().levels == (-1,)
    assert bridge(depth=2, levels=(3, 7), text_levels=(1, 2)).needs().prompt_levels == (1, 2)
    part, seen = bridge(levels=(), gate=1.0), clips()
    assert part.needs().levels == ()
    doubled = clips()
    doubled.extras["levels"] = seen.values[:, :, None].expand(-1, -1, 2, -1)
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
    wide = TokenSpec(CLIP.media, 12, 10, CLIP.grid, {"levels": (12, 2, 5)})
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
