#!/usr/bin/env python
"""A step of masked_video against one of language_modeling on the same batches: forward and backward, in turns.

    python scripts/bench/masked_video.py
    python scripts/bench/masked_video.py --rate 0.3 --frames 8 --repeats 3 --out masked.json

`expected` counts tokens: a backward is two forwards, the masked step has a shorter forward and backward, and a forward
without gradient up to the end of the video.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from mmllm.config.recipe import load
from mmllm.data.records.conversations import Sample
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.train.objectives.language_modeling import LanguageModeling
from mmllm.train.objectives.masked_video import MaskedVideo
from mmllm.world.tokenizer import build_tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5, help="share of the tokens that is removed (default 0.5)")
    parser.add_argument("--frames", type=int, default=32, help="of 36 tokens each (default 32)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=896, help="of the LLM (default 896)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    model, processor = _model(options)
    data = _samples(options)
    objectives = {
        "plain": LanguageModeling(),
        "masked": MaskedVideo(rate=(options.rate, 0.0), clip=(options.rate, options.rate)),
    }
    objectives["masked"].build(options.width)
    objectives["masked"].to(options.device)
    batches = {
        name: _moved(objective.prepare(data, processor), options.device) for name, objective in objectives.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for repeat in range(options.repeats + 1):
        for name, objective in objectives.items():
            taken = _step(model, objective, batches[name], options.device)
            if repeat:  # the first one warms up
                seconds[name].append(taken)
    result = _result(seconds, batches["masked"]) | {
        "rate": options.rate,
        "width": options.width,
        "layers": options.layers,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _model(options: argparse.Namespace):
    """nano/aim's encoder without its merging, before an LLM of the asked size; the encoder is frozen."""
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_hidden_layers": options.layers}
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 14, "max_position_embeddings": 4096}
    recipe = load("nano/aim", [f"model.media.frames={options.frames}"])
    recipe.model["connector"] = [node for node in recipe.model["connector"] if node["name"] == "mlp"]
    recipe.model["output"] = "mlp"
    recipe.model["llm"]["config"] |= sizes
    blueprint = Blueprint.of(recipe)
    model = build_model(blueprint).to(options.device).train()
    model.model.front_end.bank.requires_grad_(False)
    return model, build_processor(blueprint, build_tokenizer())


def _samples(options: argparse.Namespace) -> list[Sample]:
    made = []
    for number in range(options.batch):
        clip = np.random.default_rng(number).integers(0, 256, (options.frames, 48, 48, 3), dtype=np.uint8)
        asked = [{"type": "video", "video": clip}, {"type": "text", "text": "What moves?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "The red square moves left."}]
        made.append(Sample(str(number), messages, {}, draw=number))
    return made


def _moved(batch: dict, device: str) -> dict:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _step(model, objective, batch: dict, device: str) -> float:
    model.zero_grad()
    start = time.perf_counter()
    terms = objective(model, batch)
    sum(term.weight * term.sum / max(1, int(term.count)) for term in terms.values()).backward()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _result(seconds: dict[str, list[float]], batch: dict) -> dict[str, float]:
    tokens = batch["attention_mask"].sum().item()
    removed = batch["removed"].sum().item()
    prefix = len(batch["removed"]) * ((batch["removed"] | batch["watched"]).any(0).nonzero().max().item() + 1)
    expected = (3 * (tokens - removed) + prefix) / (3 * tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = [masked / plain for plain, masked in zip(seconds["plain"], seconds["masked"], strict=True)]
    ratio = medians["masked"] / medians["plain"]
    found = {**{f"{name}_seconds": value for name, value in medians.items()}, "ratio": ratio, "expected": expected}
    return {**found, "over_expected": ratio / expected, "tokens": tokens, "lowest": min(pairs), "highest": max(pairs)}


if __name__ == "__main__":
    main()
