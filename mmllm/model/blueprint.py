"""What a recipe builds, before any memory is taken: made once per command and handed on."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmllm.config.llm_sizes import check_sizes
from mmllm.config.llm_source import llm_source
from mmllm.config.recipe import Recipe, fetch_llm_config, resolve
from mmllm.contract.errors import UserError
from mmllm.contract.library import check_attention
from mmllm.model.config import MMLLMConfig
from mmllm.model.front_end_plan import FrontEndPlan, meta_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SECTION_KEYS = ("media", "encoders", "text", "connector", "output", "place", "vocabulary")


@dataclass(frozen=True)
class Blueprint:
    """A recipe with everything resolved and every shape checked.

    Attributes:
        recipe: with inline configs of all that it names.
        config: of the model.
        plan: its front end, without memory.
        llm_parameters: how many the LLM has, its head included.
    """

    recipe: Recipe
    config: MMLLMConfig
    plan: FrontEndPlan
    llm_parameters: int

    @classmethod
    def of(cls, recipe: Recipe) -> Blueprint:
        """Every part, every argument, every shape of a recipe; may ask the hub or a folder for configs.

        Raises:
            UserError: a part is unknown, its arguments are wrong or parts do not fit; names the key in the file.
        """
        recipe = with_ids(resolve(recipe))
        llm, parameters = _llm(recipe)
        _compare_llm(recipe, llm)
        section = {key: recipe.model[key] for key in SECTION_KEYS if key in recipe.model}
        config = MMLLMConfig(text_config=llm, model_section=section)
        return cls(recipe, config, meta_plan(section, llm.hidden_size, recipe.where("model")), parameters)

    def parameters(self) -> int:
        """How many parameters the whole model has."""
        towers = (*self.plan.bank.parameters(), *self.plan.prompts.parameters(), *self.plan.parts.parameters())
        coordinates = 0 if self.plan.vocabulary is None else 2 * len(self.plan.vocabulary) * self.plan.llm_width
        return self.llm_parameters + coordinates + sum(parameter.numel() for parameter in towers)


def with_ids(recipe: Recipe) -> Recipe:
    """The recipe with the id of its vocabulary's first token; asks the tokenizer, unless the recipe says.

    Raises:
        UserError: no tokenizer to ask.
    """
    section = recipe.model.get("vocabulary")
    if not section or section.get("first") is not None:
        return recipe
    from mmllm.model.build import build_tokenizer
    from mmllm.processing.placeholders import first_free_id

    section = {**section, "first": first_free_id(build_tokenizer(recipe))}
    return replace(recipe, data={**recipe.data, "model": {**recipe.model, "vocabulary": section}})


def _llm(recipe: Recipe) -> tuple[PreTrainedConfig, int]:
    """The LLM's config, as the recipe says, and how many parameters it means.

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
        config, parameters = _causal_config(kind, json.dumps(values))
        return copy.deepcopy(config), parameters
    except NotCausal:
        raise UserError(f"{where}.model_type", "not a causal LM", expected=expected, got=kind) from None
    except Exception as error:  # the library checks a config's values its own way and raises many error types
        raise UserError(where, f"not a {kind}: {' '.join(str(error).split())[:200]}") from error


class NotCausal(Exception):
    """The library has no causal LM of this kind."""


@lru_cache(maxsize=8)
def _causal_config(kind: str, values: str) -> tuple[PreTrainedConfig, int]:
    """The library's config object, once a model has been made of it that takes no memory, and that model's parameters.

    Args:
        kind: the library's `model_type`.
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
        llm = AutoModelForCausalLM.from_config(config)
    return config, sum(parameter.numel() for parameter in llm.parameters())


SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
)
"""Fields that an inline config must share with the weights that its recipe names."""


def _compare_llm(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse an inline config that differs from that of the folder or package named as the LLM."""
    llm = recipe.llm
    if llm.name is None:
        return
    source, options = llm_source(llm, recipe.where("model.llm.name"))
    if Path(source).is_dir():
        check_same(fetch_llm_config(recipe, source, options), config, recipe.where("model.llm.config"), llm.name)


def check_same(theirs: PreTrainedConfig, ours: PreTrainedConfig, where: str, name: str) -> None:
    """Refuse an LLM's config that differs from the one that its weights have.

    Raises:
        UserError: names the first field that differs.
    """
    for field in SAME:
        one, other = (getattr(config, field, None) for config in (theirs, ours))
        if one != other:
            raise UserError(f"{where}.{field}", f"differs from {name}", expected=one, got=other)


def llm_facts(recipe: Recipe, template: str | None = "") -> str:
    """Name, source and template of a recipe's LLM, in a line.

    Args:
        recipe: resolved or not.
        template: the tokenizer's chat template, None where it has none, where the tokenizer is known.
    """
    llm = recipe.llm
    name = llm.name or f"a fresh {(llm.config or {}).get('model_type')}"
    weights = "random weights" if llm.name is None else f"weights of {llm.gguf or llm.name}"
    tokens = f"tokenizer of {llm.tokenizer or llm.name}"
    own = "the recipe's" if llm.template else "none" if template is None else "the tokenizer's own"
    return f"{name}; {weights}; {tokens}; chat template: {own}"
