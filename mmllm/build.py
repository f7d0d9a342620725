"""From a recipe to a fresh model and its processor."""

from __future__ import annotations

from typing import Any

import torch

from mmllm.configuration import MMLLMConfig
from mmllm.contract.errors import UserError
from mmllm.front_end import FrontEnd
from mmllm.located import llm_source
from mmllm.model import MMLLMForConditionalGeneration
from mmllm.processing import MMLLMProcessor
from mmllm.recipe import Recipe, resolve_encoders

SECTION_KEYS = ("media", "encoders", "text", "connector", "output", "place")


def text_config(recipe: Recipe) -> Any:
    """The LLM's config, as the recipe says.

    Raises:
        UserError: no such model type or a key it does not take.
    """
    from transformers import AutoConfig

    config = dict(recipe.llm.config or {})
    where = recipe.where("model.llm.config")
    kind = config.pop("model_type", None)
    if kind is None:
        raise UserError(f"{where}.model_type", "missing", expected="llama, qwen2, qwen3 or another causal LM")
    try:
        return AutoConfig.for_model(kind, **config)
    except (ValueError, TypeError) as error:
        raise UserError(where, str(error).splitlines()[0]) from error


def build_config(recipe: Recipe) -> MMLLMConfig:
    """The model's config; inline configs are completed first. Builds nothing."""
    resolve_encoders(recipe)
    section = {key: recipe.model[key] for key in SECTION_KEYS if key in recipe.model}
    return MMLLMConfig(text_config=text_config(recipe), model_section=section)


def check_shapes(recipe: Recipe) -> FrontEnd:
    """The front end on the meta device: every part, every argument, every shape, with the recipe's file in errors."""
    resolve_encoders(recipe)
    with torch.device("meta"):
        return FrontEnd(recipe.model, text_config(recipe).hidden_size, recipe.where("model"))


def build_model(recipe: Recipe, *, weights: bool = True) -> MMLLMForConditionalGeneration:
    """A fresh model: random weights, then those of the towers and the LLM that have a name.

    Args:
        weights: fetch pretrained weights; False leaves everything random.
    """
    check_shapes(recipe)
    model = MMLLMForConditionalGeneration(build_config(recipe))
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


def _load_llm(model: MMLLMForConditionalGeneration, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    name, options = llm_source(recipe.llm, recipe.where("model.llm.name"))
    try:
        llm = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype, **options)
    except OSError as error:
        raise UserError(recipe.where("model.llm.name"), f"cannot fetch {name}", hint=f"hf download {name}") from error
    body, head = llm.base_model, llm.get_output_embeddings()
    ours = model.model.language_model.state_dict()
    theirs, where = body.state_dict(), recipe.where("model.llm.config")
    for key in {**theirs, **ours}:
        sizes = [list(state[key].shape) if key in state else "nothing" for state in (theirs, ours)]
        if sizes[0] != sizes[1]:
            raise UserError(where, f"{key} differs from {name}", expected=sizes[0], got=sizes[1])
    for field in ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters"):
        one, other = (getattr(config, field, None) for config in (llm.config, model.config.text_config))
        if one != other:
            raise UserError(f"{where}.{field}", f"differs from {name}", expected=one, got=other)
    model.generation_config = llm.generation_config
    model.model.language_model.load_state_dict(body.state_dict())
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict({"weight": head.weight})


def set_stop_tokens(model: MMLLMForConditionalGeneration, tokenizer: Any) -> None:
    """Where the LLM's configs say nothing, generation ends at the tokenizer's end of turn and pads with its padding."""
    config = model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = model.config.text_config.eos_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def build_tokenizer(recipe: Recipe) -> Any:
    """The LLM's tokenizer: from `llm.tokenizer`, else from `llm.name`.

    Raises:
        UserError: neither is there.
    """
    from transformers import AutoTokenizer

    llm = recipe.llm
    if llm.tokenizer is None and llm.name is None:
        raise UserError(recipe.where("model.llm"), "neither a tokenizer nor a name")
    if llm.tokenizer is None:
        place, options = llm_source(llm, recipe.where("model.llm.name"))
    else:
        place, options = recipe.path(llm.tokenizer), {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        hint = "mmllm world make --out runs/world --level nano" if (llm.tokenizer or "").startswith("world:") else None
        raise UserError(recipe.where("model.llm.tokenizer"), f"no tokenizer at {place}", hint=hint) from error
    if llm.template is not None:
        tokenizer.chat_template = llm.template
    return tokenizer


def build_processor(recipe: Recipe, tokenizer: Any = None) -> MMLLMProcessor:
    """The processor of a recipe's model."""
    config = build_config(recipe)
    tokenizer = build_tokenizer(recipe) if tokenizer is None else tokenizer
    length = getattr(config.text_config, "max_position_embeddings", None)
    return MMLLMProcessor(tokenizer, config.model_section, config.text_config.hidden_size, length)
