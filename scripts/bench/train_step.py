"""Our training step against a hand-written loop over the same modules, side by side in one run.

    python scripts/bench/train_step.py --world runs/world-nano --out train_step.json

Both do forward, backward, clipping and AdamW on the same batches, prepared beforehand. The two take turns in blocks, so
that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerControl, TrainerState

    from mmllm.config.recipe import Recipe
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor


def batches(recipe: Recipe, processor: MMLLMProcessor, count: int, size: int) -> list[dict[str, Any]]:
    """Prepared batches of the instruct stage."""
    from mmllm.train.objectives.language_modeling import LanguageModeling
    from mmllm.train.stage import load_data

    data = load_data(recipe.stages["instruct"], recipe)
    objective = LanguageModeling()
    return [objective.prepare([data[i] for i in range(k * size, (k + 1) * size)], processor) for k in range(count)]


def by_hand(model: MMLLMForConditionalGeneration, prepared: list[dict[str, Any]], lr: float) -> Iterator[None]:
    """A generator of step seconds of a plain loop: embed, run the LLM, head on scored rows, cross-entropy."""
    from mmllm.processing.collate import move

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    model.train()
    step = 0
    while True:
        start = time.perf_counter()
        batch = move(dict(prepared[step % len(prepared)]), model.device)
        hidden, _ = model.run(model.embed(batch))
        targets = batch["labels"][:, 1:]
        scored = targets != -100
        logits = model.lm_head(hidden[:, :-1][scored]).float()
        loss = torch.nn.functional.cross_entropy(logits, targets[scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        step += 1
        yield time.perf_counter() - start


def by_trainer(
    model: MMLLMForConditionalGeneration, prepared: list[dict[str, Any]], lr: float, device: str
) -> Iterator[None]:
    """A generator of step seconds of StageTrainer, its loop paused after every step."""
    import tempfile
    from queue import Queue
    from threading import Thread

    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from mmllm.train.objectives.language_modeling import LanguageModeling
    from mmllm.train.trainer import StageTrainer

    go, done = Queue(), Queue()

    class Turns(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            go.get()
            self.start = time.perf_counter()

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
        ) -> None:
            done.put(time.perf_counter() - self.start)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        max_steps=10**6,
        learning_rate=lr,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=prepared,
        data_collator=lambda samples: dict(samples[0]),
        callbacks=[Turns()],
        objective=LanguageModeling(),
        batch=len(prepared[0]["input_ids"]),
    )
    trainer.remove_callback(PrinterCallback)
    Thread(target=trainer.train, daemon=True).start()
    while True:
        go.put(None)
        yield done.get()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="runs/world-nano")
    parser.add_argument("--recipe", default="nano/llava")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=12, help="number of turns, of five steps each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from mmllm.config.recipe import load
    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model, build_processor

    recipe = load(options.recipe, [f"roots.world={options.world}"])
    blueprint = Blueprint.of(recipe)
    prepared = batches(recipe, build_processor(blueprint), 4, options.batch)
    hand, ours = build_model(blueprint).to(options.device), build_model(blueprint)
    turns = {
        "hand": by_hand(hand, prepared, 1e-3),
        "ours": by_trainer(ours, prepared, 1e-3, options.device),
    }
    seconds: dict[str, list[float]] = {"hand": [], "ours": []}
    for block in range(options.blocks + 1):
        for name in sorted(turns, reverse=bool(block % 2)):
            steps = [next(turns[name]) for _ in range(5)]
            if block:  # the first one warms up
                seconds[name].append(min(steps))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {**medians, "ratio": medians["ours"] / medians["hand"], "recipe": options.recipe, "batch": options.batch}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
