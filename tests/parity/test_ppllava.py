"""PPLLaVA against the authors' functions: pooling, relevance, longer prompts, splice."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.spliced import embedded, row
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
)
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from mmllm.connectors.common.windows import arithmetic, resolve_windows, windowed_softmax_pool
from mmllm.connectors.ppllava.patch_heads import SiglipPatchHead, cosine
from mmllm.contract import registry
from mmllm.contract.parts import Part, Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, VisualTokens
from mmllm.encoders.common.extended_positions import KEEP, ExtendedPositions, extend_positions, extend_tower
from mmllm.encoders.common.tokens import frame_tokens


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def part(name: str, tokens: VisualTokens, joint: int | None = None, **arguments: object) -> Part:
    """A connector over such tokens."""
    return registry.find("connector", name)(Site((tokens.spec,), 0, None, joint), **arguments).eval()


def asked(golden, name: str) -> tuple[int, ...] | None:
    """A triple, None where it was not given."""
    values = tuple(golden[name].tolist())
    return None if min(values) < 0 else values


# Pooling


@pytest.mark.golden("ppllava_pool", cases=r"(\w+)_feat")
def test_pooling(golden, case):
    values = golden[f"{case}_feat"].movedim(1, -1)
    scores = next(iter(golden.under(f"{case}_relevance").values()), None)
    temperature = golden.number(f"{case}_temperature")
    wanted = {name: asked(golden, f"{case}_req_{key}") for name, key in NAMES.items()}
    windows = resolve_windows(tuple(values.shape[1:4]), **wanted, reference=True)
    for axis in range(3):
        one = [None if triple is None else triple[axis] for triple in wanted.values()]
        derived = [int(golden[f"{case}_res_{key}"][axis]) for key in NAMES.values()]
        assert list(arithmetic(values.shape[1 + axis], *one, "axis")) == derived
        assert windows.grid[axis] == derived[0]
        assert windows.ends[axis][0] == derived[1]
    pooled = windowed_softmax_pool(values, scores, windows, temperature)
    close(pooled.movedim(-1, 1), golden[f"{case}_out"])

    grid = Grid(*values.shape[1:4])
    tokens = frame_tokens(values.flatten(1, 3), MediaSpec("video", grid.t), grid, grid.t)
    if scores is not None:
        tokens.extras["relevance"] = scores.flatten(1)
    pool = part("prompt_pool", tokens, **wanted, temperature=temperature, reference=True)
    assert pool.output_spec(tokens.spec) == pool(tokens).spec
    close(pool(tokens).as_grid().movedim(-1, 1), golden[f"{case}_out"])


NAMES = {"grid": "output", "kernel": "kernel", "stride": "stride"}


@pytest.mark.golden("ppllava_pool", cases=r"(\w+)_feat")
def test_our_windows_equal_the_authors_where_nothing_is_left_over(golden, case):
    """Kernel and stride differ where there is a rest, `grid` alone where it does not divide; the others agree."""
    size = tuple(golden[f"{case}_feat"].shape[2:])
    wanted = {name: asked(golden, f"{case}_req_{key}") for name, key in NAMES.items()}
    cells, kernel, stride = (golden[f"{case}_res_{key}"] for key in NAMES.values())
    if wanted["grid"] is None and bool((stride > kernel).any()):
        with pytest.raises(ValueError, match="tokens between windows would be lost"):
            resolve_windows(size, **wanted)
        return
    both = [resolve_windows(size, **wanted, reference=reference) for reference in (False, True)]
    exact = bool(((cells - 1) * stride + kernel == torch.tensor(size)).all())
    if wanted["grid"] is None:
        assert (both[0] == both[1]) == exact
    elif wanted["kernel"] is None and wanted["stride"] is None:
        assert both[0].grid == both[1].grid
        divides = not any(length % count for length, count in zip(size, cells.tolist(), strict=True))
        assert both[0] == both[1] or not divides
    else:
        assert both[0] == both[1]


# Longer prompts


@pytest.mark.golden("ppllava_textpos", cases=r"(\w+)_pos_in")
def test_extended_positions(golden, case):
    close(extend_positions(golden[f"{case}_pos_in"]), golden[f"{case}_pos_out"])
    frozen, trainable = golden[f"{case}_frozen_table"], golden[f"{case}_trainable_table"]
    positions = ExtendedPositions(*frozen.shape)
    positions.weight.data = torch.cat([frozen[:KEEP], trainable[KEEP:]])
    ids = golden[f"{case}_ids"]
    embedded = golden[f"{case}_token_table"][ids] + positions(torch.arange(ids.shape[1]))[None]
    close(embedded, golden[f"{case}_embed_out"])
    embedded.sum().backward()
    assert not positions.weight.grad[:KEEP].any()
    assert positions.weight.grad[KEEP : ids.shape[1]].all()


def text_states(golden) -> dict[str, Tensor]:
    """The authors' text tower under the library's names, their two tables of positions as one."""
    states = golden.under("param.clip_text_model.")
    frozen = states.pop("embeddings.position_embedding")
    learnt = states.pop("embeddings.position_embedding_res")
    states["embeddings.position_embedding.weight"] = torch.cat([frozen[:KEEP], learnt[KEEP:]])
    return states


def text_config(states: dict[str, Tensor], heads: int) -> dict:
    """The sizes of such a tower, before its positions were extended."""
    vocabulary, width = states["embeddings.token_embedding.weight"].shape
    layers = {int(found[1]) for name in states if (found := re.match(r"encoder\.layers\.(\d+)\.", name))}
    rows = len(states["embeddings.position_embedding.weight"])
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": len(states["encoder.layers.0.mlp.fc1.weight"]),
        "max_position_embeddings": (rows - KEEP) // 4 + KEEP,
    }


# Relevance and all that reaches the language model


def clip_of(golden) -> VisualTokens:
    """The encoder's patches as tokens of B clips."""
    frames, (rows, columns) = golden.number("in_num_frames"), golden["in_grid"].tolist()
    features = golden["in_image_features"]
    values = features.unflatten(0, (-1, frames)).flatten(1, 2)
    return frame_tokens(values, MediaSpec("video", frames), Grid(frames, rows, columns), frames)


def check_projected(golden, relevant: VisualTokens, reference: bool) -> None:
    """Relevance -> projector's first half -> pooling -> its second half, as a clip and as images.

    Our own windows have other sizes where the authors' do not tile the grid; those are compared in their form alone.
    """
    tau = golden.number("cfg_pooling_temp")
    windows = {name: tuple(golden[f"cfg_video_{name}"].tolist()) for name in ("kernel", "stride")}
    still = {f"still_{name}": tuple(golden[f"cfg_image_{name}"].tolist()) for name in ("kernel", "stride")}
    weights = [golden.under(f"param.linear_{index}.") for index in (1, 2)]
    for kind, out in (("video", "out_video_tokens"), ("image", "out_image_tokens")):
        kernel, stride = (golden[f"cfg_{kind}_{name}"] for name in ("kernel", "stride"))
        size = torch.tensor((relevant.spec.grid.t, relevant.spec.grid.h, relevant.spec.grid.w))
        if not reference and bool((((size - kernel) % stride > 0) | (stride > kernel)).any()):
            continue
        tokens = relevant
        tokens.media = MediaSpec(kind, tokens.media.frames)
        first = part("linear", tokens, width=len(weights[0]["bias"]), activation="gelu")
        first.linear.load_state_dict(weights[0])
        tokens = first(tokens)
        pool = part("prompt_pool", tokens, **windows, **still, temperature=tau, reference=reference)
        pooled = pool(tokens)
        last = part("linear", pooled, width=len(weights[1]["bias"]))
        last.linear.load_state_dict(weights[1])
        close(last(pooled).values, golden[out])
        # as the authors have it, the projector as a whole first
        after = pool(last(tokens)).values
        close(after, golden[out])


@pytest.mark.parametrize("reference", [False, True], ids=["default", "reference"])
@pytest.mark.golden("ppllava_projector_clip")
@torch.no_grad()
def test_clip_projector(golden, reference):
    states = text_states(golden)
    text, ids, mask = text_config(states, 0), golden["in_clip_ids"], golden["in_clip_mask"]
    heads, last = text["hidden_size"] // 8, text["vocab_size"] - 1
    joint = len(golden["param.clip_text_projection.weight"])
    text |= {"num_attention_heads": heads, "projection_dim": joint, "hidden_act": "quick_gelu"}
    config = CLIPTextConfig(**text, eos_token_id=last, bos_token_id=0, pad_token_id=last)
    tower = extend_tower(CLIPTextModelWithProjection(config)).eval()
    tower.text_model.load_state_dict(states)
    tower.text_projection.load_state_dict({"weight": golden["param.clip_text_projection.weight"]})
    assert ids.shape[1] <= len(states["embeddings.position_embedding.weight"])
    for length in (ids.shape[1], int(mask.sum(1).max())):  # what follows the end never matters
        said = tower.text_model(input_ids=ids[:, :length], attention_mask=mask[:, :length])
        close(said.pooler_output, golden["mid_text_pooled"])
    pooled = tower(input_ids=ids, attention_mask=mask).text_embeds
    close(pooled, golden["mid_text_projected"])

    tokens = clip_of(golden)
    relevance = part("prompt_relevance", tokens, joint, reference=reference)
    norm = nn.LayerNorm(tokens.values.shape[-1])
    norm.load_state_dict(golden.under("param.clip_visual_ln."))
    projection = nn.Linear(tokens.values.shape[-1], joint, bias=False)
    projection.load_state_dict({"weight": golden["param.clip_visual_projection.weight"]})
    pair = {"vision_model": SimpleNamespace(post_layernorm=norm), "visual_projection": projection}
    relevance.head.load_from(SimpleNamespace(**pair))
    relevance.logit_scale.copy_(golden["param.logit_scale"])
    close(tokens.as_grid(cosine(relevance.head(tokens.values), pooled)), golden["mid_cosine"])
    prompt = PromptFeatures(ids, mask, pooled=pooled, present=torch.ones(len(ids), dtype=torch.bool))
    relevant = relevance(tokens, prompt=prompt)
    assert relevance.output_spec(tokens.spec) == relevant.spec
    close(relevant.as_grid(relevant.extras["relevance"]), golden["mid_relevance"])
    check_projected(golden, relevant, reference)


@pytest.mark.golden("ppllava_projector_siglip")
@torch.no_grad()
def test_siglip_projector(golden):
    states = text_states(golden)
    joint, ids, heads = len(states["head.weight"]), golden["in_clip_ids"], golden.number("cfg_heads")
    config = SiglipTextConfig(**text_config(states, heads), projection_size=joint)
    tower = extend_tower(SiglipTextModel(config)).eval()
    tower.load_state_dict(states)
    pooled = tower(input_ids=ids).pooler_output
    close(pooled, golden["mid_text_pooled"])

    tokens = clip_of(golden)
    pair, plus = siglip_pair(golden, heads), bool(golden.number("cfg_valuew_plus"))
    options = {"heads": heads, "hidden": len(golden["param.clip_visual_head.mlp.fc1.bias"])}
    head = SiglipPatchHead(joint, options["hidden"], heads, probe=True, reference=True)
    head.load_from(pair)
    close(head(golden["in_image_features"]), golden["mid_patch_embed"])
    close(head.attention(golden["in_image_features"]), golden["mid_probe_attention"])
    close(tokens.as_grid(cosine(head(tokens.values), pooled)), golden["mid_cosine"])

    relevance = part("prompt_relevance", tokens, joint, head="siglip", probe_attention=plus, reference=True, **options)
    relevance.head.load_from(pair)
    relevance.logit_scale.copy_(golden["param.logit_scale"][0])
    prompt = PromptFeatures(ids, torch.ones_like(ids), pooled=pooled, present=torch.ones(len(ids), dtype=torch.bool))
    relevant = relevance(tokens, prompt=prompt)
    logits = golden["param.logit_scale"].exp() * golden["mid_cosine"].flatten(1) + golden["param.logit_bias"]
    shares = logits.softmax(1)  # the bias cancels
    if plus:
        seen = golden["mid_probe_attention"].mean(1).unflatten(0, (len(ids), -1)).flatten(1)
        shares = shares * 1000 * seen
    # the shares are large with probe attention, and a cosine's rounding is multiplied by the scale
    torch.testing.assert_close(relevant.extras["relevance"], shares, atol=1e-5, rtol=1e-4 if plus else 1e-5)
    check_projected(golden, relevant, True)


def siglip_pair(golden, heads: int) -> SimpleNamespace:
    """The image half of a SigLIP model with the authors' weights, as far as a patch head reads it."""
    states = golden.under("param.clip_visual_head.")
    width, hidden = states["probe"].shape[-1], len(states["mlp.fc1.bias"])
    config = SiglipVisionConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=heads)
    head, norm = SiglipMultiheadAttentionPoolingHead(config).eval(), nn.LayerNorm(width, eps=1e-6)
    head.load_state_dict(states)
    norm.load_state_dict(golden.under("param.clip_visual_ln."))
    return SimpleNamespace(vision_model=SimpleNamespace(head=head, post_layernorm=norm))


@pytest.mark.golden("ppllava_projector_siglip")
@torch.no_grad()
def test_our_siglip_head_is_the_towers_own_on_frames_of_one_patch(golden):
    pair = siglip_pair(golden, golden.number("cfg_heads"))
    patches = golden["in_image_features"].flatten(0, 1)[:, None]
    theirs = pair.vision_model.head(pair.vision_model.post_layernorm(patches))
    width, hidden = patches.shape[-1], len(golden["param.clip_visual_head.mlp.fc1.bias"])
    for reference in (False, True):
        head = SiglipPatchHead(width, hidden, 1, reference=reference)
        head.load_from(pair)
        worst = float((head(patches)[:, 0] - theirs).abs().max())
        assert worst > 0.1 if reference else worst < 1e-5


# Splice


@pytest.mark.golden("ppllava_merge")
@torch.no_grad()
def test_splice(golden):
    ids, mask, labels = golden["ids"], golden["attention_mask"], golden["labels"]
    placeholder, padding = golden.number("image_token"), golden.number("pad_token")
    clips: list[list[Tensor]] = []
    rows = []
    for index in range(len(ids)):
        real = mask[index].bool()
        assert bool((ids[index][~real] == padding).all())
        media = {len(clips) + place: [values] for place, values in enumerate(golden[f"visual_{index}"])}
        clips += media.values()
        rows.append(row(ids[index][real].tolist(), labels[index][real].tolist(), placeholder, media, start=False))
    side = "right" if golden["out_mask"][:, 0].all() else "left"
    sequence, batch = embedded(golden["token_table"], clips, rows, side)
    # the authors count the padding of the ids too, so that even their longest row may end in padding
    more = golden["out_mask"].shape[1] - sequence.mask.shape[1]
    edge = (0, more) if side == "right" else (more, 0)
    assert more >= 0
    assert nn.functional.pad(batch["attention_mask"], edge).tolist() == golden["out_mask"].tolist()
    assert nn.functional.pad(batch["labels"], edge, value=-100).tolist() == golden["out_labels"].tolist()
    real = golden["out_mask"].bool()
    close(sequence.embeds[sequence.mask.bool()], golden["out_embeds"][real])
    assert not golden["out_embeds"][~real].any()  # ours is the pad id's row, which nothing attends to
    positions = (real.cumsum(1) - 1).masked_fill(~real, 1)
    assert positions.tolist() == golden["out_position_ids"].tolist()
