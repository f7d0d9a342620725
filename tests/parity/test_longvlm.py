"""LongVLM against the authors' code: segments merged, all that reaches the LLM, and which frames are taken."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mmllm.connectors.common.merging import Merging
from mmllm.contract import registry
from mmllm.contract.parts import Part, Site
from mmllm.contract.types import Grid, MediaSpec, VisualTokens
from mmllm.data.media.sampling import SAMPLERS
from mmllm.encoders.common.tokens import frame_tokens


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def as_clip(frames: Tensor) -> VisualTokens:
    """Frames [T, P, C] as one clip."""
    grid = Grid(len(frames), 1, frames.shape[1])
    return frame_tokens(frames.flatten(0, 1)[None], MediaSpec("video", len(frames)), grid, len(frames))


def part(name: str, *inputs: VisualTokens, width: int = 0, **arguments: object) -> Part:
    """A connector over such tokens."""
    return registry.find("connector", name)(Site(tuple(tokens.spec for tokens in inputs), width), **arguments)


def segment_merge(golden, tokens: VisualTokens, prefix: str = "") -> Part:
    """The merging of a file's or a case's settings."""
    amounts = tuple(golden[f"{prefix}r"].tolist())
    return part(
        "segment_merge", tokens, frames_per_segment=golden.number(f"{prefix}frames_per_segment"), amounts=amounts
    )


@pytest.mark.golden("longvlm_merge", cases=r"(\w+)_out")
def test_merging(golden, case):
    tokens = as_clip(golden[f"{case}_x"])
    merge = segment_merge(golden, tokens, f"{case}_")
    out = merge(tokens)
    close(out.values[0], golden[f"{case}_out"])
    segments = len(merge.segments(tokens.grid))
    assert out.sizes.unflatten(1, (segments, -1)).sum(2).eq(tokens.values.shape[1] / segments).all()


@pytest.mark.golden("longvlm_merge", cases=r"(\w+)_out")
def test_steps_and_shares(golden, case):
    tokens = as_clip(golden[f"{case}_x"])
    merge = segment_merge(golden, tokens, f"{case}_")
    length = merge.frames * tokens.grid.w
    values = tokens.values.unflatten(1, (-1, length))[0]
    merging = Merging.of(
        values, values[..., :3], torch.ones(values.shape[:2]), torch.eye(length).expand(len(values), -1, -1)
    )
    for number, r in enumerate(merge.steps(length), start=1):
        merging = merging.step(merging.values.unflatten(-1, (merge.heads, -1)).mean(-2), r, weighted=True)
        close(merging.sizes, golden[f"{case}_size{number}"])
        if f"{case}_step{number}" in golden:
            close(merging.values, golden[f"{case}_step{number}"])
    close(merging.keys, golden[f"{case}_weights"])
    close(merging.keys.sum(-1), torch.ones(merging.keys.shape[:2]))


@pytest.mark.golden("longvlm_full")
def test_what_reaches_the_llm(golden):
    states = golden["hidden_states_0"]  # layers, frames, 1 + patches, width
    tokens = as_clip(states[-2, :, 1:])
    tokens.extras["cls"] = states[:, :, 0].transpose(0, 1)[None]
    every = part("global_tokens", tokens, layers=tuple(range(len(states))))
    close(every(tokens).values[0], golden["cls_mean_0"])
    layers = tuple(range(-golden.number("num_global"), 0))
    whole = part("global_tokens", tokens, layers=layers)
    assert whole.needs().cls == layers
    tokens.extras["cls"] = tokens.extras["cls"][:, :, list(layers)]
    first = whole(tokens)
    close(first.values, golden["global_"])
    local = segment_merge(golden, tokens)(tokens)
    close(local.values, golden["local"])
    memory = part("sequence_concat", first, local)(first, local)
    weight = golden["mm_projector_weight"]
    linear = part("linear", memory, width=len(weight))
    linear.load_state_dict(dict(zip(linear.state_dict(), (weight, golden["mm_projector_bias"]), strict=True)))
    projected = linear(memory)
    close(projected.values, golden["projected"])
    _check_splice(golden, projected)


def _check_splice(golden, projected: VisualTokens) -> None:
    """The authors' rows between their start and end token are ours between two markers."""
    table, (patch, start, end) = golden["embed_tokens_weight"], golden["special_ids"].tolist()
    markers = part("markers", projected)
    markers.start, markers.end = nn.Parameter(table[start]), nn.Parameter(table[end])
    rows, ids = markers(projected).values[0], golden["input_ids"]
    at = (ids[0] == start).nonzero()[0, 0]
    assert ids[0, at + 1 : at + len(rows) - 1].eq(patch).all()
    embeds = nn.functional.embedding(ids, table)
    embeds[0, at : at + len(rows)] = rows
    close(embeds, golden["inputs_embeds"])


@pytest.mark.golden("longvlm_frames", cases=r"(idx_\w+)")
def test_frames(golden, case):
    total, wanted = map(int, re.fullmatch(r"idx_total(\d+)_want(\d+)", case).groups())
    expected = golden[case].tolist()
    assert SAMPLERS["midpoints"](0, total - 1, min(total, wanted)) == expected
    assert SAMPLERS["midpoints"](5, total + 4, len(expected)) == [index + 5 for index in expected]
