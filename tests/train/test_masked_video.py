"""Videos with tokens removed: what is left means what it means without a gap, and nothing else changes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import losses as logged
from helpers.small_runs import options, recipe, stopping_after, weights
from helpers.tiny import conversations, picture, tiny_model, tiny_processor, tiny_recipe, turn, video
from safetensors.torch import load_file

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import Sample
from mmllm.model.branches import branch_mask
from mmllm.train.context import Stopped
from mmllm.train.objectives.masked_video import MaskedVideo, distances, thinned
from mmllm.train.run import train
from mmllm.train.stage import build_objective


def samples() -> list[Sample]:
    """Videos at different places, an image, text alone, and two media in one conversation."""
    talks = [
        [*messages, turn(f"answer {number} is here", role="assistant")]
        for number, messages in enumerate(conversations())
    ]
    talks.append([turn(picture(7), "and", video(8), "What?"), turn("it moves left", role="assistant")])
    return [Sample(f"s{number}", messages, {}, draw=number) for number, messages in enumerate(talks)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request):
    made = tiny_recipe(llm=request.param)
    return tiny_model(made), tiny_processor(made)


def losses(model, batch, objective) -> dict[str, torch.Tensor]:
    """{term: mean}."""
    terms = objective(model, batch)
    return {name: terms[name].sum / max(1, count) for name, count in objective.counts(batch).items()}


def built(model, **arguments: object) -> MaskedVideo:
    """The objective, with a decoder as wide as the model."""
    torch.manual_seed(0)
    objective = MaskedVideo(**arguments)
    objective.build(model.config.text_config.hidden_size)
    return objective


def test_each_video_loses_its_own_share_and_nothing_else_does(pair):
    model, processor = pair
    objective = built(model)
    batch = objective.prepare(samples(), processor)
    removed, watched = batch["removed"], batch["watched"]
    assert not (removed & watched).any()
    videos = dict.fromkeys(range(len(removed)), 0)
    for row, start, index, _ in batch["visual"]["spans"].tolist():
        spec = batch["visual"]["media"][batch["visual"]["pairs"][index][0]]["spec"]
        count = processor.plan.streams(spec)[0].tokens
        inside = slice(start, start + count)
        if spec.kind == "image":
            assert not removed[row, inside].any() and not watched[row, inside].any()
            continue
        assert (removed | watched)[row, inside].all()
        share = removed[row, inside].sum().item() / count
        assert 0.1 - 1 / count <= share <= 0.7
        videos[row] += count
    assert (removed | watched).sum(1).tolist() == list(videos.values())
    assert len({int(row.sum()) for row in removed if row.any()}) > 1


def test_what_is_removed_depends_on_the_sample_and_its_draw_alone(pair):
    _, processor = pair
    objective, data = MaskedVideo(), samples()
    whole = objective.prepare(data, processor)
    for row, sample in enumerate(data):
        alone = objective.prepare([sample], processor)
        length = alone["removed"].shape[1]
        assert torch.equal(alone["removed"][0], whole["removed"][row, :length])
    again = objective.prepare([replace(sample, draw=sample.draw + 100) for sample in data], processor)
    assert not torch.equal(again["removed"], whole["removed"])


def test_nothing_removed_is_plain_learning(pair):
    model, processor = pair
    objective = built(model, rate=(0, 0), clip=(0, 0), decoder=False)
    batch = objective.prepare(samples(), processor)
    assert not batch["removed"].any()
    plain = super(MaskedVideo, objective).forward(model, batch)["language_modeling"]
    found = losses(model, batch, objective)
    torch.testing.assert_close(found["language_modeling"], plain.sum / plain.count, rtol=1e-5, atol=0)
    assert found["masked_video"].abs() < 1e-5


@torch.no_grad()
def test_tokens_left_keep_their_places_as_if_the_others_were_masked(pair):
    model, processor = pair
    objective = built(model)
    batch = objective.prepare(samples(), processor)
    sequence = model.embed(batch)
    thin = thinned(sequence, batch["removed"])
    assert thin.inputs.mask is not None
    hidden, _ = model.run(thin.inputs)
    segments = torch.where(batch["attention_mask"].bool(), 0, -1)
    mask = branch_mask(segments, model.config.text_config, sequence.embeds.dtype)
    hole = batch["removed"][:, None, None, :] & ~torch.eye(mask.shape[-1], dtype=torch.bool)
    masked = mask & ~hole if mask.dtype == torch.bool else mask.masked_fill(hole, torch.finfo(mask.dtype).min)
    full, _ = model.run(replace(sequence, mask=masked))
    expected = full.gather(1, thin.index[..., None].expand(-1, -1, full.shape[-1]))
    torch.testing.assert_close(hidden[thin.real], expected[thin.real], atol=2e-5, rtol=0)


def test_the_target_has_no_gradient_and_its_prefix_is_enough(pair):
    model, processor = pair
    found = []
    for target in ("prefix", "whole"):
        objective = built(model, target=target)
        batch = objective.prepare(samples(), processor)
        model.zero_grad()
        loss = losses(model, batch, objective)["masked_video"]
        loss.backward()
        found.append(
            (
                loss.detach(),
                {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None},
            )
        )
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=1e-5, rtol=1e-4)
    # with a target that learns too, the gradient is another one
    batch = objective.prepare(samples(), processor)
    model.zero_grad()
    sequence = model.embed(batch)
    thin = thinned(sequence, batch["removed"])
    ours, theirs = model.run(thin.inputs)[0][thin.gather(batch["watched"])], model.run(sequence)[0][batch["watched"]]
    distances(objective.decoder(ours), theirs).mean().backward()
    table = "model.language_model.embed_tokens.weight"
    attached = dict(model.named_parameters())[table].grad
    assert (attached - found[0][1][table]).norm() > 0.1 * attached.norm()


def test_removed_tokens_get_no_gradient_and_the_rest_does(pair):
    model, processor = pair
    objective = built(model)
    batch = objective.prepare(samples(), processor)
    sequence = model.embed(batch)
    embeds = sequence.embeds.detach().requires_grad_()
    real_embed, model.embed = model.embed, lambda _: replace(sequence, embeds=embeds)
    try:
        sum(losses(model, batch, objective).values()).backward()
    finally:
        model.embed = real_embed
    assert embeds.grad[batch["removed"]].eq(0).all()
    assert embeds.grad[batch["watched"]].abs().sum(-1).gt(0).all()


def test_dropout_is_off_in_the_target_and_back_afterwards(pair):
    model, processor = copy.deepcopy(pair[0]).train(), pair[1]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    objective = built(model, rate=(0, 0), clip=(0, 0), decoder=False)
    batch = objective.prepare(samples(), processor)
    assert losses(model, batch, objective)["masked_video"] > 1e-3  # one side alone drops
    first, second = (objective._in_full(model, model.embed(batch), batch["watched"]) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(module.training for module in model.model.language_model.modules())


def test_cosine_alone_counts():
    one, other = torch.randn(5, 8), torch.randn(5, 8)
    found = distances(one, other)
    assert (found >= 0).all() and (found <= 4).all()
    torch.testing.assert_close(distances(3 * one, 0.1 * other), found)
    torch.testing.assert_close(distances(one, -one), torch.full((5,), 4.0))
    assert distances(one.bfloat16(), one.bfloat16()).dtype == torch.float32
    assert distances(torch.zeros(2, 8), other[:2]).eq(2).all()


def test_the_authors_place_is_that_of_the_first_row(pair):
    model, processor = pair
    same, other = samples()[3:4] * 2, samples()[3:5]
    for data, equal in ((same, True), (other, False)):
        ours, theirs = (built(model, **how) for how in ({"positions": "compact"}, {"reference": True}))
        batch = theirs.prepare(data, processor)
        found = [losses(model, batch, objective)["masked_video"] for objective in (ours, theirs)]
        assert torch.isclose(*found, atol=1e-5) == equal


def test_groups_of_rows_change_nothing(pair):
    model, processor = pair
    found = []
    for groups in (1, 3):
        objective = built(model, groups=groups)
        found.append(losses(model, objective.prepare(samples(), processor), objective))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_video_trains_the_decoder_by_nothing(pair):
    model, processor = pair
    objective = built(model)
    batch = objective.prepare(samples()[:2], processor)
    loss = sum(term.weight * term.sum for term in objective(model, batch).values())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in objective.parameters())


def test_a_stopped_run_goes_on_with_the_masks_it_would_have_had(data, tmp_path, monkeypatch):
    made = recipe(data, objective={"type": "masked_video"}, steps=7)  # three steps per epoch
    train(made, tmp_path / "whole", options())
    with stopping_after(4, monkeypatch), pytest.raises(Stopped):
        train(made, tmp_path / "cut", options())
    checkpoint = tmp_path / "cut/stages/1-instruct/checkpoint-4"
    assert set(load_file(checkpoint / "objective.safetensors")) == {
        f"decoder.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    train(made, tmp_path / "cut", options())
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and not any("decoder" in name for name in whole)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_every_epoch_masks_anew(data, tmp_path):
    made = recipe(data, objective={"type": "masked_video"}, steps=9, batch=12, lr=0.0)
    train(made, tmp_path, options())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len({line["removed"] for line in lines}) > 5
    assert all(0.1 < line["removed"] < 0.7 for line in lines)


def test_arguments_that_cannot_be():
    for section, said in (
        ({"clip": [0.5, 0.2]}, "clip: must be shares"),
        ({"clip": [0.5, 1.0]}, "clip: must be shares"),
        ({"rate": [0.5, -1]}, "rate: its deviation"),
        ({"weight": -1}, "weight: must be 0 or more"),
    ):
        with pytest.raises(UserError, match=said):
            build_objective({"type": "masked_video", **section}, "stages.x.objective")


def test_without_a_weight_there_is_no_second_reading(pair):
    model, processor = pair
    model = copy.deepcopy(model).train()
    only, both = (built(model, weight=weight) for weight in (0.0, 1.0))
    batch = only.prepare(samples(), processor)
    terms = losses(model, batch, only)
    assert set(terms) == {"language_modeling", "removed"} and not list(only.parameters())
    torch.testing.assert_close(terms["language_modeling"], losses(model, batch, both)["language_modeling"])
