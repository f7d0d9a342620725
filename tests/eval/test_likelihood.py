"""The likelihood of options: branches of one prompt say what every option says in a row of its own."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import frames, picture, tiny_model, tiny_processor, tiny_recipe, turn, video, write_video

import mmllm
from mmllm.eval.answerer import ModelAnswerer
from mmllm.eval.benchmarks import BENCHMARKS
from mmllm.eval.likelihood import option_ids
from mmllm.eval.protocol import CANONICAL, LIKELIHOOD
from mmllm.eval.report import Report
from mmllm.eval.report_files import render
from mmllm.eval.runner import run_benchmark

OPTIONS = [["red", "a blue square moves to the left", "no"], ["yes", "moves left then up"]]


@pytest.fixture(scope="module")
def pair():
    """(model, processor)."""
    recipe = tiny_recipe()
    return tiny_model(recipe), tiny_processor(recipe)


def conversations():
    """Prompts of unequal length."""
    return [[turn(video(1), "What moves, and where to, in this video?")], [turn(picture(2), "Is it red?")]]


@pytest.mark.parametrize("reduce", [None, "random", "merge"])
@torch.no_grad()
def test_branches_are_rows_of_their_own(pair, reduce):
    model, processor = pair
    mmllm.reduce(model, reduce, keep=reduce and 0.5)
    found = ModelAnswerer(model, processor).score_options(conversations(), OPTIONS, frames=None)
    for conversation, options, scores in zip(conversations(), OPTIONS, found, strict=True):
        batch = processor.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        start = batch["input_ids"].shape[1]
        for ids, score in zip(option_ids(processor, conversation, options), scores, strict=True):
            row = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
            logits = model(row, torch.ones_like(row), visual=batch["visual"]).logits[0, start - 1 : -1]
            wanted = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
            assert score == pytest.approx(wanted.item(), abs=2e-4)
    mmllm.reduce(model, None)


def test_an_option_is_cut_into_tokens_as_in_an_answer(pair):
    _, processor = pair
    (conversation, _), text = conversations(), OPTIONS[0][1]
    (ids,) = option_ids(processor, conversation, [text])
    assert processor.tokenizer.decode(ids) == text
    whole = processor.encode([*conversation, {"role": "assistant", "content": text}])
    learned = [label for label in whole.labels if label != -100]
    assert learned[:-1] == ids and learned[-1] == processor.tokenizer.eos_token_id


def test_the_likeliest_option_is_the_answer(mvbench_root, tmp_path):
    class Scores:
        """Finds the second option likeliest."""

        def score_options(self, conversations, options, *, frames):
            return [[-3.0, -1.0, *[-2.0] * (len(some) - 2)] for some in options]

    report = run_benchmark(BENCHMARKS["mvbench"], mvbench_root, Scores(), tmp_path / "out", LIKELIHOOD, baselines=())
    assert report.average == 25.0 and report.unparsed == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {row["response"] for row in rows} == {"(B)"}
    assert LIKELIHOOD.folder != CANONICAL.folder and CANONICAL.hash == "b9be3db7"


def test_a_model_is_evaluated_by_likelihood(pair, mvbench_root, tmp_path):
    model, processor = pair
    clip = write_video(tmp_path / "clip.mp4", frames(0, 8)).read_bytes()
    for path in mvbench_root.rglob("*.mp4"):
        path.write_bytes(clip)
    options = {"root": mvbench_root, "protocol": "likelihood", "baselines": ("blind",), "missing": "skip", "limit": 1}
    report = mmllm.evaluate(model, processor, "mvbench", out=tmp_path / "out", **options)
    assert report.protocol == "likelihood" and report.scored > 0 and report.unparsed == 0
    assert report.visual_tokens == 4 * 9
    mmllm.reduce(model, "random", keep=0.5)
    halved = mmllm.evaluate(
        model, processor, "mvbench", out=tmp_path / "halved", **{**options, "protocol": "canonical"}
    )
    assert halved.visual_tokens == 2 * 9 and Report.read(halved.folder).visual_tokens == 2 * 9
    assert "averaged over the LLM's layers: 18.0" in render(halved)
    mmllm.reduce(model, None)
