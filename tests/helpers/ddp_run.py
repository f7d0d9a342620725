"""Run by test_ddp.py in one or two processes: two training steps, the gradients of the first one kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.tiny import tiny_recipe

from mmllm.train import trainer
from mmllm.train.context import RunOptions
from mmllm.train.run import train

data, out, tokenizer, objective = sys.argv[1:]
recipe = tiny_recipe()
recipe.model["llm"]["tokenizer"] = tokenizer
recipe.data["stages"] = {
    "instruct": {
        "data": data,
        "objective": json.loads(objective),
        "trains": ["encoders", "connector", "llm"],
        "steps": 2,
        "batch": 4,
        "lr": 1e-3,
        "clip": 0.0,
    }
}


class Recorder(trainer.StageTrainer):
    """Keeps the gradients that the optimizer would use, and reads the data in order."""

    def create_optimizer(self, *arguments, **keywords):
        optimizer = super().create_optimizer(*arguments, **keywords)
        optimizer.register_step_pre_hook(self.record)
        return optimizer

    def record(self, *arguments):
        from safetensors.torch import save_file

        path = Path(out) / "gradients.safetensors"
        if self.args.process_index == 0 and not path.exists():
            named = self.accelerator.unwrap_model(self.model).named_parameters()
            save_file({name: value.grad.clone() for name, value in named if value.grad is not None}, path)

    def _get_train_sampler(self, *arguments):
        return torch.utils.data.SequentialSampler(self.train_dataset)


from mmllm.train import stage  # noqa: E402

stage.StageTrainer = Recorder
train(recipe, Path(out) / "run", RunOptions(jobs=0, device="cpu", quiet=True, cache=Path(out)))
