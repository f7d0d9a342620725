"""From a recipe to a fresh model and its processor."""

from __future__ import annotations

import copy
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mmllm.config.llm_sizes import check_sizes
from mmllm.config.llm_source import llm_source
from mmllm.config.recipe import Recipe, fetch_llm_config, resolve_encoders
from mmllm.contract.errors import UserError
from mmllm.contract.library import check_attention, pretrained
from mmllm.model.config import MMLLMConfig
from mmllm.model.front_end import FrontEnd
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.processor import MMLLMProcessor

SECTION_KEYS = ("media", "encoders", "text", "connector", "output", "place")


def text_config(recipe: Recipe) -> Any:
    """The LLM's config, as given by the recipe.

    Raises:
        UserError: no such model type, or a key that it does not take.
    """
    values = dict(recipe.llm.config or {})
    where = recipe.where("model.llm.config")
    kind = values.pop("model_type", None)
    expected = "llama, qwen2, qwen3 or another causal LM"
    if not isinstance(kind, str):
        raise UserError(f"{where}.model_type", "missing", expected=expected)
    check_sizes(values, where)
    check_attention(values, where)
    try:
        return copy.deepcopy(_causal_config(kind, json.dumps(values)))
    except NotCausal:
        raise UserError(f"{where}.model_type", "not a causal LM", expected=expected, got=kind) from None
    except Exception as error:  # the library checks a config's values its own way and raises many error types
        raise UserError(where, f"not a {kind}: {' '.join(str(error).split())[:200]}") from error


class NotCausal(Exception):
    """The library has no causal LM of this kind."""


@lru_cache(maxsize=8)
def _causal_config(kind: str, values: str) -> Any:
    """The library's config object, once a model has been built from it on the meta device.

    Args:
        values: the config's values as JSON, so that equal ones are checked once.

    Raises:
        NotCausal: no causal LM is of this kind.
        Exception: of any type, if values are wrong or sizes do not divide.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotCausal(kind)
    config = AutoConfig.for_model(kind, **json.loads(values))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    return config


def build_config(recipe: Recipe) -> MMLLMConfig:
    """The model's config; inline configs are completed first. Builds no model."""
    resolve_encoders(recipe)
    section = {key: recipe.model[key] for key in SECTION_KEYS if key in recipe.model}
    return MMLLMConfig(text_config=text_config(recipe), model_section=section)


def check_shapes(recipe: Recipe) -> FrontEnd:
    """The front end on the meta device, which checks every part, argument and shape; errors name the recipe's file."""
    resolve_encoders(recipe)
    _compare_llm(recipe)
    with torch.device("meta"):
        return FrontEnd(recipe.model, text_config(recipe).hidden_size, recipe.where("model"))


def build_model(recipe: Recipe, *, weights: bool = True) -> MMLLMForConditionalGeneration:
    """A fresh model: random weights, then those of the towers and the LLM that have a name.

    Args:
        weights: whether to fetch pretrained weights; False leaves everything random.
    """
    check_shapes(recipe)
    config = build_config(recipe)
    _check_memory(config, recipe.where("model"))
    model = MMLLMForConditionalGeneration(config)
    if weights:
        front = model.model.front_end
        for part in (*front.bank.encoders.values(), *front.prompts.sources.values(), *front.parts.values()):
            part.load_weights()
        if recipe.llm.name is not None:
            _load_llm(model, recipe)
    sources = {**model.model.front_end.bank.encoders, **model.model.front_end.prompts.sources}
    for part in model.model.front_end.parts.values():
        part.initialise(sources)
    return model


def _check_memory(config: MMLLMConfig, where: str) -> None:
    """Refuse a model whose weights alone exceed this machine's memory: the system would kill us halfway."""
    with torch.device("meta"):
        model = MMLLMForConditionalGeneration(config)
    needed = sum(value.numel() for value in model.parameters()) * 4
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        got = f"{needed / 1e9:.0f} GB of float32, {there / 1e9:.0f} GB of memory"
        raise UserError(where, "its weights do not fit into this machine", got=got, hint="smaller sizes")


SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
)
"""Fields that an inline config must share with the weights that its recipe names."""


def _compare_llm(recipe: Recipe) -> None:
    """Refuse an inline config that differs from that of the folder or package named as the LLM."""
    llm, where = recipe.llm, recipe.where("model.llm.config")
    if llm.name is None or llm.config is None:
        return
    place, options = llm_source(llm, recipe.where("model.llm.name"))
    if Path(place).is_dir():
        _same_config(fetch_llm_config(recipe, place, options), text_config(recipe), where, llm.name)


def _same_config(theirs: Any, ours: Any, where: str, name: str) -> None:
    for field in SAME:
        one, other = (getattr(config, field, None) for config in (theirs, ours))
        if one != other:
            raise UserError(f"{where}.{field}", f"differs from {name}", expected=one, got=other)


def llm_facts(recipe: Recipe, tokenizer: Any = None) -> str:
    """Name, source and template of a recipe's LLM, in one line."""
    llm = recipe.llm
    name = llm.name or f"a fresh {(llm.config or {}).get('model_type')}"
    weights = "random weights" if llm.name is None else f"weights of {llm.gguf or llm.name}"
    tokens = f"tokenizer of {llm.tokenizer or llm.name}"
    own = "none" if tokenizer is not None and tokenizer.chat_template is None else "the tokenizer's own"
    template = "the recipe's" if llm.template else own
    return f"{name}; {weights}; {tokens}; chat template: {template}"


def _load_llm(model: MMLLMForConditionalGeneration, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    name, options = llm_source(recipe.llm, recipe.where("model.llm.name"))
    try:
        llm = pretrained(AutoModelForCausalLM, name, dtype=model.dtype, **options)
    except (OSError, ValueError) as error:
        raise UserError(recipe.where("model.llm.name"), f"cannot fetch {name}", hint=f"hf download {name}") from error
    body, head = llm.base_model, llm.get_output_embeddings()
    ours = model.model.language_model.state_dict()
    theirs, where = body.state_dict(), recipe.where("model.llm.config")
    for key in {**theirs, **ours}:
        sizes = [list(state[key].shape) if key in state else "nothing" for state in (theirs, ours)]
        if sizes[0] != sizes[1]:
            raise UserError(where, f"{key} differs from {name}", expected=sizes[0], got=sizes[1])
    _same_config(llm.config, model.config.text_config, where, name)
    model.generation_config = llm.generation_config
    model.model.language_model.load_state_dict(body.state_dict())
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict({"weight": head.weight})


def set_stop_tokens(model: MMLLMForConditionalGeneration, tokenizer: Any) -> None:
    """If the LLM's configs do not say, end generation at the tokenizer's end of turn and pad with its padding."""
    config = model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = model.config.text_config.eos_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def build_tokenizer(recipe: Recipe) -> Any:
    """The LLM's tokenizer: from `llm.tokenizer`, otherwise from `llm.name`.

    Raises:
        UserError: neither is given.
    """
    from transformers import AutoTokenizer

    llm = recipe.llm
    if llm.tokenizer is None and llm.name is None:
        raise UserError(recipe.where("model.llm"), "neither a tokenizer nor a name")
    if llm.tokenizer is None:
        place, options = llm_source(llm, recipe.where("model.llm.name"))
    else:
        place, options = recipe.path(llm.tokenizer), {}
    hint = "mmllm world make --out runs/world --level nano" if (llm.tokenizer or "").startswith("world:") else None
    absent = UserError(recipe.where("model.llm.tokenizer"), f"no tokenizer at {place}", hint=hint)
    if llm.tokenizer not in (None, place) and not Path(place).is_dir():  # below a root: no hub has it
        raise absent
    try:
        tokenizer = pretrained(AutoTokenizer, place, **options)
    except (OSError, ValueError) as error:
        raise absent from error
    if llm.template is not None:
        tokenizer.chat_template = llm.template
    return tokenizer


def build_processor(recipe: Recipe, tokenizer: Any = None) -> MMLLMProcessor:
    """The processor of a recipe's model."""
    config = build_config(recipe)
    tokenizer = build_tokenizer(recipe) if tokenizer is None else tokenizer
    length = getattr(config.text_config, "max_position_embeddings", None)
    return MMLLMProcessor(tokenizer, config.model_section, config.text_config.hidden_size, length)
