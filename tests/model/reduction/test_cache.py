"""The cache of a reduced prompt under what generating does: rows reordered, repeated, selected, taken back."""

from __future__ import annotations

import torch

from mmllm.model.reduction.cache import ReducedCache


def filled() -> ReducedCache:
    """Two layers of three rows; the second layer is shorter. Values say which row they are of."""
    cache = ReducedCache()
    for layer, length in enumerate((4, 2)):
        values = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, length, 2)
        real = torch.arange(length)[None] >= torch.tensor([[0], [1], [0]])
        cache.note(layer, real, bool(real.all()))
        cache.update(values, values, layer)
    cache.seen = 4
    return cache


def rows_of(cache: ReducedCache) -> list[list[int]]:
    """For each layer the rows that its keys are of, and where padding is, as one number per row."""
    return [
        [
            int(keys[0, 0, 0]) * 10 + int((~real).sum())
            for keys, real in zip(layer.keys, cache.real[number], strict=True)
        ]
        for number, layer in enumerate(cache.layers)
    ]


def test_rows_and_their_padding_stay_together():
    cache = filled()
    assert rows_of(cache) == [[0, 11, 20], [0, 11, 20]]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert rows_of(cache) == [[11, 11, 0]] * 2
    cache.batch_repeat_interleave(2)
    assert rows_of(cache) == [[11, 11, 11, 11, 0, 0]] * 2
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert rows_of(cache) == [[0, 11]] * 2


def test_lengths():
    cache = filled()
    assert cache.get_seq_length() == 4 and [cache.get_seq_length(layer) for layer in range(3)] == [4, 2, 0]
    assert cache.bytes() == 2 * 4 * (3 * 4 * 2 + 3 * 2 * 2)
    cache.crop(-1)
    assert cache.get_seq_length() == 3 and [real.shape[1] for real in cache.real] == [3, 1]
