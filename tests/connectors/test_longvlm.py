"""What always holds of a long clip's merged segments and of the tokens of the whole."""

from __future__ import annotations

import pytest
import torch

from mmllm.connectors.common import merging
from mmllm.connectors.common.markers import Markers
from mmllm.connectors.longvlm import GlobalTokens, SegmentMerge, halvings
from mmllm.connectors.merv.fusion import SequenceConcat
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens


def clips(frames: int, side: int = 4, batch: int = 2, width: int = 16, seed: int = 0) -> VisualTokens:
    """Random clips, one frame per second, whose patches know where they are."""
    grid = Grid(frames, side, side)
    values = torch.randn(batch, grid.tokens, width, generator=torch.Generator().manual_seed(seed))
    tokens = frame_tokens(values, MediaSpec("video", frames), grid, frames)
    tokens = at_times(tokens, torch.arange(float(frames)).expand(batch, -1))
    tokens.sources = torch.arange(grid.tokens).expand(batch, -1)
    return tokens


def merge(tokens: VisualTokens, **arguments: object) -> SegmentMerge:
    """The part over such tokens."""
    return SegmentMerge(
        Site((tokens.spec,)), **{"frames_per_segment": 4, "tokens_per_segment": 5, "heads": 4, **arguments}
    )


@pytest.mark.parametrize("order", ["match", "time"])
@pytest.mark.parametrize("frames", [1, 3, 4, 8, 10])
def test_every_token_is_the_mean_of_its_patches(frames, order):
    tokens = clips(frames)
    part = merge(tokens, order=order)
    out = part(tokens)
    assert out.spec == part.output_spec(tokens.spec)
    assert out.sizes.sum() == tokens.values.shape[0] * tokens.values.shape[1]
    weights = torch.nn.functional.one_hot(out.sources, out.values.shape[1]).transpose(1, 2).float()
    torch.testing.assert_close(weights.sum(2), out.sizes)
    weights = weights / weights.sum(2, keepdim=True)
    torch.testing.assert_close(out.values, weights @ tokens.values)
    torch.testing.assert_close(out.positions, weights @ tokens.positions)


def test_segments_do_not_see_each_other():
    tokens = clips(10)
    out = merge(tokens)(tokens)
    assert (out.sources.unflatten(1, (10, 16)) // 5).eq(torch.arange(10)[:, None] // 4).all()
    swapped = clips(10)
    swapped.values = torch.cat([tokens.values[:, 64:128], tokens.values[:, :64], tokens.values[:, 128:]], dim=1)
    again = merge(swapped)(swapped)
    torch.testing.assert_close(again.values, torch.cat([out.values[:, 5:10], out.values[:, :5], out.values[:, 10:]], 1))


def test_in_the_order_of_time():
    tokens = clips(8)
    times = merge(tokens, order="time")(tokens).positions[..., 0].unflatten(1, (2, 5))
    assert (times.diff(dim=2) >= 0).all()
    assert not (merge(tokens)(tokens).positions[..., 0].unflatten(1, (2, 5)).diff(dim=2) >= 0).all()


def test_a_batch_is_its_clips():
    tokens = clips(10, batch=3)
    out = merge(tokens)(tokens)
    for row in range(3):
        torch.testing.assert_close(merge(tokens)(tokens.row(row)).values, out.values[row : row + 1])


def test_gradients_reach_every_patch_and_no_choice():
    tokens = clips(10)
    tokens.values.requires_grad_()
    merge(tokens)(tokens).values.square().sum().backward()
    assert tokens.values.grad.abs().sum(-1).gt(0).all()


def test_blocks_of_similarities_change_nothing(monkeypatch):
    tokens = clips(10)
    whole = merge(tokens)(tokens)
    for products in (7, 100, 1500):
        monkeypatch.setattr(merging, "PRODUCTS", products)
        assert torch.equal(merge(tokens)(tokens).values, whole.values)


def test_nothing_is_like_zeros():
    tokens = clips(4)
    tokens.values = torch.zeros_like(tokens.values)
    assert merge(tokens)(tokens).values.eq(0).all()


def test_half_precision_merges_as_float32():
    tokens = clips(8)
    tokens.values = tokens.values.bfloat16()
    out = merge(tokens)(tokens)
    assert out.values.dtype == torch.bfloat16
    exact = clips(8)
    exact.values = tokens.values.float()
    assert torch.equal(out.sources, merge(exact)(exact).sources)


@pytest.mark.parametrize(
    ("tokens", "target"), [(2560, 30), (5760, 30), (36, 6), (7, 3), (5, 5), (4, 9), (2, 1), (9, 1)]
)
def test_halvings_end_where_they_should(tokens, target):
    steps, left = halvings(tokens, target), tokens
    for r in steps:
        assert 0 < r <= left // 2
        left -= r
    assert left == min(tokens, target)
    assert halvings(2560, 30) == [1280, 640, 320, 160, 80, 40, 10]  # the paper's


def test_halves_leave_the_last_of_each_run():
    tokens = clips(4)
    out = merge(tokens, amounts=(32, 16, 8, 4))(tokens)
    anchors = 16 * torch.arange(1, 5) - 1
    assert out.sources[0, anchors].tolist() == [0, 1, 2, 3]


def test_the_whole_stands_for_no_patch():
    tokens = clips(4)
    tokens.extras["cls"] = torch.randn(2, 4, 3, 16)
    whole = GlobalTokens(Site((tokens.spec,)), layers=(-3, -2, -1), tagged=True)
    first, local = whole(tokens), merge(tokens)(tokens)
    torch.testing.assert_close(first.values, tokens.extras["cls"].mean(1))
    joined = SequenceConcat(Site((first.spec, local.spec)))(first, local)
    assert torch.equal(joined.sources, local.sources + 3)
    assert joined.sizes.sum() == tokens.sizes.sum()
    marked = Markers(Site((joined.spec,)))(joined)
    assert torch.equal(marked.sources, joined.sources + 1)
    assert torch.equal(marked.values[:, 1:-1], joined.values)
    assert torch.equal(marked.positions[:, 1:-1], joined.positions)
    assert marked.sizes[:, [0, -1]].eq(0).all()


def test_arguments_that_cannot_be():
    tokens = clips(2)
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        merge(tokens, heads=3)
    with pytest.raises(ValueError, match="tokens_per_segment is 1 or more"):
        merge(tokens, tokens_per_segment=0)
    with pytest.raises(ValueError, match="amounts are numbers"):
        merge(tokens, amounts=(3, 0))
    with pytest.raises(ValueError, match="no layers"):
        GlobalTokens(Site((tokens.spec,)), layers=())
