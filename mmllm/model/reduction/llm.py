"""A reducer at work in an LLM: switched on and off while the LLM is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmllm.contract.errors import UserError
from mmllm.contract.reducer import Reducer, Schedule
from mmllm.contract.types import LLMInputs
from mmllm.model.encoder_bank import EncoderBank
from mmllm.model.front_end_plan import FrontEndPlan
from mmllm.model.reduction.attention import PREFIX, reducible
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.pixels import side_for, small_bank
from mmllm.model.reduction.run import CACHE, Reduced, run_reduced
from mmllm.model.reduction.setting import build_reducer

PARTS = ("layers", "norm", "rotary_emb")
TOLERANCE = 1e-4
"""Between the library's forward and ours over the same layers; they are equal to the bit where all is well."""


class Reduction:
    """A reducer and the LLM that it works in.

    Args:
        llm: the body of a causal LM of transformers.
        section: `{type: ..., arguments}` of the reducer.
        plan: of the front end before the LLM, where it is ours.

    Attributes:
        section: as given.
        reducer: the reducer itself.
        last: what became of the last prompt, without its hidden states; None where it had nothing to reduce.

    Raises:
        UserError: the LLM does more than its layers in turn, or the budget cannot be met in it.
    """

    def __init__(self, llm: PreTrainedModel, section: dict[str, Any], plan: FrontEndPlan | None = None) -> None:
        self.section, self.reducer = section, build_reducer(section)
        if plan is None and (self.reducer.shrink is not None or self.reducer.cls_attention):
            what = "looks at the encoder, which is the library's here"
            raise UserError(f"reduce {section['type']}", what, hint="a checkpoint loaded by mmllm, or another reducer")
        self.plan, self._bank = plan, None
        if self.reducer.shrink is not None:
            self.side = side_for(plan, self.reducer.shrink**2)
        self.last: Reduced | None = None
        if not llm.config._attn_implementation.startswith(PREFIX):  # otherwise a reducer works in it already
            check_llm(llm)
        try:
            schedule = self.reducer.schedule(len(llm.layers))
        except ValueError as error:
            raise UserError(section["type"], str(error)) from error
        self.idle = schedule.door == 1 and min(schedule.after) == 1
        self.llm, self.base = llm, llm.config._attn_implementation.removeprefix(PREFIX)
        llm.config._attn_implementation = reducible(self.base)

    @property
    def bank(self) -> EncoderBank:
        """The encoders for smaller frames; made again where the model has moved meanwhile."""
        weight = next(self.plan.bank.parameters())
        key = (weight.device, weight.dtype)
        if self._bank is None or self._bank[0] != key:
            self._bank = (key, small_bank(self.plan.bank, self.side))
        return self._bank[1]

    def remove(self) -> None:
        """Leave the LLM as it was."""
        self.llm.config._attn_implementation = self.base

    def __call__(
        self, plain: Callable[..., BaseModelOutputWithPast], inputs: LLMInputs, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """The LLM's body over a prompt with media, or over what follows one; anything else is left to `plain`."""
        cache = kwargs.get(CACHE)
        begun = isinstance(cache, ReducedCache) and cache.seen > 0
        if self.idle or not (begun or inputs.spans) or (not begun and cache is not None and cache.get_seq_length()):
            self.last = None
            return plain(
                inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, **kwargs
            )
        told = [name for name, value in kwargs.items() if name != CACHE and _tensors(value)]
        if told:
            what = f"its LLM is told more than embeddings ({', '.join(told)}), which a shorter sequence would not fit"
            raise UserError(f"reduce {self.section['type']}", what)
        if begun:
            found = run_reduced(self.llm, inputs, self.reducer, cache)
            return BaseModelOutputWithPast(last_hidden_state=found.hidden, **{CACHE: cache})
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = cache is not None or (self.llm.config.use_cache and not self.llm.training)
        found = run_reduced(self.llm, inputs, self.reducer, ReducedCache() if wanted else None)
        self.last = replace(found, hidden=found.hidden[:, :0], cache=None)  # what it held is not ours to keep
        return BaseModelOutputWithPast(last_hidden_state=found.hidden, **{CACHE: found.cache})


def _tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_tensors, value)))


def check_llm(llm: PreTrainedModel) -> None:
    """Refuse an LLM whose forward does more than call its layers: ours would leave that out.

    Raises:
        UserError: names what does not fit.
    """
    name = llm.config.model_type
    missing = [part for part in PARTS if not hasattr(llm, part)]
    if missing:
        raise UserError(name, f"cannot be reduced: this LLM has no {', '.join(missing)}")
    kinds = getattr(llm.config, "layer_types", None) or ["full_attention"]
    if any(kind != "full_attention" for kind in kinds) or (
        getattr(llm.config, "layer_types", None) is None and getattr(llm.config, "sliding_window", None)
    ):
        raise UserError(name, "cannot be reduced: some of its layers see only a window")
    if next(llm.parameters()).is_meta:
        return
    theirs, ours = _both(llm)
    if not torch.allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE):
        raise UserError(name, "cannot be reduced: its forward does more than call its layers in turn")


@torch.no_grad()
def _both(llm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The library's result for a few tokens, and ours."""
    weight = llm.get_input_embeddings().weight
    embeds = weight[: min(4, len(weight))][None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    training = llm.training
    llm.eval()
    try:
        theirs = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        inputs = LLMInputs(embeds, mask, None, torch.zeros_like(mask, dtype=torch.bool))
        return theirs.float(), run_reduced(llm, inputs, _Everything()).hidden.float()
    finally:
        llm.train(training)


class _Everything(Reducer):
    def schedule(self, layers: int) -> Schedule:
        """All of it."""
        return Schedule(1.0, (1.0,) * layers)
