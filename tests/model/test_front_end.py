"""Processes that train together run the same parts, whatever their batches."""

from __future__ import annotations

from itertools import permutations

import torch
from helpers.tiny import picture, tiny_model, tiny_processor, tiny_recipe, turn, video


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


def test_a_batch_without_clips_touches_every_parameter_and_changes_nothing(monkeypatch):
    """Beside processes that have clips; gradients of the front end are there, and zero."""
    recipe = tiny_recipe()
    model, processor = tiny_model(recipe), tiny_processor(recipe)
    batch = processor.collate([processor.encode([turn("What moves?"), turn("left", role="assistant")])])
    alone = model(**batch).logits
    monkeypatch.setattr(type(model.model), "is_distributed_training", lambda self: True)
    output = model(**batch)
    assert torch.equal(output.logits, alone)
    output.loss.backward()
    for name, parameter in model.model.front_end.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
