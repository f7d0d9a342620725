"""Pooled features of clips and texts, for objectives that compare them."""

from __future__ import annotations

import torch
from helpers.tiny import picture, tiny_model, tiny_processor, tiny_recipe, turn, video


@torch.no_grad()
def test_a_clips_feature_is_the_mean_of_its_own_rows():
    """An image and a clip of four frames have other numbers of rows."""
    recipe = tiny_recipe()
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    chats = [[turn(picture(1), "What?")], [turn(video(2), "What?")]]
    batch = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    rows, _ = model.model.front_end(batch["visual"])
    first, second = (count for *_, count in _spans(processor, batch))
    assert first != second and first + second == len(rows)
    expected = torch.stack([rows[:first].mean(0), rows[first:].mean(0)])
    torch.testing.assert_close(model.pooled_images(batch), expected)


def _spans(processor, batch) -> list[tuple[int, int]]:
    """(pair, rows) of each pair."""
    visual = batch["visual"]
    specs = [visual["media"][clip]["spec"] for clip, _ in visual["pairs"]]
    counts = [sum(stream.tokens for stream in processor.plan.streams(spec)) for spec in specs]
    return list(enumerate(counts))
