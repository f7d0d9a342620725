"""Stages that many recipes share: their trained weights are kept under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.errors import UserError
from mmllm.contract.files import replacing
from mmllm.contract.registry import plugins
from mmllm.train.checkpoints import digest, naming
from mmllm.train.context import StageContext
from mmllm.train.data import data_files
from mmllm.train.machine import precision

if TYPE_CHECKING:
    from accelerate import PartialState
    from filelock import FileLock

    from mmllm.model.modeling import MMLLMForConditionalGeneration

VERSION = 1
"""Version of what training computes; raise it where weights come out differently: every shared stage is retrained."""


class SharedStage:
    """The kept weights of a stage that trains the LLM alone.

    The hash covers the LLM's config and source, the tokenizer, the seed, the number format, a version of the training,
    and data and settings of this stage and the ones before it; not the front end, which such stages never run.
    """

    def __init__(self, context: StageContext) -> None:
        recipe, tokenizer, options = context.recipe, context.processor.tokenizer, context.options
        until = list(recipe.stages.values())[: context.number]
        if any(stage.trains != ("llm",) or stage.init for stage in until):
            where = context.where("share")
            raise UserError(where, "only stages that train the llm alone, from the first one on, can be shared")
        facts = {
            "llm": recipe.model["llm"].get("config"),
            "name": recipe.model["llm"].get("name"),
            "gguf": recipe.model["llm"].get("gguf"),
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "template": tokenizer.chat_template,
            "stages": [_stage_facts(stage, recipe) for stage in until],
            "seed": options.seed,
            "precision": precision(options),
            "version": VERSION,
        }
        if recipe.model.get("vocabulary"):  # its rows are part of the head
            facts["vocabulary"] = recipe.model["vocabulary"]
        if plugins():  # the objective may come from one
            facts["plugins"] = [digest(path) for path in plugins()]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.file = options.cache.expanduser() / "stages" / f"{key}.safetensors"

    @contextmanager
    def turn(self, processes: PartialState, waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other runs from training this stage in the meantime; all processes of this one wait together.

        Args:
            processes: accelerate's state of this run.
            waiting: called once if another run is training it.
        """
        from filelock import FileLock

        self.file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file.with_suffix(".lock"), mode=0o666)  # others may use this cache too
        mine = processes.is_main_process and _locked(lock, 0.0)
        if processes.is_main_process and not mine:
            waiting()
        while not _from_main(mine):  # poll: a long collective wait would time out
            mine = processes.is_main_process and _locked(lock, 30.0)
        try:
            yield
        finally:
            lock.release()

    def kept(self) -> bool:
        """Whether there are weights to take, agreed by all processes. A damaged file is removed and reported."""
        return _from_main(self.file.is_file() and self._is_whole())

    def _is_whole(self) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as file:
                return bool(file.keys())
        except (SafetensorError, OSError) as error:
            print(f"warning: {self.file}: damaged ({error}); the stage is trained again", file=sys.stderr)
            self.file.unlink(missing_ok=True)
            return False

    def load(self, model: MMLLMForConditionalGeneration) -> None:
        """Load the kept weights into the model."""
        from safetensors.torch import load_file

        with naming(self.file, "delete this file to train the stage again"):
            state = load_file(self.file)
            for prefix, module in _modules(model).items():
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                module.load_state_dict(own)

    def save(self, model: MMLLMForConditionalGeneration, whole: dict[str, Any]) -> None:
        """Keep the model's LLM from its `whole` state; the file is complete or does not exist."""
        from safetensors.torch import save_file

        names = {id(module): name for name, module in model.named_modules()}
        state = {
            prefix + key: whole[f"{names[id(module)]}.{key}"].detach().cpu().contiguous().clone()
            for prefix, module in _modules(model).items()
            for key in module.state_dict()
        }
        with replacing(self.file) as fresh:
            save_file(state, fresh)


def _locked(lock: FileLock, seconds: float) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _from_main(value: bool) -> bool:
    """The main process's value."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _stage_facts(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    facts = {**asdict(stage), "micro_batch": None, "data": [digest(path) for path in data_files(stage, recipe)]}
    # like micro_batch they say how, not what, or belong to stages that are not shared: digests stay what they were
    for name in ("checkpointing", "validation", "validate_every", "lora", "keep"):
        del facts[name]
    return facts


def _modules(model: MMLLMForConditionalGeneration) -> dict[str, Any]:
    return {"body.": model.model.language_model, "head.": model.lm_head}
