"""The front end runs the kinds of media of a batch in one order, whatever the batch."""

from __future__ import annotations

from itertools import permutations

import torch
from tiny import picture, tiny_model, tiny_processor, tiny_recipe, turn, video


@torch.no_grad()
def test_kinds_of_media_run_in_the_same_order_in_every_process():
    """Processes have other batches of the same kinds, and meet in what they run; rows stay in the batch's order."""
    recipe = tiny_recipe()
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    front, ran = model.model.front_end, []
    front.bank.encoders["nano"].register_forward_pre_hook(lambda module, inputs: ran.append(inputs[1]))
    media = [picture(1), {**video(2), "frames": 1}, {**video(3), "frames": 2}, video(4)]
    chats = [[turn(medium, "What moves?")] for medium in media]
    alone = []
    for chat in chats:
        alone.append(front(processor.apply_chat_template([chat], tokenize=True, return_dict=True)["visual"])[0])
    assert sorted((spec.kind, spec.frames) for spec in ran) == [("image", 1), ("video", 1), ("video", 2), ("video", 4)]
    orders = set()
    for order in permutations(range(len(media))):
        ran.clear()
        batch = processor.apply_chat_template([chats[i] for i in order], tokenize=True, return_dict=True)
        rows, _ = front(batch["visual"])
        torch.testing.assert_close(rows, torch.cat([alone[i] for i in order]), atol=1e-5, rtol=0)
        orders.add(tuple(ran))
    assert len(orders) == 1
