"""BridgeTower: the library's classes with our stack, and what the stack keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerModel,
)

from mmllm.connectors.bridgetower.cross_modal import BRIDGES, CrossModalStack, Sizes
from mmllm.connectors.bridgetower.image_text import ImageTextModel, PooledStack, from_transformers, sizes_of
from mmllm.contract.errors import UserError

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
    from mmllm.checks.summary import count_macs

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
