"""The run folder: what was requested, its progress, and its results."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmllm.config.recipe import Recipe, differences
from mmllm.contract.arguments import Count, parse
from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError
from mmllm.contract.files import append_lines, read_record, write_json, write_text, writing
from mmllm.progress import say

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor

COMMAND = "command.txt"
"""The file written first into a run folder: a folder without it is not one of our runs."""
FILES = ("recipe.yaml", "status.json", "log.jsonl", "environment.json", "curves.png")
COMPLETE = "complete"
"""The file written last into a checkpoint; a checkpoint without it is not used."""
MODELS = ("model", "model.new", "model.old")
"""Folders of the trained model: in use, being written, and being replaced."""


class RunFolder:
    """`runs/NAME/` of a training run.

    Args:
        path: the folder; created if missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = self.path / "model"

    def check(self, recipe: Recipe, seed: int) -> None:
        """Check that the folder is free, or holds this very run; writes nothing.

        Raises:
            UserError: it holds a run of another recipe or seed with something trained (names the keys that differ), or
                a model that belongs to no run.
        """
        known = self.path / "recipe.yaml"
        if not (self.path / COMMAND).is_file():
            foreign = [name for name in (*MODELS, "stages", *FILES) if (self.path / name).exists()]
            if foreign:
                what = f"holds {foreign[0]}, but no run ({COMMAND})"
                raise UserError(self.path, what, hint="another --out")
        if not known.is_file():
            return
        different = differences(read_yaml(known), _plain({**recipe.data, "seed": seed}))
        if different and self._kept():
            keys = ", ".join(sorted(set(different))[:6])
            raise UserError(self.path, f"holds a run of another recipe; these differ: {keys}", hint="another --out")

    def _kept(self) -> bool:
        """Whether anything has been trained here: a stage, or part of one."""
        return bool(self.status["stages"]) or any(self.path.glob(f"stages/*/checkpoint-*/{COMPLETE}"))

    def check_precision(self, precision: str) -> None:
        """Check that everything trained so far used the same number format.

        Raises:
            UserError: it was a different one.
        """
        before = self._environment().get("precision", precision)
        if before != precision and self._kept():
            what, hint = f"trained in {before} so far, now {precision}", f"--dtype {before}, or another --out"
            raise UserError(self.path, what, hint=hint)

    def begin(self, recipe: Recipe, seed: int, threads: int | None = None, precision: str = "float32") -> None:
        """Write what was requested. Logs of an earlier recipe that had not trained anything yet are dropped.

        Args:
            threads: CPU threads of each process.
            precision: number format of the forward.

        Raises:
            UserError: the folder cannot be written to.
        """
        append_lines(self.path / COMMAND, [shlex.join(sys.argv)])  # first: it marks the folder as a run's
        record, known = _plain({**recipe.data, "seed": seed}), self.path / "recipe.yaml"
        if known.is_file() and differences(read_yaml(known), record):
            (self.path / "log.jsonl").unlink(missing_ok=True)
        write_text(known, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
        facts = environment() | {"threads": threads, "precision": precision}
        write_json(self.path / "environment.json", facts)

    @property
    def threads(self) -> int | None:
        """Number of CPU threads per process so far; None if it was not recorded."""
        path = f"{self.path / 'environment.json'}:threads"
        return parse(self._environment().get("threads"), Count | None, path)

    def _environment(self) -> dict[str, Any]:
        path = self.path / "environment.json"
        return read_record(path) if path.is_file() else {}

    def recover_model(self) -> None:
        """Restore `model/` after a kill between two renames.

        Raises:
            UserError: stages are finished but their weights are gone.
        """
        old = self.path / "model.old"
        if not self.model.is_dir() and old.is_dir():
            os.replace(old, self.model)
        if self.status["stages"] and not self.model.is_dir():
            raise UserError(self.model, "the weights of the finished stages are gone", hint="another --out")

    @property
    def status(self) -> dict[str, Any]:
        """{"stages": {name: {"steps", "seconds"}}, ...} of what is finished."""
        path = self.path / "status.json"
        found = read_record(path) if path.is_file() else {"stages": {}}
        if not isinstance(found.get("stages"), dict):
            raise UserError(f"{path}:stages", "damaged, not a map", hint="another --out")
        return found

    def finish_stage(self, name: str, **facts: Any) -> None:
        """Record that a stage is done and its weights are in `model/`."""
        status = self.status
        status["stages"][name] = facts
        write_json(self.path / "status.json", status)

    def add_seconds(self, step: str, seconds: float) -> None:
        """Add to the time of a step, over all its continuations."""
        add_seconds(self.path, step, seconds)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        append_lines(self.path / "log.jsonl", [json.dumps({"time": round(time.time(), 3), **record})])

    def log_event(self, stage: str, text: str) -> None:
        """Report something on stderr and in events.txt."""
        say(f"{stage}: {text}\n")
        append_lines(self.path / "events.txt", [f"{stage}: {text}"])

    def save_model(
        self,
        model: MMLLMForConditionalGeneration,
        processor: MMLLMProcessor,
        recipe: Recipe,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Write `model/`: a folder for `from_pretrained`, complete or not at all; `state` if the weights are sharded.

        Raises:
            UserError: the disk is full, or writing is not permitted.
        """
        from mmllm.model.adapters import ADAPTER, adapter_layers, save_adapter, without_adapters

        fresh, old = self.path / "model.new", self.path / "model.old"
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)
        adapted = bool(adapter_layers(model))
        with writing(fresh):
            model.save_pretrained(fresh, state_dict=without_adapters(state or model.state_dict()) if adapted else state)
            if adapted:
                save_adapter(model, fresh / ADAPTER, recipe.llm.name or str(self.model))
            processor.save_pretrained(fresh)
            (fresh / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
            if self.model.exists():
                os.replace(self.model, old)
            os.replace(fresh, self.model)
        shutil.rmtree(old, ignore_errors=True)


def add_seconds(run: Path, step: str, seconds: float) -> None:
    """Add to `RUN/seconds/STEP`, a file with one number."""
    path = run / "seconds" / step
    write_text(path, f"{_number(path) + seconds:.1f}\n")


def read_seconds(run: Path) -> dict[str, float]:
    """{step: seconds} of everything that was timed, in the order in which the steps began."""
    files = (run / "seconds").glob("*") if (run / "seconds").is_dir() else ()
    ordered = sorted(files, key=lambda path: path.stat().st_mtime)
    return {path.name: _number(path) for path in ordered if "." not in path.name}


def _number(path: Path) -> float:
    """The number in a file of seconds; 0 if it is missing or damaged: times are only informative."""
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def _plain(value: object) -> dict[str, Any]:
    """As in JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def environment() -> dict[str, Any]:
    """Versions and the machine, for the record."""
    from importlib.metadata import version

    packages = ("mmllm", "torch", "transformers", "accelerate", "tokenizers", "av", "numpy")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
