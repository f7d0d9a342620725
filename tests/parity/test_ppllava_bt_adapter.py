"""BT-Adapter against the authors' functions, beside CLIP's tower (PPLLaVA) and beside EVA's (ST-LLM)."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmllm.contract.parts import Site
from mmllm.contract.types import MediaSpec, Needs
from mmllm.encoders.video.bt_adapter import Block, BTAdapter
from mmllm.encoders.video.bt_adapter_towers import ClipBTAdapterEncoder

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)  # shapes too


def load_adapter(adapter: BTAdapter, states: dict[str, Tensor], names: dict[str, str]) -> None:
    """The authors' adapter under our names; `names`: {ours: theirs}, layer by layer."""
    renamed = {}
    for ours, theirs in names.items():
        for key, value in states.items():
            if re.fullmatch(theirs, key):
                renamed[re.sub(theirs, ours, key)] = value
    assert len(renamed) == len(states)
    adapter.load_state_dict(renamed)


CLIP_NAMES = {
    r"times.weight": r"btadapter_time_embed\.weight",
    r"cls": r"btadapter_cls_token",
    r"space.\1.attention.\2.\3": r"btadapter_S_layers\.(\d+)\.self_attn\.(query|key|value|out)\.(\w+)",
    r"space.\1.norm.\2": r"btadapter_S_layers\.(\d+)\.layer_norm1\.(\w+)",
    r"space.\1.mlp_norm.\2": r"btadapter_S_layers\.(\d+)\.layer_norm2\.(\w+)",
    r"space.\1.wide.\2": r"btadapter_S_layers\.(\d+)\.mlp\.fc1\.(\w+)",
    r"space.\1.narrow.\2": r"btadapter_S_layers\.(\d+)\.mlp\.fc2\.(\w+)",
    r"time.\1.attention.\2.\3": r"btadapter_T_layers\.(\d+)\.self_attn\.(query|key|value|out)\.(\w+)",
    r"time.\1.norm.\2": r"btadapter_T_layers\.(\d+)\.layer_norm1\.(\w+)",
    r"time.\1.out.\2": r"btadapter_T_layers\.(\d+)\.temporal_fc\.(\w+)",
}


def read_pixels(golden) -> Tensor:
    """Clips [B, T, 3, H, W] as the authors' forward takes them: a second axis of three is channels to it."""
    pixels = golden["in_pixels"]
    return pixels.transpose(1, 2) if pixels.shape[1] == 3 else pixels


@pytest.mark.golden("ppllava_btadapter_clip")
@torch.no_grad()
def test_bt_adapter_beside_clip(golden):
    states, pixels = golden.under("param."), read_pixels(golden)
    blocks, depth = golden.number("cfg_layers"), golden.number("cfg_depth")
    width, hidden = len(states["embeddings.class_embedding"]), len(states["encoder.layers.0.mlp.fc1.bias"])
    heads, side = golden.number("cfg_heads"), pixels.shape[-1]
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads}
    sizes |= {"num_hidden_layers": blocks, "image_size": side, "patch_size": golden.number("cfg_patch")}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    own = {key: value for key, value in states.items() if not key.startswith("btadapter")}
    tower.load_state_dict(own)
    side_states = {
        key.replace("_proj.", ".").replace(".q.", ".query.").replace(".k.", ".key.").replace(".v.", ".value."): value
        for key, value in states.items()
        if key not in own
    }
    side_states["btadapter_cls_token"] = side_states["btadapter_cls_token"].flatten()
    times = len(side_states["btadapter_time_embed.weight"])
    adapter = BTAdapter(Block(width, hidden, heads), depth, times).eval()
    load_adapter(adapter, side_states, CLIP_NAMES)
    positions = own["embeddings.position_embedding.weight"]

    def run(clips: Tensor) -> tuple[list[Tensor], Tensor]:
        hidden_states = tower(clips.flatten(0, 1), output_hidden_states=True).hidden_states
        hidden_states = [state.unflatten(0, clips.shape[:2]) for state in hidden_states]
        first = blocks - depth + 1
        streams, last = adapter(hidden_states[first:], positions), hidden_states[-1][:, :, 0]
        for index, stream in enumerate(streams, start=first):
            last = hidden_states[index][:, :, 0] + stream.cls[:, None]
            hidden_states[index] = adapter.blend(hidden_states[index], stream)
        return [state.flatten(0, 1) for state in hidden_states], tower.post_layernorm(last).flatten(0, 1)

    found, pooled = run(pixels)
    for index in range(blocks + 1):
        close(found[index], golden[f"out_hidden_{index}"])
    close(pooled, golden["out_pooler"])
    close(run(golden["in_pixels"][:, :1])[0][-2], golden["out_single_frame_hidden_penult"])
    # without the layer that reaches nothing the last but one state is the same
    del adapter.space[-1], adapter.time[-1]
    expected = golden[f"out_hidden_{blocks - 1}"]
    close(run(pixels)[0][-2], expected)
    if depth == 1:
        return  # what the encoder below reads lies in front of the adapter: it refuses
    # and so it is in the encoder that recipes name
    part = ClipBTAdapterEncoder(Site(), config=sizes, depth=depth, max_frames=times).eval()
    part.tower.load_state_dict(own)
    part.adapter.load_state_dict(adapter.state_dict())
    part.normalise = lambda given: given  # the vectors' pixels are normalised
    seen = part(pixels, MediaSpec("video", pixels.shape[1]), Needs())
    close(seen.values, expected[:, 1:].reshape(seen.values.shape))


EVA_NAMES = {
    r"times.weight": r"BTAdapter_position\.weight",
    r"cls": r"BTAdapter_cls",
    r"space.\1.attention.\2.\3": r"BTAdapter_S\.(\d+)\.attn\.(query|key|value|out)\.(\w+)",
    r"space.\1.norm.\2": r"BTAdapter_S\.(\d+)\.norm1\.(\w+)",
    r"space.\1.mlp_norm.\2": r"BTAdapter_S\.(\d+)\.norm2\.(\w+)",
    r"space.\1.wide.\2": r"BTAdapter_S\.(\d+)\.mlp\.fc1\.(\w+)",
    r"space.\1.narrow.\2": r"BTAdapter_S\.(\d+)\.mlp\.fc2\.(\w+)",
    r"time.\1.attention.\2.\3": r"BTAdapter_T\.(\d+)\.attn\.(query|key|value|out)\.(\w+)",
    r"time.\1.norm.\2": r"BTAdapter_T\.(\d+)\.norm1\.(\w+)",
    r"time.\1.out.\2": r"BTAdapter_T\.(\d+)\.temporal_fc\.(\w+)",
}


def split_keys(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """EVA's joint projection of queries, keys and values as three; its keys have no bias."""
    split = {}
    for key, value in states.items():
        if key.endswith("attn.qkv.weight"):
            for name, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                split[key.replace("qkv", name)] = piece
        else:
            renamed = key.replace("attn.q_bias", "attn.query.bias").replace("attn.v_bias", "attn.value.bias")
            split[renamed.replace("attn.proj.", "attn.out.")] = value
    return split


def eva_states(golden, heads: int, blocks: int) -> list[Tensor]:
    """States [B * T, 1 + N, C] of EVA's plain tower, by the library's functions: 0 enters the first block."""
    states = golden.under("param.")
    patch, function = golden.number("cfg_patch"), nn.functional
    weight, bias = states["patch_embed.proj.weight"], states["patch_embed.proj.bias"]
    patches = function.conv2d(read_pixels(golden).flatten(0, 1), weight, bias, stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([states["cls_token"].expand(len(patches), -1, -1), patches], dim=1) + states["pos_embed"]
    found = [x]
    for index in range(blocks):
        own = {key.removeprefix(f"blocks.{index}."): value for key, value in states.items()}
        norm = [function.layer_norm(x, x.shape[-1:], own["norm1.weight"], own["norm1.bias"], 1e-6)]
        joint = torch.cat([own["attn.q_bias"], torch.zeros_like(own["attn.q_bias"]), own["attn.v_bias"]])
        mixed = (norm[0] @ own["attn.qkv.weight"].T + joint).chunk(3, dim=-1)
        query, key, value = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in mixed)
        mixed = function.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + mixed @ own["attn.proj.weight"].T + own["attn.proj.bias"]
        wide = function.layer_norm(x, x.shape[-1:], own["norm2.weight"], own["norm2.bias"], 1e-6)
        wide = function.gelu(wide @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"])
        x = x + wide @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
        found.append(x)
    return found


@pytest.mark.golden("stllm_btadapter_eva")
@torch.no_grad()
def test_bt_adapter_beside_eva(golden):
    blocks, depth, heads = (golden.number(f"cfg_{name}") for name in ("layers", "depth", "heads"))
    states = split_keys({key: value for key, value in golden.under("param.").items() if key.startswith("BTA")})
    states["BTAdapter_cls"] = states["BTAdapter_cls"].flatten()
    width, hidden = states["BTAdapter_cls"].shape[0], len(states["BTAdapter_S.0.mlp.fc1.bias"])
    block = Block(width, hidden, heads, activation="gelu", key_bias=False, eps=(1e-5, 1e-6))
    adapter = BTAdapter(block, depth, len(states["BTAdapter_position.weight"]), blend_cls=True).eval()
    load_adapter(adapter, states, EVA_NAMES)
    shape = golden["in_pixels"].shape[:2]
    found = [state.unflatten(0, shape) for state in eva_states(golden, heads, blocks)[blocks - depth + 1 :]]
    streams = adapter(found, golden["param.pos_embed"][0])
    close(adapter.blend(found[-1], streams[-1]).flatten(0, 1), golden["out"])
