#!/usr/bin/env python
"""A preference step of ours against TRL's on the same text model and pairs, and against a plain form of ours on video.

    python scripts/bench/preference.py --world runs/world-tiny
    python scripts/bench/preference.py --world runs/world-nano --repeats 10 --out preference.json

text: pairs of random tokens through a small Llama; TRL with its reference model and with its reference computed before.
video: nano/dpo's pairs; the plain form runs policy and reference over every answer, and encodes each clip every time.
A step is a forward and a backward. Memory is the peak beyond what stands before the step, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], Tensor]
PROMPT, ANSWER, PAIRS = 256, 48, 8
VOCABULARY = 32_000


def text_model() -> torch.nn.Module:
    """A small Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, **sizes)
    return AutoModelForCausalLM.from_config(config)


def rows() -> dict[str, Tensor]:
    """TRL's batch: all chosen, then all rejected."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCABULARY, (PAIRS, PROMPT), generator=generator)
    answers = torch.randint(3, VOCABULARY, (2 * PAIRS, ANSWER), generator=generator)
    ids = torch.cat([prompt.repeat(2, 1), answers], dim=1)
    scored = torch.zeros_like(ids)
    scored[:, PROMPT:] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": scored}


def trl_step(precomputed: bool) -> Step:
    """TRL's loss; its reference run in every step, or given."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    folder = tempfile.mkdtemp()
    text_model().save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    config = DPOConfig(output_dir=folder, loss_type=["sigmoid"], **settings)
    records = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=records, processing_class=_letters(PreTrainedTokenizerFast)
    )
    batch = rows()
    if precomputed:
        trainer.precompute_ref_logps, trainer.ref_model = True, None
        batch |= {"ref_chosen_logps": torch.zeros(PAIRS), "ref_rejected_logps": torch.zeros(PAIRS)}
    model.train()

    def step() -> Tensor:
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        return loss.detach()

    return step


def _letters(cls: type) -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def our_text_step() -> Step:
    """One row per pair, the reference stored."""
    from mmllm.contract.types import LLMInputs
    from mmllm.model.branches import branch_mask
    from mmllm.model.head import Head
    from mmllm.train.objectives.preference import Preference

    model, given = text_model(), rows()
    head = Head(256, VOCABULARY)
    head.weight = model.lm_head.weight
    ids = torch.cat([given["input_ids"][:PAIRS], given["input_ids"][PAIRS:, PROMPT:]], dim=1)
    length, own = ids.shape[1], PROMPT + ANSWER
    positions = torch.tensor([*range(own), *range(PROMPT, own)]).expand(PAIRS, -1)
    segments = torch.tensor([0] * PROMPT + [1] * ANSWER + [2] * ANSWER).expand(PAIRS, -1)
    at = [*range(PROMPT - 1, own - 1), PROMPT - 1, *range(own, length - 1)]
    sources = torch.tensor([row * length + source for row in range(PAIRS) for source in at])
    batch = {"targets": ids[:, PROMPT:].flatten(), "lengths": [ANSWER] * (2 * PAIRS)}
    objective, reference = Preference(reference="none"), torch.zeros(2 * PAIRS)
    model.train()

    def step() -> Tensor:
        model.zero_grad()
        inputs = LLMInputs(model.get_input_embeddings()(ids), None, positions, segments > 9, segments)
        mask = branch_mask(segments, model.config, inputs.embeds.dtype)
        hidden = model.model(inputs_embeds=inputs.embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        scored = hidden.last_hidden_state.flatten(0, 1)[sources]
        loss = objective.score(head, scored, batch, reference)["preference"] / PAIRS
        loss.backward()
        return loss.detach()

    return step


def video_steps(world: str) -> dict[str, Step]:
    """nano/dpo: our step with a stored reference, and four forwards over whole rows with logits at once."""
    from mmllm.config.recipe import load
    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model, build_processor
    from mmllm.train.data import load_data
    from mmllm.train.objectives.preference import Preference

    recipe = load("nano/dpo", [f"roots.world={world}"])
    blueprint = Blueprint.of(recipe)
    torch.manual_seed(0)
    model, processor = build_model(blueprint), build_processor(blueprint)
    data = load_data(recipe.stages["dpo"], recipe)
    samples = [data[index] for index in range(PAIRS)]
    objective = Preference(reference="none")
    batch, model = objective.prepare(samples, processor), model.train()
    reference = torch.zeros(2 * PAIRS)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    answers = {}
    for name in ("chosen", "rejected"):
        ends = [{"role": "assistant", "content": sample.fields[name]} for sample in samples]
        rows = [
            processor.encode([*sample.messages, end], answers="last") for sample, end in zip(samples, ends, strict=True)
        ]
        answers[name] = processor.collate(rows)

    def ours() -> Tensor:
        model.zero_grad()
        hidden = model.run(model.embed(batch))[0].flatten(0, 1)[batch["sources"]]
        loss = objective.score(model.lm_head, hidden, batch, reference)["preference"] / PAIRS
        loss.backward()
        return loss.detach()

    def log_probs(which: torch.nn.Module, own: dict) -> Tensor:
        logits = which(own["input_ids"], own["attention_mask"], visual=own["visual"]).logits[:, :-1].log_softmax(-1)
        labels = own["labels"][:, 1:]
        return (logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)).sum(1)

    def four() -> Tensor:
        model.zero_grad()
        policy = {name: log_probs(model, own) for name, own in answers.items()}
        with torch.no_grad():
            other = {name: log_probs(frozen, own) for name, own in answers.items()}
        margin = (policy["chosen"] - other["chosen"]) - (policy["rejected"] - other["rejected"])
        loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
        loss.backward()
        return loss.detach()

    return {"ours, video": ours, "four forwards, video": four}


def steps(name: str, world: str) -> Step:
    """A step by its name."""
    if "video" in name:
        return video_steps(world)[name]
    made = {"ours, text": our_text_step, "TRL, text": lambda: trl_step(False), "TRL, stored": lambda: trl_step(True)}
    return made[name]()


NAMES = ("ours, text", "TRL, text", "TRL, stored", "ours, video", "four forwards, video")


def peak(step: Step) -> float:
    """Megabytes beyond what stands before a second step, whose gradients are there already."""
    step()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return (_resident("VmHWM") - before) / 1e3


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="runs/world-tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", help="print the peak of one form alone")
    options = parser.parse_args()
    if options.memory:
        print(peak(steps(options.memory, options.world)))
        return
    made = {name: steps(name, options.world) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.repeats + 1):
        for name in sorted(NAMES, reverse=bool(turn % 2)):
            begin = time.perf_counter()
            made[name]()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    found = {}
    for name in NAMES:
        command = [sys.executable, __file__, "--world", options.world, "--memory", name]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        taken = sorted(seconds[name])[options.repeats // 2]
        found[name] = {"pairs per second": PAIRS / taken, "megabytes": memory}
        print(f"{name}: {PAIRS / taken:.2f} pairs/s, {memory:.0f} MB", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, **vars(options), "found": found}, default=str))


if __name__ == "__main__":
    main()
