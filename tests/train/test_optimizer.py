"""Muon beside AdamW: which parameter goes where, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import torch
from helpers.tiny import tiny_model, tiny_recipe

from mmllm.train.optimizer import muon, split


def step(model, optimizer, seed: int) -> None:
    """One step on a random quadratic."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in model.parameters())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_hidden_matrices_get_muon():
    model = tiny_model(tiny_recipe())
    model.requires_grad_(True)
    hidden, matrices, rest = split(model)
    names = {id(value): name for name, value in model.named_parameters()}
    assert all("proj" in names[id(v)] or "layers" in names[id(v)] for v in hidden)
    assert {names[id(v)] for v in matrices} >= {"model.language_model.embed_tokens.weight"}
    assert len(hidden) + len(matrices) + len(rest) == len(list(model.parameters()))
    model.model.language_model.requires_grad_(False)
    assert len(split(model)[0]) == 2


def test_a_head_of_its_own_is_no_hidden_matrix():
    recipe = tiny_recipe()
    recipe.model["llm"]["config"]["tie_word_embeddings"] = False
    model = tiny_model(recipe)
    model.requires_grad_(True)
    hidden, matrices, _ = ({id(value) for value in group} for group in split(model))
    for table in (model.lm_head.weight, model.get_input_embeddings().weight):
        assert id(table) in matrices and id(table) not in hidden
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_its_state_continues_exactly():
    straight, resumed = tiny_model(tiny_recipe()), tiny_model(tiny_recipe())
    one = muon(straight, 1e-3, 1e-2, 0.01)
    for seed in range(4):
        step(straight, one, seed)
    two = muon(resumed, 1e-3, 1e-2, 0.01)
    for seed in range(2):
        step(resumed, two, seed)
    again = muon(resumed, 1e-3, 1e-2, 0.01)
    again.load_state_dict(two.state_dict())
    for seed in range(2, 4):
        step(resumed, again, seed)
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_scheduler_reaches_both():
    model = tiny_model(tiny_recipe())
    optimizer = muon(model, 1e-3, 1e-2, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: value.clone() for name, value in model.named_parameters()}
    scheduler.step()
    assert [group["lr"] for inner in optimizer.inner for group in inner.param_groups] == [5e-3, 5e-4, 5e-4]
    step(model, optimizer, 0)
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
