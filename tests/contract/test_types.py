"""What belongs to tokens when they are blended, picked and repeated."""

from __future__ import annotations

import pytest
import torch

from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


def line(sizes: list[float]) -> VisualTokens:
    """One clip of tokens in a row: token i is at second i and has the value i."""
    count = len(sizes)
    numbers = torch.arange(float(count))
    positions = torch.stack([numbers, torch.full((count,), 0.5), torch.full((count,), 0.25)], dim=-1)[None]
    media = MediaSpec("video", count)
    return VisualTokens(
        numbers[None, :, None], media, Grid(count, 1, 1), positions, torch.tensor([sizes]), numbers[None]
    )


def test_a_blend_shares_each_tokens_size_among_those_that_take_of_it():
    """Means of three, one and two tokens; the last old token goes to two new ones, a third and two thirds of it."""
    given = line([4.0, 2.0, 1.0, 6.0])
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5]])
    out = given.derive(torch.zeros(1, 3, 1), None, weights=weights)
    # token 0 and 2 are the first one's alone; token 1 is shared 1 : 2, token 3 is shared 2 : 1
    torch.testing.assert_close(out.sizes, torch.tensor([[4 + 2 / 3 + 1, 4, 4 / 3 + 2]]))
    torch.testing.assert_close(out.positions[0, :, 0], torch.tensor([0.75, 3.0, 2.0]))
    torch.testing.assert_close(out.positions[0, :, 1:], torch.tensor([[0.5, 0.25]]).expand(3, -1))
    each = given.derive(torch.zeros(1, 3, 1), None, weights=weights[None])
    assert torch.equal(each.sizes, out.sizes) and torch.equal(each.positions, out.positions)


def test_a_pick_takes_sizes_along_and_a_separator_stands_for_nothing():
    out = line([4.0, 2.0, 1.0]).derive(torch.zeros(1, 4, 1), None, index=torch.tensor([2, -1, 0, 2]))
    assert out.sizes.tolist() == [[1, 0, 4, 1]]
    assert out.positions[0, [0, 2, 3], 0].tolist() == [2, 0, 2]


def test_either_weights_or_an_index():
    given = line([1.0, 1.0])
    weights, index = torch.eye(2), torch.arange(2)
    for wrong in ({}, {"weights": weights, "index": index}):
        with pytest.raises(ValueError, match="either weights or index"):
            given.derive(given.values, None, **wrong)


def test_a_grid_that_does_not_hold_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"a grid of 2x3x4 has 24 tokens, not 23"):
        TokenSpec(MediaSpec("video", 2), 23, 8, Grid(2, 3, 4))


def test_media_have_one_order_whatever_they_lack():
    media = [
        MediaSpec("image", 1),
        MediaSpec("image", 5, (2, 2), (20, 24)),
        MediaSpec("image", 5, (2, 2)),
        MediaSpec("video", 4),
        MediaSpec("video", 2),
    ]
    one, other = (sorted(order, key=lambda spec: spec.sort_key) for order in (media, media[::-1]))
    assert one == other
    assert len({spec.sort_key for spec in media}) == len(media)
