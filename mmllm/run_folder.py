"""The run folder: what was asked, where it stands, what came out."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from mmllm.contract.errors import UserError
from mmllm.recipe import Recipe, differences


class RunFolder:
    """`runs/NAME/` of a training run.

    Args:
        path: the folder; made if absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = self.path / "model"

    def open(self, recipe: Recipe, seed: int, write: bool = True) -> None:
        """Write what is asked for, or check that it is what was asked for before.

        Args:
            write: False in all processes but the main one, which only check.

        Raises:
            UserError: the folder holds a run of another recipe or seed; names the keys that differ.
        """
        record = {**recipe.data, "seed": seed}
        known = self.path / "recipe.yaml"
        if known.is_file():
            old = yaml.safe_load(known.read_text(encoding="utf-8"))
            different = sorted(set(differences(old, json.loads(json.dumps(record)))))
            if different:
                keys = ", ".join(different[:6])
                raise UserError(self.path, f"holds a run of another recipe; these differ: {keys}", hint="another --out")
        if not write:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(record))  # tuples as lists
        self._replace_text("recipe.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(" ".join(sys.argv) + "\n")
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=1))

    def recover_model(self) -> None:
        """Put `model/` back where a kill fell between two renames.

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
        return json.loads(path.read_text()) if path.is_file() else {"stages": {}}

    def finish_stage(self, name: str, **facts: Any) -> None:
        """Record that a stage is done and its weights are in `model/`."""
        status = self.status
        status["stages"][name] = facts
        self._replace_text("status.json", json.dumps(status, indent=1))

    def add_seconds(self, step: str, seconds: float) -> None:
        """Count time of a step, over all the times it was continued."""
        add_seconds(self.path, step, seconds)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")

    def log_event(self, stage: str, text: str) -> None:
        """Say something on stderr and in events.txt."""
        sys.stderr.write(f"{stage}: {text}\n")
        with (self.path / "events.txt").open("a", encoding="utf-8") as file:
            file.write(f"{stage}: {text}\n")

    def save_model(self, model: Any, processor: Any, recipe: Recipe, state: dict[str, Any] | None = None) -> None:
        """`model/`: a folder for `from_pretrained`, complete or absent; `state` where the weights are sharded."""
        fresh, old = self.path / "model.new", self.path / "model.old"
        for path in (fresh, old):
            shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(fresh, state_dict=state)
        processor.save_pretrained(fresh)
        (fresh / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        if self.model.exists():
            os.replace(self.model, old)
        os.replace(fresh, self.model)
        shutil.rmtree(old, ignore_errors=True)

    def _replace_text(self, name: str, text: str) -> None:
        fresh = self.path / f"{name}.new"
        fresh.write_text(text)
        os.replace(fresh, self.path / name)


def add_seconds(run: Path, step: str, seconds: float) -> None:
    """Add to `RUN/seconds/STEP`, a file with one number."""
    path = run / "seconds" / step
    path.parent.mkdir(parents=True, exist_ok=True)
    before = float(path.read_text()) if path.is_file() else 0.0
    path.write_text(f"{before + seconds:.1f}\n")


def read_seconds(run: Path) -> dict[str, float]:
    """{step: seconds} of everything that was timed, in the order in which the steps began."""
    files = (run / "seconds").glob("*") if (run / "seconds").is_dir() else ()
    return {path.name: float(path.read_text()) for path in sorted(files, key=lambda path: path.stat().st_mtime)}


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
