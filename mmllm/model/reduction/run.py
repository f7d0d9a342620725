"""An LLM's layers over a sequence that gets shorter: the one place through which prefill and decoding pass.

Source: AIM (Zhong et al. 2025), arXiv 2412.03248, section 3.2, with tokens removed instead of masked.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from mmllm.contract.reducer import Reducer, Schedule
from mmllm.contract.types import LLMInputs
from mmllm.model.reduction.attention import Look, Shown, stop
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.rows import Rows, enter, gathered

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What the library calls the argument; it was renamed after 5.23."""
Mode = Literal["drop", "mask"]


@dataclass
class Reduced:
    """What comes out, at the length that went in.

    Attributes:
        hidden: [B, L, D], zeros where a token was dropped.
        kept: [B, L] bool, which positions have a hidden state.
        cache: for the next tokens, or None.
        entering: for each layer [B], how many visual tokens entered it.
        dropped: [B, L], after which layer a position was dropped; -1 at the door, the number of layers if never.
        sources: {number of a span: for each of its tokens the place in the span that it went into at the door}.
    """

    hidden: Tensor
    kept: Tensor
    cache: ReducedCache | None = None
    entering: list[Tensor] = field(default_factory=list)
    dropped: Tensor | None = None
    sources: dict[int, Tensor] = field(default_factory=dict)


def run_reduced(
    llm: PreTrainedModel,
    inputs: LLMInputs,
    reducer: Reducer,
    cache: ReducedCache | None = None,
    mode: Mode = "drop",
) -> Reduced:
    """The body of an LLM over a sequence, on fewer visual tokens after some of its layers.

    Args:
        llm: a decoder of transformers, whose attention is `reducible`.
        inputs: the whole prompt, or what follows the prompt that is in the cache.
        cache: keys and values of what came before, and where to keep those of this sequence; None = keep none.
        mode: "drop" removes tokens. "mask" only hides them from what follows, as AIM's code does; they still vote in
            the first round. For comparisons.
    """
    if cache is not None and cache.seen:
        return _continue(llm, inputs, cache)
    schedule = reducer.schedule(len(llm.layers))
    whole = Rows.begin(inputs, _positions(inputs, 0))
    rows, sources = enter(whole, inputs, reducer)
    out = Reduced(inputs.embeds, whole.real, cache, sources=sources)
    run = _Prefill(llm, reducer, schedule, mode, rows, cache)
    for number in range(len(llm.layers)):
        out.entering.append(run.seen.sum(1))
        run.layer(number)
    length = inputs.embeds.shape[1]
    out.hidden = run.rows.spread(llm.norm(run.rows.hidden), length)
    out.kept = run.rows.places(run.visible, length)
    out.dropped = _dropped(run.dropped, rows.places(rows.real, length), len(llm.layers))
    if cache is not None:
        cache.seen = length
    return out


class _Prefill:
    """The layers over a prompt, one after the other.

    Attributes:
        rows: what the next layer reads.
        visible: [B, n] bool, which of its rows later tokens can see: all real ones where tokens are dropped.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        reducer: Reducer,
        schedule: Schedule,
        mode: Mode,
        rows: Rows,
        cache: ReducedCache | None,
    ) -> None:
        self.llm, self.reducer, self.mode, self.rows, self.cache = llm, reducer, mode, rows, cache
        self.visible = rows.real
        visual, real = rows.visual.sum(1).tolist(), rows.real.sum(1).tolist()
        pairs = zip(visual, real, strict=True)
        self.counts = [schedule.counts(own, total - own) for own, total in pairs]
        self.dropped: list[tuple[int, Tensor, Tensor]] = []
        self._prepare()

    @property
    def seen(self) -> Tensor:
        """[B, n] bool, the visual tokens that are left."""
        return self.rows.visual & self.visible & self.rows.real

    def _prepare(self) -> None:
        """What the layers need besides hidden states, until tokens disappear."""
        self.angles = self.llm.rotary_emb(self.rows.hidden, self.rows.positions)
        self.mask = causal_mask(self.llm, self.rows.hidden, self.visible)
        self.full = bool(self.visible.all())

    def layer(self, number: int) -> None:
        """One layer, and what is dropped after it."""
        if self.cache is not None:
            self.cache.note(number, self.visible, self.full)
        wanted = [counts[number] for counts in self.counts]
        now = self.seen.sum(1).tolist()
        if all(few >= many for few, many in zip(wanted, now, strict=True)):
            hidden = self._call(number)
            self.rows = replace(self.rows, hidden=hidden)
        elif self.mode == "drop":
            self._drop(number, wanted, now)
        else:
            self._hide(number, wanted, now)

    def _call(self, number: int, look: Look | None = None) -> Tensor:
        return call_layer(
            self.llm.layers[number],
            self.rows.hidden,
            self.mask,
            self.angles,
            self.rows.positions,
            self.cache,
            **({} if look is None else {"look": look}),
        )

    def _drop(self, number: int, wanted: list[int], now: list[int]) -> None:
        """Chosen once the attention is known; only survivors pass through the rest of the layer."""
        layer = self.llm.layers[number]
        before = getattr(layer, "gradient_checkpointing", False)
        layer.gradient_checkpointing = False  # a recomputation would stop where this call stops
        try:
            self._call(number, stop)
        except Shown as shown:
            keep = self._chosen(shown.q, shown.k, wanted, now)
            out = gathered(shown.out, self.rows.order(keep))
        finally:
            layer.gradient_checkpointing = before
        self.dropped.append((number, self.rows.index, self.rows.real & ~keep))
        self.rows = self.rows.take(keep)
        self.visible = self.rows.real
        self._prepare()
        hidden = call_layer(layer, self.rows.hidden, None, self.angles, self.rows.positions, None, answer=out)
        self.rows = replace(self.rows, hidden=hidden)

    def _hide(self, number: int, wanted: list[int], now: list[int]) -> None:
        shown: list[Tensor] = []
        hidden = self._call(number, lambda q, k, out: shown.extend((q, k)))
        keep = self._chosen(*shown, wanted, now)
        self.dropped.append((number, self.rows.index, self.visible & ~keep))
        self.visible = self.visible & keep
        self.rows = replace(self.rows, hidden=hidden)
        self._prepare()

    @torch.no_grad()
    def _chosen(self, q: Tensor, k: Tensor, wanted: list[int], now: list[int]) -> Tensor:
        """[B, n] bool: text, and the visual tokens that score highest; among equals the earlier ones."""
        keep = self.rows.real & ~self.rows.visual
        for row, (few, many) in enumerate(zip(wanted, now, strict=True)):
            if few >= many:
                keep[row] |= self.seen[row]
            elif few > 0:
                real = self.rows.real[row].nonzero()[:, 0]
                seen, voting = self.seen[row, real], self.visible[row, real]
                score = self.reducer.score(q[row][:, real], k[row][:, real], seen, voting)
                score = score.masked_fill(~seen, -torch.inf)
                keep[row, real[score.argsort(descending=True, stable=True)[:few]]] = True
        return keep


def _continue(llm: PreTrainedModel, inputs: LLMInputs, cache: ReducedCache) -> Reduced:
    """New tokens after the prompt: each layer sees what it kept, positions go on after the whole prompt."""
    hidden, positions = inputs.embeds, _positions(inputs, cache.seen)
    length = hidden.shape[1]
    angles = llm.rotary_emb(hidden, positions)
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if inputs.mask is not None:
        real = inputs.mask[:, -length:].bool()
    full = bool(real.all())
    for number, layer in enumerate(llm.layers):
        seen = cache.note(number, real, full)
        mask = None
        if length > 1 or not cache.full[number]:
            mask = causal_mask(llm, hidden, seen, cache, number)
        hidden = call_layer(layer, hidden, mask, angles, positions, cache)
    cache.seen += length
    return Reduced(llm.norm(hidden), real, cache)


def call_layer(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor | None,
    angles: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: ReducedCache | None,
    **context: Look | Tensor,
) -> Tensor:
    """A decoder layer of transformers; `context` reaches its attention."""
    return layer(
        hidden,
        attention_mask=mask,
        position_embeddings=angles,
        position_ids=positions if positions.dim() == 2 else None,
        use_cache=cache is not None,
        **{CACHE: cache},
        **context,
    )


def causal_mask(
    llm: PreTrainedModel, hidden: Tensor, real: Tensor, cache: ReducedCache | None = None, layer: int | None = None
) -> Tensor | None:
    """The mask as the LLM's attention takes it. Positions are not shown: gaps in them would pass for packed samples."""
    return create_causal_mask(
        config=llm.config, inputs_embeds=hidden, attention_mask=real, layer_idx=layer, **{CACHE: cache}
    )


def _positions(inputs: LLMInputs, start: int) -> Tensor:
    """Positions of new tokens, [B, n] or [axes, B, n]; by default they go on from `start`."""
    batch, length = inputs.embeds.shape[:2]
    if inputs.positions is None:
        return (torch.arange(length, device=inputs.embeds.device) + start).expand(batch, -1)
    positions = inputs.positions
    if positions.dim() == 3 and positions.shape[0] == 4:  # text positions stand before the three axes
        positions = positions[1:]
    return positions.expand(*positions.shape[:-2], batch, length)


def _dropped(gone: list[tuple[int, Tensor, Tensor]], entered: Tensor, layers: int) -> Tensor:
    """[B, L], after which layer each position was dropped; padding counts as dropped at the door."""
    out = torch.where(entered, layers, -1)
    for number, index, flags in gone:
        out = out.scatter(1, index, torch.where(flags, number, out.gather(1, index)))
    return out
