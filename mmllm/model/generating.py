"""What the library's generation has to know of media: they enter with the prompt, and beams repeat their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mmllm.contract.batch import VisualInputs
from mmllm.model.vocabulary import repeated
from mmllm.processing.collate import joined


class MediaGenerationMixin(GenerationMixin):
    """The library's generation, with media."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        visual: VisualInputs | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Media are passed with the prompt only: afterwards they are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("is_first_iteration") or kwargs.get("use_cache") is False:
            inputs["visual"] = visual
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams repeat rows; the media stay unchanged and the spans of a row are copied to its repeats."""
        visual = model_kwargs.pop("visual", None)
        if isinstance(visual, list):  # the library's pipeline collates what it knows and puts the rest into lists
            visual = joined(visual, model_kwargs.get("attention_mask"))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        if visual is not None:
            spans = visual["spans"].repeat_interleave(expand_size, dim=0)
            repeat = torch.arange(expand_size, device=spans.device).repeat(len(visual["spans"]))
            spans[:, 0] = spans[:, 0] * expand_size + repeat
            model_kwargs["visual"] = {**visual, "spans": spans, **repeated(visual, expand_size)}
        return input_ids, model_kwargs
