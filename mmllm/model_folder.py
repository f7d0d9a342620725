"""Folders that hold a model: which one is meant, and whether its files are whole."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.contract.errors import UserError

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
NEEDED = ("config.json", "processor_config.json", "tokenizer.json")


def model_folder(path: str | Path) -> Path:
    """The model folder that a run folder or a model folder means.

    Raises:
        UserError: there is no model.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    what = "no model in this folder" if path.is_dir() else "no such folder"
    raise UserError(
        path, what, expected="a run folder or a model folder", hint="mmllm train nano/llava --out runs/mine"
    )


def check_model_folder(folder: Path) -> None:
    """See that the files of a model are there and can be read; the library says less of what is wrong.

    Raises:
        UserError: names the file that is absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    hint = "copy or train it again"
    for name in JSON_FILES:
        path = folder / name
        if not path.is_file():
            if name in NEEDED:
                raise UserError(path, "absent", hint=hint)
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(path, f"damaged, not JSON ({type(error).__name__})", hint=hint) from error
        if not isinstance(value, dict):
            raise UserError(path, "damaged, not a map", hint=hint)
        if name == "config.json" and value.get("model_type") != "mmllm":
            raise UserError(f"{path}:model_type", "not a model of mmllm", expected="mmllm", got=value.get("model_type"))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(folder, "has no weights (*.safetensors)", hint=hint)
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(path, f"damaged ({error})", hint=hint) from error
