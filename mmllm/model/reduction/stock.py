"""Reducers in vision-language models of transformers, whose classes stay as they are.

The LLM inside such a model is called on embeddings alone. A hook on the model around it notes the ids, from which the
visual positions follow; the LLM's own `forward` is then answered by ours, on this one instance, until switched off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmllm.contract.errors import UserError
from mmllm.contract.types import Grid, LLMInputs, MediaSpec, VisualSpan, VisualTokens
from mmllm.model.modeling import MMLLMForConditionalGeneration, MMLLMModel
from mmllm.model.reduction.llm import Reduction

HOME = "mmllm_reduction"
"""The attribute of the inner model under which its reduction is found again."""


class StockBody:
    """The inner model of a vision-language model of transformers, and the reducer at work in it.

    Args:
        inner: the model that merges media into embeddings and holds `language_model`.

    Raises:
        UserError: it holds no language model, or no ids mark its visual tokens.
    """

    def __init__(self, inner: PreTrainedModel) -> None:
        name = inner.config.model_type
        self.inner, self.llm = inner, getattr(inner, "language_model", None)
        self.kinds = {getattr(inner.config, f"{kind}_token_id", None): kind for kind in ("image", "video")}
        self.kinds.pop(None, None)
        if not isinstance(self.llm, PreTrainedModel) or not self.kinds:
            raise UserError(name, "no language model whose visual tokens are marked by an id", hint="another model")
        self.reduction: Reduction | None = None
        self.hook: torch.utils.hooks.RemovableHandle | None = None
        self.visual: Tensor | None = None
        self.layouts: list[tuple[int, int, list[Grid], int]] = []

    def reduce(self, section: dict[str, Any] | None) -> None:
        """See `MMLLMModel.reduce`."""
        reduction = None if section is None else Reduction(self.llm, section)
        if self.reduction is not None:
            self.hook.remove()
            del self.llm.forward
        if reduction is None and self.reduction is not None:
            self.reduction.remove()
        self.reduction = reduction
        if reduction is None:
            return
        self.hook = self.inner.register_forward_pre_hook(self._note, with_kwargs=True)
        self.llm.forward = self._forward

    def _note(self, module: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        """Before the inner model runs: which ids are visual, and how the media are laid out."""
        ids = args[0] if args else given.get("input_ids")
        self.visual, self.layouts = None, []
        if ids is None or ids.shape[1] == 1:
            return
        tokens = torch.tensor(list(self.kinds), device=ids.device)
        self.visual = torch.isin(ids, tokens)
        grids = {kind: _grids(module.config, kind, given) for kind in self.kinds.values()}
        for row, start, stop, kind in _runs(ids.tolist(), self.kinds):
            while start < stop:
                frames, separators = next(grids[kind], (None, 0))
                count = sum(grid.tokens for grid in frames) + separators if frames else 0
                if not frames or start + count > stop:  # unknown: all that is left is one set
                    frames, separators, count = [Grid(1, 1, stop - start, raster=False)], 0, stop - start
                self.layouts.append((row, start, frames, separators))
                start += count

    def _forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """In place of the LLM's own."""
        plain = type(self.llm).forward.__get__(self.llm)
        if inputs_embeds is None:
            inputs_embeds = self.llm.get_input_embeddings()(input_ids)
        visual, spans = self.visual, ()
        if visual is None or visual.shape != inputs_embeds.shape[:2]:
            visual = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        else:
            spans = tuple(
                VisualSpan(row, start, _tokens(inputs_embeds[row, start:], frames, separators))
                for row, start, frames, separators in self.layouts
            )
        self.visual = None
        if isinstance(attention_mask, dict):  # prepared by generate for caches of a fixed size
            raise UserError("cache_implementation", "a static cache cannot be reduced", hint="the default cache")
        return self.reduction(
            plain, LLMInputs(inputs_embeds, attention_mask, position_ids, visual, spans=spans), **kwargs
        )


def body_of(model: PreTrainedModel) -> MMLLMModel | StockBody:
    """What a reducer is switched on in.

    Raises:
        UserError: not a model with visual tokens.
    """
    if isinstance(model, MMLLMForConditionalGeneration):
        return model.model
    if isinstance(model, MMLLMModel):
        return model
    if not isinstance(model, PreTrainedModel):
        raise UserError("model", "cannot be reduced", expected="a model of transformers", got=type(model).__name__)
    inner = model if hasattr(model, "language_model") else getattr(model, "model", model)
    if HOME not in inner.__dict__:
        inner.__dict__[HOME] = StockBody(inner)
    return inner.__dict__[HOME]


def _runs(rows: list[list[int]], kinds: dict[int, str]) -> list[tuple[int, int, int, str]]:
    """(row, start, stop, kind) of neighbouring visual tokens of a kind."""
    found = []
    for row, ids in enumerate(rows):
        start = 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or ids[place] != ids[start]:
                if ids[start] in kinds:
                    found.append((row, start, place, kinds[ids[start]]))
                start = place
    return found


def _grids(config: Any, kind: str, given: dict[str, Any]) -> Any:
    """(frames of one medium, separators at its end), medium by medium; nothing where the layout is not known."""
    if (sizes := given.get(f"{kind}_grid_thw")) is not None:  # Qwen2-VL and its relatives
        merge = config.vision_config.spatial_merge_size
        for t, h, w in sizes.tolist():
            yield [Grid(1, h // merge, w // merge)] * t, 0
    elif config.model_type == "llava" and given.get("pixel_values") is not None:
        side = config.vision_config.image_size // config.vision_config.patch_size
        for _ in given["pixel_values"]:
            yield [Grid(1, side, side)], 0
    elif config.model_type == "llava_onevision" and kind == "video" and given.get("pixel_values_videos") is not None:
        side = -(-config.vision_config.image_size // config.vision_config.patch_size // 2)
        for clip in given["pixel_values_videos"]:
            yield [Grid(1, side, side)] * len(clip), 1
    elif config.model_type == "internvl" and given.get("pixel_values") is not None:
        side = int(config.image_seq_length**0.5)
        while True:  # every view and every frame has the same grid
            yield [Grid(1, side, side)], 0


def _tokens(values: Tensor, frames: list[Grid], separators: int) -> VisualTokens:
    """The first of the values [L, D] as the tokens of one medium."""
    count = sum(grid.tokens for grid in frames) + separators
    positions = torch.zeros(count, 3, device=values.device)
    start = 0
    for number, grid in enumerate(frames):
        place = torch.arange(grid.tokens, device=values.device)
        positions[start : start + grid.tokens, 0] = number
        positions[start : start + grid.tokens, 1] = (place // grid.w + 0.5) / grid.h
        positions[start : start + grid.tokens, 2] = (place % grid.w + 0.5) / grid.w
        start += grid.tokens
    positions[start:] = positions[start - 1]
    sizes = torch.ones(count, device=values.device)
    sizes[start:] = 0
    media = MediaSpec("video" if len(frames) > 1 else "image", len(frames))
    times = torch.arange(len(frames), device=values.device, dtype=torch.float32)
    return VisualTokens(values[None, :count], media, None, positions[None], sizes[None], times[None])
