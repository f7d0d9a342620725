"""The model's config: the resolved `model` section of a recipe and the LLM's own config, a single source for both."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MMLLMConfig(PreTrainedConfig):
    """Config of `MMLLMForConditionalGeneration`.

    Attributes:
        text_config: of the language model; any causal LM of transformers.
        model_section: encoders, connectors, output and sampling, as in the resolved recipe.
    """

    model_type = "mmllm"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    model_section: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


AutoConfig.register("mmllm", MMLLMConfig)
