"""What each part of a graph gets of what all parts asked for together."""

from __future__ import annotations

import pytest
import torch

from mmllm.contract.errors import UserError
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.connector_graph import own_prompt, parse_positions, reachable, select_hidden_states, union_needs


def test_each_part_gets_its_own_layers_in_its_own_order():
    one, two = (
        Needs(hidden_states=(-1, -4), prompt_hidden_states=(2,)),
        Needs(hidden_states=(-2, -1), cls=(-3,), prompt_hidden_states=(1, 2)),
    )
    union = union_needs([one, two])
    assert (union.hidden_states, union.cls, union.prompt_hidden_states) == ((-1, -4, -2), (-3,), (2, 1))
    tokens = frame_tokens(torch.zeros(1, 2, 1), MediaSpec("video", 2), Grid(2, 1, 1), 2)
    numbers = torch.tensor([-1.0, -4.0, -2.0]).view(1, 1, 3, 1).expand(1, 2, 3, 1)
    tokens.extras = {"hidden_states": numbers, "cls": torch.full((1, 2, 1, 1), -3.0)}
    assert select_hidden_states(tokens, one, union).extras.keys() == {"hidden_states"}
    assert select_hidden_states(tokens, one, union).extras["hidden_states"][0, 0, :, 0].tolist() == [-1, -4]
    found = select_hidden_states(tokens, two, union).extras
    assert found["hidden_states"][0, 1, :, 0].tolist() == [-2, -1] and found["cls"][0, 0, 0, 0] == -3
    ids = torch.zeros(1, 1, dtype=torch.long)
    prompt = PromptFeatures(ids, ids + 1, hidden_states=torch.tensor([2.0, 1.0]).view(1, 1, 2, 1))
    assert own_prompt(prompt, two, union).hidden_states.flatten().tolist() == [1, 2]
    assert own_prompt(prompt, one, union).hidden_states.flatten().tolist() == [2]


def test_only_what_the_output_reads_is_reached():
    inputs = {"a": ["clip"], "b": ["a", "dino"], "c": ["clip"], "d": ["c"]}
    assert reachable(inputs, {"video": ["b"], "image": ["a"]}) == {"a", "b", "clip", "dino"}


def test_a_stream_stands_at_the_start_or_where_its_medium_is():
    output = {"video": ["mlp", "gate"], "image": ["mlp"]}
    assert parse_positions({"gate": "start"}, output, "place") == {"gate"}
    with pytest.raises(UserError, match=r"place\.gate: unknown place, expected start, got end"):
        parse_positions({"gate": "end"}, output, "place")
