"""The preference objective in our models: what is scored, read and frozen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.objectives import preference_pairs
from helpers.small_runs import losses, options, recipe

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import Sample
from mmllm.model import modeling
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.train.context import StageContext
from mmllm.train.data import load_data
from mmllm.train.objectives.preference import Preference, encode_pair
from mmllm.train.reference import answer_log_probs
from mmllm.train.run import train


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return preference_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def built(pairs):
    made = recipe(pairs, objective="preference")
    blueprint = Blueprint.of(made)
    torch.manual_seed(1)
    data = load_data(made.stages["instruct"], made)
    return made, build_model(blueprint).eval(), build_processor(blueprint), [data[index] for index in range(8)]


def test_one_row_gives_what_two_give(built, monkeypatch):
    """Log-probabilities and gradients, over videos of unequal length and text alone."""
    _, model, processor, samples = built
    objective = Preference(reference="none", sft=0.3)
    batch = objective.prepare(samples, processor)
    found = []
    for takes in (True, False):
        monkeypatch.setattr(modeling, "takes_masks", lambda config, takes=takes: takes)
        model.zero_grad()
        terms = objective(model, batch)
        counts = objective.counts(batch)
        loss = sum(term.weight * term.sum / counts[name] for name, term in terms.items() if term.weight)
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        found.append((answer_log_probs(model, batch), loss.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-5)
    assert set(found[0][2]) == set(found[1][2])
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][name], atol=1e-5, rtol=1e-3, msg=name)


def test_answers_are_scored_as_plain_conversations_are(built):
    """Against the model's logits over each whole conversation, prompt left out."""
    _, model, processor, samples = built
    batch = Preference(reference="none").prepare(samples, processor)
    found = answer_log_probs(model, batch)
    expected = []
    for sample in samples:
        for name in ("chosen", "rejected"):
            messages = [*sample.messages, {"role": "assistant", "content": sample.fields[name]}]
            alone = processor.collate([processor.encode(messages)])
            with torch.no_grad():
                logits = model(alone["input_ids"], alone["attention_mask"], visual=alone["visual"]).logits
            scored = alone["labels"][:, 1:] != -100
            picked = logits[:, :-1].log_softmax(-1).gather(-1, alone["labels"][:, 1:].clamp_min(0)[..., None])[..., 0]
            expected.append(picked[scored].sum())
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_earlier_answers_are_part_of_the_prompt(built):
    _, _, processor, samples = built
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A red square moves."}]
    pair = encode_pair(replace(samples[0], messages=[*earlier, *samples[0].messages]), processor)
    alone = encode_pair(samples[0], processor)
    assert pair.targets == alone.targets
    assert pair.lengths == alone.lengths


def test_a_clip_is_read_and_encoded_once_for_both_answers(built, monkeypatch):
    _, model, processor, samples = built
    read, encoded = [], []
    real = type(processor.loader).load
    monkeypatch.setattr(type(processor.loader), "load", lambda *args: read.append(1) or real(*args))
    hook = model.model.front_end.bank.encoders["nano"].register_forward_pre_hook(
        lambda module, inputs: encoded.append(len(inputs[0]))
    )
    objective = Preference(reference="none")
    objective(model, objective.prepare(samples[:3], processor))
    hook.remove()
    assert (len(read), sum(encoded)) == (3, 3)


def test_references_agree(built, tmp_path):
    """Stored, a frozen copy, and the model with its adapter off; the first loss is log 2, as nothing has moved."""
    made, _, _, _ = built
    found = {}
    for kind in ("stored", "copy", "adapter"):
        changes = {"trains": ["llm.lora"], "lora": {"rank": 2}, "lr": 1e-2}
        chosen = recipe(made.data["stages"]["instruct"]["data"], **changes)
        chosen.data["stages"]["instruct"]["objective"] = {"type": "preference", "reference": kind}
        train(chosen, tmp_path / kind, options())
        found[kind] = losses(tmp_path / kind)
        assert found[kind][0] == pytest.approx(0.693147, abs=1e-6)
        assert found[kind][-1] < 0.69
    assert found["copy"] == pytest.approx(found["stored"], abs=1e-6)
    assert found["adapter"] == pytest.approx(found["stored"], abs=1e-6)


def test_what_was_stored_is_not_computed_again(built, pairs, tmp_path, monkeypatch):
    from mmllm.train import reference

    made = recipe(pairs, objective={"type": "preference"}, steps=1)
    train(made, tmp_path / "run", options())
    (file,) = (tmp_path / "run/stages/1-instruct").glob("reference-*.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 8
    file.write_text("\n".join(lines[:5]) + "\n" + lines[5][:10])  # as a kill leaves it
    asked: list[str] = []
    real = reference.answer_log_probs

    def counted(model, batch):
        asked.extend(batch["keys"])
        return real(model, batch)

    monkeypatch.setattr(reference, "answer_log_probs", counted)
    (tmp_path / "run/status.json").write_text(json.dumps({"stages": {}}))
    for folder in [*(tmp_path / "run/stages/1-instruct").glob("checkpoint-*"), tmp_path / "run/model"]:
        shutil.rmtree(folder)
    train(made, tmp_path / "run", options())
    assert len(asked) == 4  # one batch of pairs, of which three were missing


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fields": {"chosen": "left"}}, "rejected: missing, expected a text"),
        ({"fields": {"chosen": "left", "rejected": "left"}}, "its chosen answer is its rejected one"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "ends with an answer",
        ),
    ],
)
def test_what_is_no_pair_is_named(built, change, what):
    _, _, processor, _ = built
    sample = Sample("seven", [{"role": "user", "content": "x"}], {"chosen": "left", "rejected": "right"})
    with pytest.raises(UserError, match=f"sample seven.*{what}"):
        encode_pair(replace(sample, **change), processor)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "simpo", "orpo"])
def test_each_loss_prefers_what_was_chosen(pairs, tmp_path, loss):
    objective = {"type": "preference", "loss": loss, "beta": 0.5, "label_smoothing": 0.1}
    train(recipe(pairs, objective=objective, steps=10, lr=1e-3), tmp_path, options())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["margin"] > lines[0]["margin"] + 0.05
    assert lines[-1]["preference"] < lines[0]["preference"]


def test_an_adapter_as_reference_has_to_leave_the_weights_as_they_are(pairs, tmp_path):
    objective = {"type": "preference", "reference": "adapter"}
    made = recipe(pairs, objective=objective, trains=["llm.lora"], lora={"rank": 2, "init": "nlora"})
    with pytest.raises(UserError, match="init nlora moves the weights below"):
        train(made, tmp_path, options())


def test_an_adapter_as_reference_has_to_be_all_that_trains(built, tmp_path):
    made, model, processor, _ = built
    context = StageContext("instruct", 1, made.stages["instruct"], made, model, processor, None, options())
    with pytest.raises(
        UserError, match=r"reference: adapter: the rest of the model trains too, expected trains: \[llm"
    ):
        Preference(reference="adapter").bind(context)
