"""The loss of a batch is that of its samples, however they lie in it."""

from __future__ import annotations

import pytest
import torch
from helpers.small_runs import recipe

from mmllm.contract.errors import UserError
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_processor


@pytest.mark.parametrize("groups", [2, 3, 20])
def test_rows_in_groups_of_similar_length_give_the_same_loss_and_gradients(data, groups):
    from mmllm.model.build import build_model
    from mmllm.train.data import load_data
    from mmllm.train.objectives.language_modeling import LanguageModeling

    made = recipe(data)
    processor, model = (
        build_processor(Blueprint.of(made)),
        build_model(Blueprint.of(made)).double(),
    )  # sums in another order
    samples = [load_data(made.stages["instruct"], made)[index] for index in range(7)]
    found = []
    for objective in (LanguageModeling(), LanguageModeling(groups=groups)):
        model.zero_grad()
        batch = objective.prepare(samples, processor)
        term = objective(model, batch)["language_modeling"]
        term.sum.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        found.append((sorted(batch["names"]), term.count, term.sum, gradients))
    lengths = batch["attention_mask"].sum(1).tolist()
    (names, count, loss, gradients), (names_in_groups, count_in_groups, loss_in_groups, gradients_in_groups) = found
    assert names == names_in_groups and count == count_in_groups
    assert lengths == sorted(lengths, reverse=True) and len(batch["groups"]) == min(groups, 7)
    assert [length for _, _, length in batch["groups"]] == [lengths[first] for first, _, _ in batch["groups"]]
    torch.testing.assert_close(loss_in_groups, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == gradients_in_groups.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(gradients_in_groups[name], value, rtol=1e-6, atol=1e-9)


def test_the_padding_of_a_row_is_read_by_nothing_though_there_is_no_mask(data):
    from mmllm.model.build import build_model
    from mmllm.train.data import load_data
    from mmllm.train.objectives.language_modeling import LanguageModeling

    made = recipe(data)
    blueprint, objective = Blueprint.of(made), LanguageModeling()
    processor, model = build_processor(blueprint), build_model(blueprint)
    samples = [load_data(made.stages["instruct"], made)[index] for index in range(7)]
    batch = objective.prepare(samples, processor)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        found = objective(model, batch)["language_modeling"].sum
        hidden, _ = model.run(model.embed(batch))
        logits, targets = model.lm_head(hidden[:, :-1]).transpose(1, 2), batch["labels"][:, 1:]
        masked = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        alone = sum(objective(model, objective.prepare([one], processor))["language_modeling"].sum for one in samples)
    torch.testing.assert_close(found, masked, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)


def test_no_group_is_refused():
    from mmllm.train.stage import build_objective

    with pytest.raises(UserError, match="groups: must be 1 or more, got 0"):
        build_objective({"type": "language_modeling", "groups": 0}, "stages.x.objective")
