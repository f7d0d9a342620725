"""Published checkpoints into our model, and our model into a folder that transformers loads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from mmllm.config.recipe import Recipe
from mmllm.config.sections import normalise
from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_processor, set_stop_tokens
from mmllm.model.checkpoint import refuse_holes
from mmllm.model.foreign.family import Family
from mmllm.model.foreign.llava import Llava
from mmllm.model.foreign.llava_next import LlavaNext
from mmllm.model.foreign.llava_onevision import LlavaOnevision
from mmllm.model.foreign.video_llava import VideoLlava
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.content import PLACEHOLDERS
from mmllm.processing.processor import MMLLMProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llava(), LlavaNext(), LlavaOnevision(), VideoLlava())
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OPTIONAL = "vision_model."
"""A level in the names of towers that some versions of the library have."""


def family_of(path: str | Path) -> Family | None:
    """The family of a checkpoint by its config.json; None where it is a model of ours, or nothing is there.

    Args:
        path: a folder, or a hub id that has been downloaded (`hf download`).

    Raises:
        UserError: a model of transformers that is none of these.
    """
    from transformers.utils import cached_file

    if not isinstance(path, str | os.PathLike):
        return None
    file: Path | str | None = Path(path) / "config.json"
    if not Path(path).exists() and HUB_ID.fullmatch(str(path)):
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(str(path), "config.json", local_files_only=True, **options)
    try:
        model_type = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None  # loading a model of ours says more
    if model_type == "mmllm":
        return None
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: model_type", "no model of mmllm, and of no family", expected=known, got=model_type)
    return FAMILIES[model_type]


def load_published(
    path: str | Path, family: Family, dtype: torch.dtype | str = "auto"
) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor, Recipe]:
    """A checkpoint of transformers as our (model, processor), and its recipe.

    Raises:
        UserError: absent, damaged, or a tensor is missing, left over or misshapen; names it.
    """
    name = str(path)
    cls = getattr(transformers, family.class_name)
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        theirs, info = pretrained(cls, name, **options)
    except (OSError, ValueError) as error:
        raise UserError(name, f"cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    refuse_holes(Path(name), info)
    tokenizer = _tokenizer(name)
    tied = theirs.get_output_embeddings().weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    blueprint = Blueprint.of(recipe_of(family, theirs.config, name, tied))
    states = renamed(theirs.state_dict(), family.names(blueprint.config.model_section), _own_names(blueprint))
    options = {"config": blueprint.config, "state_dict": states, "dtype": theirs.dtype, "output_loading_info": True}
    model, info = MMLLMForConditionalGeneration.from_pretrained(None, **options)
    refuse_holes(Path(name), {"mismatched_keys": (), **info})
    model.generation_config = theirs.generation_config
    processor = build_processor(blueprint, tokenizer)
    set_stop_tokens(model, tokenizer)
    return model.eval(), processor, blueprint.recipe


def published_processor(path: str | Path, family: Family) -> MMLLMProcessor:
    """The processor of a checkpoint, without its weights.

    Raises:
        UserError: there is none.
    """
    config = pretrained(AutoConfig, str(path))
    return build_processor(Blueprint.of(recipe_of(family, config, str(path))), _tokenizer(str(path)))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = pretrained(AutoTokenizer, name)
    except (OSError, ValueError) as error:
        raise UserError(name, f"no tokenizer ({' '.join(str(error).split())[:200]})") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template(name)
    return tokenizer


def recipe_of(family: Family, config: PreTrainedConfig, name: str, tied: bool | None = None) -> Recipe:
    """The recipe of a published model; every other part fits into it.

    Args:
        name: where its tokenizer is.
        tied: whether head and embedding are one; default: as the LLM's config says, which the model's may overrule.
    """
    text = config.get_text_config().to_dict()
    llm = {key: value for key, value in text.items() if value is not None and not key.startswith("_")}
    for key in ("architectures", "transformers_version", "dtype"):
        llm.pop(key, None)
    if tied is not None:
        llm["tie_word_embeddings"] = tied
    data: dict[str, Any] = {
        "summary": f"{name}, a published checkpoint",
        "model": {**family.section(config), "llm": {"tokenizer": name, "config": llm}},
        "roots": {},
        "eval": {},
    }
    normalise(data, name)
    return Recipe(name, name, data)


def renamed(states: dict[str, Tensor], prefixes: dict[str, tuple[str, ...]], own: set[str]) -> dict[str, Tensor]:
    """Their tensors under our names.

    Args:
        prefixes: {their prefix: ours}.
        own: all names of our model.

    Raises:
        UserError: a tensor that belongs nowhere.
    """
    found = {}
    for key, value in states.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise UserError(key, "a tensor that no part of ours has")
        rest = key.removeprefix(prefix)
        for number, ours in enumerate(prefixes[prefix]):
            name = _spelled(ours, rest, own) or f"{ours}{rest}"
            found[name] = value.clone() if number else value  # what we keep apart may be trained apart
    return found


def _spelled(prefix: str, rest: str, known: Container[str]) -> str | None:
    """A tensor's name with or without the optional level, whichever is known."""
    names = (f"{prefix}{rest}", f"{prefix}{rest.removeprefix(OPTIONAL)}", f"{prefix}{OPTIONAL}{rest}")
    return next((name for name in names if name in known), None)


def save_published(model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, folder: Path) -> PreTrainedModel:
    """Write our model as a checkpoint of the family that it fits; returns what was written.

    Raises:
        UserError: it fits none, or parts that the family shares have come apart.
    """
    section, tokenizer = model.config.model_section, processor.tokenizer
    family = next((family for family in FAMILIES.values() if family.fits(section)), None)
    if family is None:
        what = "these parts make no model of transformers"
        raise UserError("model.connector", what, expected=", ".join(FAMILIES))
    tokens = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in PLACEHOLDERS.items()}
    config = family.config(section, model.config.text_config, tokens)
    config.tie_word_embeddings = bool(model.config.text_config.tie_word_embeddings)
    states = _theirs(model.state_dict(), family.names(section), config, family)
    cls = getattr(transformers, family.class_name)
    written, info = cls.from_pretrained(
        None, config=config, state_dict=states, dtype=model.dtype, output_loading_info=True
    )
    refuse_holes(folder, {"mismatched_keys": (), **info})
    written.generation_config = model.generation_config
    written.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return written


def _theirs(
    states: dict[str, Tensor], prefixes: dict[str, tuple[str, ...]], config: PreTrainedConfig, family: Family
) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = getattr(transformers, family.class_name)(config).state_dict()
    found, used = {}, set()
    for key in wanted:
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        rest = key.removeprefix(prefix)
        copies = []
        for ours in prefixes[prefix]:
            name = _spelled(ours, rest, states)
            if name is not None:
                copies.append(states[name])
                used.add(name)
        if any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
            raise UserError(key, "shared there, but different here", expected=f"equal {' and '.join(prefixes[prefix])}")
        if copies:
            found[key] = copies[0]
    if left := [name for name in states if name not in used]:
        raise UserError(left[0], f"a tensor that {family.model_type} does not have", got=f"{len(left)} of them")
    return found


def _own_names(blueprint: Blueprint) -> set[str]:
    with torch.device("meta"):
        return set(MMLLMForConditionalGeneration(blueprint.config).state_dict())


def _template(name: str) -> str | None:
    """The chat template of older checkpoints, in a file of its own."""
    from transformers.utils import cached_file

    file = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    value = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")
    return value if isinstance(value, str) else None
