"""BridgeTower's bridges, cross-modal stack and whole model against the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, gelu, layer_norm, linear, normalize

from mmllm.connectors.bridgetower.cross_modal import AddNorm, Sizes
from mmllm.connectors.bridgetower.image_text import PooledStack, from_transformers

TOLERANCE = 2e-6
"""Absolute and, as rounding grows with the width, relative too."""
SIDES = ("text", "image")


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within the tolerance, everywhere."""
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.golden("bridgetower_bridge")
def test_bridge(golden):
    bridge = AddNorm(golden["unimodal"].shape[-1], golden.number("meta/eps"))
    bridge.norm.load_state_dict(golden.under("param/LayerNorm."))
    close(bridge(golden["unimodal"], golden["cross_modal"]), golden["out"])


def stack_of(golden, sizes: Sizes, text_width: int, image_width: int) -> PooledStack:
    """Our stack with the file's weights; projections are the identity where the file starts behind them."""
    state = from_transformers(golden.under("param/"))
    for side in SIDES:
        if f"stack.{side}.transforms.0.weight" not in state:
            state[f"stack.{side}.transforms.0.weight"] = torch.eye(sizes.width)
            state[f"stack.{side}.transforms.0.bias"] = torch.zeros(sizes.width)
    fusion = PooledStack(text_width, image_width, sizes).eval()
    fusion.load_state_dict(state)
    return fusion


def recorded(fusion: PooledStack) -> dict[str, Tensor]:
    """{name of the file: what enters and leaves each layer}, filled by the next forward."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, given: tuple, made: tuple) -> None:
            seen[f"{name}_in"], seen[f"{name}_out"] = given[0], made[0]

        return hook

    for side in SIDES:
        for index, layer in enumerate(getattr(fusion.stack, side).layers):
            layer.register_forward_hook(keep(f"out/{side}_layer{index}"))
    return seen


def compare(golden, fusion: PooledStack, text: list[Tensor], image: list[Tensor], mask: Tensor) -> Tensor:
    """All layers and features; gives the pooled features."""
    seen = recorded(fusion)
    features = fusion(text, image, mask)
    assert len(seen) == 4 * fusion.stack.sizes.depth
    for name, value in seen.items():
        close(value, golden[name])
    close(features.text, golden["out/text_feats"])
    close(features.image, golden["out/image_feats"])
    close(features.pooled, golden["out/cls_feats"])
    weighed = fusion.stack(text, image, mask, weigh=True)  # the path that also gives the relevance
    close(weighed.text, golden["out/text_feats"])
    torch.testing.assert_close(weighed.relevance.sum(1), torch.ones(len(mask)))
    return features.pooled


@pytest.mark.golden("bridgetower_cross_stack")
def test_cross_stack(golden):
    width = int(golden.number("meta/hidden"))
    sizes = Sizes(
        width=width,
        depth=int(golden.number("meta/nz")),
        heads=int(golden.number("meta/heads")),
        feed_forward=width * int(golden.number("meta/mlp_ratio")),
        eps=golden.number("meta/bridge_norm_eps"),
        layer_eps=golden.number("meta/cross_layer_norm_eps"),
    )
    fusion = stack_of(golden, sizes, width, width)
    with torch.no_grad():
        compare(golden, fusion, list(golden["text_layers"]), list(golden["image_layers"]), golden["text_mask"])


def roberta(golden) -> nn.Module:
    """The authors' text tower is the library's."""
    from transformers import RobertaConfig, RobertaModel

    state = golden.under("param/text_transformer.")
    state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    config = RobertaConfig(
        vocab_size=int(golden.number("meta/vocab")),
        hidden_size=int(golden.number("meta/text_hidden")),
        num_hidden_layers=int(golden.number("meta/text_layers")),
        num_attention_heads=int(golden.number("meta/text_heads")),
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=int(golden.number("meta/maxlen")) + 2,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
    )
    tower = RobertaModel(config, add_pooling_layer=False).eval()
    tower.load_state_dict(state)
    return tower


VIT_NAMES = {
    "conv1.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def clip(golden) -> nn.Module:
    """The authors' image tower is CLIP's without its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state = {}
    for name, value in golden.under("param/vit_model.visual.").items():
        for theirs, ours in VIT_NAMES.items():
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:
            for key, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.in_proj_", f".self_attn.{key}_proj.")] = part
        else:
            state[name] = value
    width = int(golden.number("meta/vit_width"))
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=int(golden.number("meta/vit_layers")),
        num_attention_heads=int(golden.number("meta/vit_heads")),
        image_size=int(golden.number("meta/img")),
        patch_size=int(golden.number("meta/patch")),
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict(state)
    return tower


def head(golden, name: str, rows: Tensor) -> Tensor:
    """A linear head of the file."""
    return linear(rows, golden[f"param/{name}.weight"], golden[f"param/{name}.bias"])


def language_logits(golden, rows: Tensor) -> Tensor:
    """The authors' masked-language head."""
    rows = gelu(head(golden, "mlm_score.transform.dense", rows))
    norm = golden["param/mlm_score.transform.LayerNorm.weight"], golden["param/mlm_score.transform.LayerNorm.bias"]
    rows = layer_norm(rows, rows.shape[-1:], *norm, eps=1e-12)
    return linear(rows, golden["param/mlm_score.decoder.weight"], golden["param/mlm_score.bias"])


def answer_logits(golden, rows: Tensor) -> Tensor:
    """The authors' head for visual questions."""
    rows = head(golden, "vqa_classifier.0", rows)
    assert rows.shape[-1] == golden["out/cls_feats"].shape[-1] * golden.number("meta/hscale")
    norm = golden["param/vqa_classifier.1.weight"], golden["param/vqa_classifier.1.bias"]
    return head(golden, "vqa_classifier.3", gelu(layer_norm(rows, rows.shape[-1:], *norm)))


@pytest.mark.golden("bridgetower_full")
def test_whole_model(golden):
    """From pixels and ids to every head and loss."""
    depth, width = int(golden.number("meta/nz")), int(golden.number("meta/hidden"))
    heads, wide = int(golden.number("meta/heads")), width * int(golden.number("meta/mlp_ratio"))
    words, eyes = roberta(golden), clip(golden)
    sizes = Sizes(width=width, depth=depth, heads=heads, feed_forward=wide)
    fusion = stack_of(golden, sizes, words.config.hidden_size, eyes.config.hidden_size)
    mask = golden["text_mask"]
    assert golden.number("meta/seed") >= 0

    def read(ids: Tensor) -> list[Tensor]:
        return list(words(ids, mask, output_hidden_states=True).hidden_states[-depth:])

    with torch.no_grad():
        text = read(golden["text_ids"])
        layers = eyes(golden["image"], output_hidden_states=True).hidden_states[-depth:]
        image = [eyes.post_layernorm(layer) for layer in layers]
        for side, states in zip(SIDES, (text, image), strict=True):
            projected = getattr(fusion.stack, side).transforms[0](torch.stack(states))
            close(projected, golden[f"out/{side}_transformed_top"])
        pooled = compare(golden, fusion, text, image, mask)

        close(head(golden, "itm_score.fc", pooled), golden["out/itm_logits"])
        answers, targets = answer_logits(golden, pooled), golden["vqa_targets"]
        close(answers, golden["out/vqa_logits"])
        assert answers.shape[-1] == golden.number("meta/labels")
        loss = binary_cross_entropy_with_logits(answers, targets) * targets.shape[-1]
        torch.testing.assert_close(loss, golden["out/vqa_loss"], atol=TOLERANCE, rtol=1e-6)

        spoken = normalize(head(golden, "itc_text_head.fc", text[-1][:, 0]), dim=-1)
        shown = normalize(head(golden, "itc_image_head.fc", image[-1][:, 0]), dim=-1)
        assert spoken.shape[-1] == golden.number("meta/contr")
        close(spoken, golden["out/itc_text"])
        close(shown, golden["out/itc_image"])
        scores, own = shown @ spoken.T / 0.07, torch.arange(len(shown))
        loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
        torch.testing.assert_close(loss, golden["out/itc_loss"], atol=TOLERANCE, rtol=1e-5)

        logits = language_logits(golden, fusion(read(golden["mlm_ids"]), image, mask).text)
        close(logits, golden["out/mlm_logits"])
        loss = cross_entropy(logits.flatten(0, 1), golden["mlm_labels"].flatten(), ignore_index=-100)
        torch.testing.assert_close(loss, golden["out/mlm_loss"], atol=TOLERANCE, rtol=1e-6)
