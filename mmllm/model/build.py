"""From a blueprint to a fresh model and its processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.config.llm_source import llm_source
from mmllm.config.recipe import Recipe
from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.model.blueprint import Blueprint, check_same
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.processor import MMLLMProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_model(blueprint: Blueprint, *, weights: bool = True) -> MMLLMForConditionalGeneration:
    """A fresh model: random weights, then those of the towers and the LLM that have a name.

    Args:
        blueprint: of its recipe.
        weights: whether to fetch pretrained weights; False leaves everything random.

    Raises:
        UserError: no memory for it, or weights that cannot be fetched or do not fit.
    """
    recipe = blueprint.recipe
    _check_memory(blueprint)
    model = MMLLMForConditionalGeneration(blueprint.config)
    front = model.model.front_end
    if weights:
        for part in (*front.bank.encoders.values(), *front.prompts.sources.values(), *front.parts.values()):
            part.load_weights()
        if recipe.llm.name is not None:
            _load_llm(model, recipe)
    sources = {**front.bank.encoders, **front.prompts.sources}
    for part in front.parts.values():
        part.initialise(sources)
    return model


def _check_memory(blueprint: Blueprint) -> None:
    """Refuse a model whose weights alone exceed this machine's memory: the system would kill us halfway."""
    needed = blueprint.parameters() * 4
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        got = f"{needed / 1e9:.0f} GB of float32, {there / 1e9:.0f} GB of memory"
        where = blueprint.recipe.where("model")
        raise UserError(where, "its weights do not fit into this machine", got=got, hint="smaller sizes")


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
    check_same(llm.config, model.config.text_config, where, name)
    model.generation_config = llm.generation_config
    model.model.language_model.load_state_dict(body.state_dict())
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict({"weight": head.weight})


def set_stop_tokens(model: MMLLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """If the LLM's configs do not say, end generation at the tokenizer's end of turn and pad with its padding."""
    config = model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = model.config.text_config.eos_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer: from `llm.tokenizer`, otherwise from `llm.name`.

    Raises:
        UserError: neither is given.
    """
    from transformers import AutoTokenizer

    llm = recipe.llm
    if llm.tokenizer is None and llm.name is None:
        raise UserError(recipe.where("model.llm"), "neither a tokenizer nor a name")
    if llm.tokenizer is None:
        source, options = llm_source(llm, recipe.where("model.llm.name"))
    else:
        source, options = recipe.path(llm.tokenizer), {}
    hint = "mmllm world make --out runs/world --level nano" if (llm.tokenizer or "").startswith("world:") else None
    absent = UserError(recipe.where("model.llm.tokenizer"), f"no tokenizer at {source}", hint=hint)
    if llm.tokenizer not in (None, source) and not Path(source).is_dir():  # below a root: no hub has it
        raise absent
    try:
        tokenizer = pretrained(AutoTokenizer, source, **options)
    except (OSError, ValueError) as error:
        raise absent from error
    if llm.template is not None:
        tokenizer.chat_template = llm.template
    return tokenizer


def build_processor(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase | None = None) -> MMLLMProcessor:
    """The processor of a blueprint's model; `tokenizer` in place of the recipe's."""
    config = blueprint.config
    tokenizer = build_tokenizer(blueprint.recipe) if tokenizer is None else tokenizer
    length = getattr(config.text_config, "max_position_embeddings", None)
    processor = MMLLMProcessor(tokenizer, config.model_section, config.text_config.hidden_size, length)
    processor.use_plan(blueprint.plan)
    return processor
