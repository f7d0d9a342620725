"""Where fresh tokens are: seconds, and the middle of their cell."""

from __future__ import annotations

import pytest
import torch

from mmllm.contract.types import Grid, MediaSpec
from mmllm.encoders.common.tokens import at_times, frame_tokens, row_times


def test_a_token_is_at_its_frames_second_and_the_middle_of_its_cell():
    made = frame_tokens(torch.zeros(1, 8, 3), MediaSpec("video", 2), Grid(2, 2, 2), 2)
    placed = at_times(made, torch.tensor([[1.0, 4.0]]))
    cells = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]  # y, then x
    assert placed.positions.tolist() == [[[second, *cell] for second in (1.0, 4.0) for cell in cells]]
    assert placed.sizes.tolist() == [[1.0] * 8]


def test_without_a_grid_it_is_in_the_middle():
    made = frame_tokens(torch.zeros(1, 4, 3), MediaSpec("video", 2), None, 2)
    placed = at_times(made, torch.tensor([[1.0, 4.0]]))
    assert placed.positions.tolist() == [[[second, 0.5, 0.5] for second in (1.0, 1.0, 4.0, 4.0)]]


def test_rows_of_several_frames_and_frames_of_several_rows():
    assert row_times(torch.tensor([[0.0, 1.0, 5.0, 7.0]]), 2).tolist() == [[0.5, 6.0]]
    assert row_times(torch.tensor([[2.0, 3.0]]), 4).tolist() == [[2.0, 2.0, 3.0, 3.0]]
    with pytest.raises(ValueError, match="4 frames do not make 3 rows"):
        row_times(torch.zeros(1, 4), 3)
