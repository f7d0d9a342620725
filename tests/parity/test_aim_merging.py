"""AIM's merging before the LLM against the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmllm.connectors.common.merging import match, merge_step
from mmllm.contract import registry
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def as_clip(frames: Tensor, **extras: Tensor) -> VisualTokens:
    """Frames [T, N, C] as one clip."""
    grid = Grid(len(frames), 1, frames.shape[1])
    tokens = frame_tokens(frames.flatten(0, 1)[None], MediaSpec("video", len(frames)), grid, len(frames))
    tokens.extras.update({name: value.flatten(0, 1)[None, :, None] for name, value in extras.items()})
    return tokens


def part(tokens: VisualTokens, **arguments: object):
    """The connector over such tokens."""
    return registry.find("connector", "token_merge")(Site((tokens.spec,), 8), **arguments)


@pytest.mark.golden("aim_merge", cases=r"(?!key)(\w+)_x")
def test_steps(golden, case):
    values, amounts = golden[f"{case}_x"], golden[f"{case}_r"].tolist()
    weights = torch.eye(values.shape[1]).expand(len(values), -1, -1)
    for number, r in enumerate(amounts, start=1):
        found = match(values, r)
        weights, values = found.merge(weights), merge_step(values, r, values)
        close(values, golden[f"{case}_out{number}"])
        close(weights, golden[f"{case}_w{number}"])
        assert found.total(torch.ones(*found.into.shape)).sum() == found.into.numel()


@pytest.mark.golden("aim_merge", cases=r"(?!key)(\w+)_x")
def test_connector(golden, case):
    tokens, amounts = as_clip(golden[f"{case}_x"]), tuple(map(float, golden[f"{case}_r"].tolist()))
    merged = part(tokens, amounts=amounts)(tokens)
    close(merged.by_frame()[0], golden[f"{case}_out{len(amounts)}"])
    assert merged.sizes.sum() == tokens.sizes.sum()


@pytest.mark.golden("aim_merge", cases=r"(key)_x")
def test_keys(golden, case):
    values, metric = golden[f"{case}_x"], golden[f"{case}_metric"]
    tokens, amounts = as_clip(values, keys=metric), tuple(map(float, golden[f"{case}_r"].tolist()))
    for number, r in enumerate(map(int, amounts), start=1):
        found = match(metric, r)
        values, metric = found.merge(values), found.merge(metric)
        close(values, golden[f"{case}_out{number}"])
        close(metric, golden[f"{case}_metric_out{number}"])
    connector = part(tokens, amounts=amounts, metric="key")
    assert connector.needs().keys == (-1,)
    close(connector(tokens).by_frame()[0], golden[f"{case}_out{len(amounts)}"])


@pytest.mark.golden("aim_merge", cases=r"(pool)_in")
def test_pooling_then_merging(golden, case):
    frames = golden[f"{case}_in"]
    side = int(frames.shape[1] ** 0.5)
    tokens = as_clip(frames)
    tokens.grid = Grid(len(frames), side, side)
    pool = registry.find("connector", "pool")(Site((tokens.spec,), 8), kernel=(1, 2, 2), mode="bilinear")
    pooled = pool(tokens)
    close(pooled.by_frame()[0], golden[f"{case}_only"])
    close(part(pooled)(pooled).by_frame()[0], golden[f"{case}_merged"])
