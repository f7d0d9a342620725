"""Video-ChatGPT's means: one for each frame, then one for each place."""

from __future__ import annotations

import torch

from mmllm.contract.parts import Site
from mmllm.contract.registry import find
from mmllm.contract.types import Grid, MediaSpec
from mmllm.encoders.common.tokens import at_times, frame_tokens


def test_frames_come_first_then_places():
    """Three frames of two places: token (t, place) has the value 10 t + place."""
    values = torch.tensor([[[10.0 * t + place] for t in range(3) for place in range(2)]])
    given = at_times(frame_tokens(values, MediaSpec("video", 3), Grid(3, 1, 2), 3), torch.tensor([[0.0, 2.0, 7.0]]))
    out = find("connector", "temporal_spatial_mean")(Site((given.spec,), 8))(given)
    assert out.values[0, :, 0].tolist() == [0.5, 10.5, 20.5, 10.0, 11.0]
    assert out.positions[0].tolist() == [
        [0.0, 0.5, 0.5],
        [2.0, 0.5, 0.5],
        [7.0, 0.5, 0.5],
        [3.0, 0.5, 0.25],
        [3.0, 0.5, 0.75],
    ]
    assert out.sizes.tolist() == [[1.0, 1.0, 1.0, 1.5, 1.5]]
