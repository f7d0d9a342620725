"""The distillation objective in our models: what the teacher reads, and that it learns nothing."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.objectives import distilled, teacher_of
from helpers.small_runs import losses, options, recipe, stopping_after, weights
from helpers.tiny import tiny_model, tiny_processor, tiny_recipe, tokenizer_folder

from mmllm.api import load
from mmllm.contract.errors import UserError
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.run_folder import RunFolder
from mmllm.train.context import StageContext
from mmllm.train.data import load_data
from mmllm.train.objectives.distillation import Distillation
from mmllm.train.run import check, train


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    return teacher_of(data, tmp_path_factory.mktemp("teacher"))


def bound(data, teacher, tmp_path, **changes) -> tuple[Distillation, StageContext, list]:
    """An objective with its teacher loaded, and some samples."""
    made = recipe(data, objective=distilled(teacher))
    blueprint = Blueprint.of(made)
    torch.manual_seed(1)
    model, processor = build_model(blueprint).eval(), build_processor(blueprint)
    context = StageContext(
        "instruct", 1, made.stages["instruct"], made, model, processor, RunFolder(tmp_path), options()
    )
    objective = Distillation(teacher=str(teacher), **changes)
    objective.bind(context)
    data = load_data(made.stages["instruct"], made)
    return objective, context, [data[index] for index in range(4)]


def loss_of(objective, model, batch) -> torch.Tensor:
    counts = objective.counts(batch)
    terms = objective(model, batch)
    assert set(terms) == set(counts)
    return sum(term.weight * term.sum / max(1, counts[name]) for name, term in terms.items())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "skew_forward", "skew_reverse", "js", "tv"])
@pytest.mark.parametrize("over", ["sample", "batch"])
def test_terms_are_those_of_the_plain_form(data, teacher, tmp_path, divergence, over):
    """Whole logits of both models, over clips and a text-only sample."""
    from mmllm.train.objectives.divergences import DIVERGENCES

    objective, context, samples = bound(data, teacher, tmp_path, divergence=divergence, relation_over=over)
    batch = objective.prepare(samples, context.processor)
    assert sorted(batch["seen"])[0] == 0 < sorted(batch["seen"])[-1]
    model, other = context.model, load(teacher)[0]
    with torch.no_grad():
        hidden = [side.run(side.embed(own))[0] for side, own in ((model, batch), (other, batch["teacher"]))]
    assert torch.equal(batch["input_ids"], batch["teacher"]["input_ids"])
    student, theirs = (side.lm_head(states) for side, states in zip((model, other), hidden, strict=True))
    cut = objective.vocabulary
    assert cut < student.shape[-1]
    apart = DIVERGENCES[divergence](student[..., :cut], theirs[..., :cut], objective.skew)
    scored, visual = batch["labels"][:, 1:] != -100, model.embed(batch).visual
    relations, sides = [], []
    for row in range(len(samples)):
        if visual[row].any():
            z = [side[row][visual[row]] for side in (student, theirs)]
            sides.append([(own @ own.T).flatten() for own in z])
            relations.append(1 - torch.nn.functional.cosine_similarity(*sides[-1], dim=0))
    if over == "batch":
        whole = [torch.cat([side[index] for side in sides]) for index in (0, 1)]
        relations = [1 - torch.nn.functional.cosine_similarity(*whole, dim=0)]
    terms, counts = objective(model, batch), objective.counts(batch)
    expected = {
        "language_modeling": torch.nn.functional.cross_entropy(
            student[:, :-1][scored], batch["labels"][:, 1:][scored], reduction="sum"
        ),
        "response": apart[:, :-1][scored].sum(),
        "visual": apart[visual].sum(),
        "relation": torch.stack(relations).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].sum, value, rtol=2e-4, atol=2e-5, msg=name)
        assert terms[name].count == counts[name]


def test_the_teacher_is_no_part_of_the_student(data, teacher, tmp_path):
    objective, context, samples = bound(data, teacher, tmp_path)
    (held,) = objective._teacher
    assert not list(objective.parameters())
    assert not held.training
    assert not any(parameter.requires_grad for parameter in held.parameters())
    before = {name: value.clone() for name, value in held.state_dict().items()}
    context.model.train()
    loss_of(objective, context.model, objective.prepare(samples, context.processor)).backward()
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())
    assert all(parameter.grad is None for parameter in held.parameters())
    assert not held.training


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(data, teacher, tmp_path):
    objective, context, samples = bound(data, teacher, tmp_path)
    model = load(teacher)[0]
    terms = objective(model, objective.prepare(samples, context.processor))
    for name in ("response", "visual", "relation"):
        assert abs(float(terms[name].sum.detach())) < 1e-4, name


def test_centring_shows_relations_that_a_common_offset_hides(data, teacher, tmp_path):
    objective, context, samples = bound(data, teacher, tmp_path)
    batch = objective.prepare(samples, context.processor)
    plain = float(objective(context.model, batch)["relation"].sum.detach())
    objective.relation_center = True
    assert float(objective(context.model, batch)["relation"].sum.detach()) > 2 * plain


def test_a_clip_is_decoded_once_for_both(data, teacher, tmp_path, monkeypatch):
    objective, context, samples = bound(data, teacher, tmp_path)
    read = []
    real = type(context.processor.loader).load
    monkeypatch.setattr(type(context.processor.loader), "load", lambda *args: read.append(args[1]) or real(*args))
    batch = objective.prepare(samples, context.processor)
    assert len(read) == len(batch["visual"]["media"]) == len(batch["teacher"]["visual"]["media"])


def test_training_learns_and_resumes_and_accumulates(data, teacher, tmp_path, monkeypatch):
    from mmllm.train.context import Stopped

    made = recipe(data, objective=distilled(teacher))
    train(made, tmp_path / "straight", options())
    straight = losses(tmp_path / "straight")
    assert straight[-1] < straight[0]
    lines = [json.loads(line) for line in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
    assert {"language_modeling", "response", "visual", "relation", "grad_norm"} <= set(lines[0])
    assert not any("teacher" in name for name in weights(tmp_path / "straight"))
    train(recipe(data, objective=distilled(teacher), micro_batch=1), tmp_path / "four", options())
    assert losses(tmp_path / "four") == pytest.approx(straight, abs=5e-5)
    with stopping_after(3, monkeypatch), pytest.raises(Stopped):
        train(made, tmp_path / "cut", options())
    train(made, tmp_path / "cut", options())
    assert losses(tmp_path / "cut") == straight


def test_terms_between_two_lines_survive_a_stop(data, teacher, tmp_path, monkeypatch):
    """Lines every four steps, a stop after the third: the fourth's line averages all four."""
    from mmllm.train.context import Stopped

    made, asked = recipe(data, objective=distilled(teacher), steps=5), options(log_steps=4)
    train(made, tmp_path / "straight", asked)
    with stopping_after(3, monkeypatch), pytest.raises(Stopped):
        train(made, tmp_path / "cut", asked)
    train(made, tmp_path / "cut", asked)
    both = [
        [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (tmp_path / run / "log.jsonl").open()]
        for run in ("straight", "cut")
    ]
    assert both[0] == both[1]


def test_unequal_visual_tokens_are_refused_with_the_way_out(data, teacher, tmp_path):
    made = recipe(data, objective=distilled(teacher))
    made.model["connector"] = [{"type": "mlp", "width": "llm", "name": "mlp", "in": ["nano"]}]
    made.model["connector"].append({"type": "pool", "kernel": [1, 3, 3], "name": "pool", "in": ["mlp"]})
    made.model["output"] = "pool"
    with pytest.raises(UserError, match=r"visual tokens: student 4, teacher 36.*objective\.visual=0 and obj"):
        check(made, tmp_path, options())
    made.data["stages"]["instruct"]["objective"] |= {"visual": 0, "relation": 0}
    train(made, tmp_path, options())
    assert len(losses(tmp_path)) == 6


def test_another_vocabulary_is_refused(data, teacher, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    student = recipe(data, objective=distilled(teacher))
    student.model["llm"]["tokenizer"] = str(folder)
    with pytest.raises(UserError, match=r"another vocabulary: it lacks 1 of the student's tokens \('zebra' \.\.\.\)"):
        check(student, tmp_path / "run", options())


def test_no_teacher_is_said_before_the_first_step(data, tmp_path):
    with pytest.raises(UserError, match="no such folder, expected a run folder, a model folder"):
        check(recipe(data, objective=distilled(tmp_path / "none")), tmp_path / "run", options())


def test_the_relation_of_frozen_heads_is_computed_once(data, teacher, tmp_path):
    objective, context, samples = bound(data, teacher, tmp_path)
    context.model.lm_head.requires_grad_(False)
    batch = objective.prepare(samples, context.processor)
    loss_of(objective, context.model, batch)
    first = dict(objective._grams)
    loss_of(objective, context.model, batch)
    assert set(first) == {0, 1}
    assert all(objective._grams[index] is gram for index, gram in first.items())


def test_a_wider_teacher_of_another_size(data, tmp_path):
    """Hidden sizes and logit widths may differ; what is compared are the ids that both have."""
    other = recipe(data, steps=1)
    other.model["llm"]["config"].update(hidden_size=96, num_attention_heads=4, vocab_size=800)
    train(other, tmp_path / "teacher", options())
    train(recipe(data, objective=distilled(tmp_path / "teacher")), tmp_path / "run", options())
    said = (tmp_path / "run/events.txt").read_text()
    assert "ids equal; logits 800, 768 wide: padding rows left out" in said
    assert tiny_recipe().model["llm"]["config"]["vocab_size"] == 768


def test_a_student_with_coordinates_is_refused(data, teacher, tmp_path):
    made = tiny_recipe("nano/llava_st")
    model, processor = tiny_model(made), tiny_processor(made)
    context = StageContext(
        "instruct", 1, made.stages["instruct"], made, model, processor, RunFolder(tmp_path), options()
    )
    with pytest.raises(UserError, match="words that no teacher scores"):
        Distillation(teacher=str(teacher)).bind(context)
