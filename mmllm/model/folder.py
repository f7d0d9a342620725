"""Folders that hold a model: which one is meant, and whether its files are complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.config.llm_sizes import check_sizes
from mmllm.contract.arguments import Count, NotNegative, Number, Positive, parse
from mmllm.contract.errors import UserError, shown

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
GENERATION: dict[str, Any] = {
    "max_length": Count | None,
    "max_new_tokens": Count | None,
    "min_length": Number | None,
    "min_new_tokens": Number | None,
    "num_beams": Count | None,
    "num_return_sequences": Count | None,
    "no_repeat_ngram_size": Number | None,
    "top_k": Number | None,
    "temperature": NotNegative | None,
    "top_p": NotNegative | None,
    "repetition_penalty": Positive | None,
    "length_penalty": float | None,
    "do_sample": bool | None,
    "use_cache": bool | None,
}
"""The keys of a generation config that change an answer, and their allowed values."""
NEEDED = ("config.json", "processor_config.json", "tokenizer.json")


def model_folder(path: str | Path) -> Path:
    """The model folder that a run folder or a model folder refers to.

    Raises:
        UserError: there is no model.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError("model", "not a path", expected="a run folder or a model folder", got=shown(path))
    path = Path(path)
    if (path / "adapter_config.json").is_file():  # an adapter lies in the folder of its model
        path = path.parent
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    what = "no model in this folder" if path.is_dir() else "no such folder"
    expected = "a run folder, a model folder or a downloaded checkpoint"
    raise UserError(path, what, expected=expected, hint="mmllm train nano/llava --out runs/mine, or hf download ID")


def check_model_folder(folder: Path, needed: tuple[str, ...] = NEEDED) -> None:
    """Check that the files of a model exist and can be read; the library's own errors say less.

    Args:
        needed: files required besides the weights; weights alone are used without the rest.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    hint = "copy or train it again"
    for name in JSON_FILES:
        path = folder / name
        if not path.exists() and name not in needed:
            continue
        if not path.is_file():
            raise UserError(path, "not a file" if path.exists() else "absent", hint=hint)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(path, f"damaged, not JSON ({type(error).__name__})", hint=hint) from error
        if not isinstance(value, dict):
            raise UserError(path, "damaged, not a map", hint=hint)
        if name == "config.json" and value.get("model_type") != "mmllm":
            raise UserError(f"{path}:model_type", "not a model of mmllm", expected="mmllm", got=value.get("model_type"))
        if name == "config.json" and isinstance(value.get("text_config"), dict):
            check_sizes(value["text_config"], f"{path}:text_config")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(folder, "has no weights (*.safetensors)", hint=hint)
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(path, f"damaged ({error})", hint=hint) from error


def check_generation(model: MMLLMForConditionalGeneration, folder: Path) -> None:
    """Check that a model's generation config has numbers where it needs them, and ids within its vocabulary.

    Raises:
        UserError: names the key.
    """
    config, where = model.generation_config, f"{folder / 'generation_config.json'}:"
    for key, annotation in GENERATION.items():
        parse(getattr(config, key, None), annotation, f"{where}{key}")
    rows = model.config.text_config.vocab_size
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= parse(token, int, f"{where}{key}") < rows:
                raise UserError(f"{where}{key}", "not in the vocabulary", expected=f"below {rows}", got=token)


def check_tokenizer(processor: MMLLMProcessor, folder: Path) -> None:
    """Check that a tokenizer and its chat template work at all.

    Raises:
        UserError: they do not.
    """
    try:
        processor.tokenizer("?")
        if processor.tokenizer.chat_template is not None:
            processor.apply_chat_template([{"role": "user", "content": "?"}], tokenize=True, add_generation_prompt=True)
    except UserError as error:
        raise UserError(folder, f"{error.where}: {error.what}", expected=error.expected, got=error.got) from error
    except Exception as error:  # a damaged tokenizer can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(folder / "tokenizer_config.json", f"its tokenizer does not work ({reason})") from error
