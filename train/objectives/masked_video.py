"""Reading a video with some of its tokens missing (ST-LLM, Liu et al. 2024, arXiv 2404.00308, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.contract.types import LLMInputs, Term
from mmllm.data.records.conversations import Sample
from mmllm.processing.collate import Example
from mmllm.train.machine import join
from mmllm.train.objectives.language_modeling import LanguageModeling
from mmllm.train.reference import evaluating
from mmllm.train.targets import Targets

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor
    from mmllm.train.context import StageContext


@register("objective", "masked_video")
class MaskedVideo(LanguageModeling):
    """Answers are learnt from videos of which some tokens are removed; the others have to mean what they mean in full.

    A second forward, without gradient, reads the whole video. Hidden states at the tokens that are left, passed through
    a small decoder, are compared with its own there: 2 - 2 cosine. Images and texts are not touched. Validation removes
    tokens too, the same ones each time.

    Args:
        rate: mean and standard deviation of the share that is removed, drawn for each sample in each epoch.
        clip: smallest and largest share.
        weight: of the comparison, beside the answers' cross-entropy; with 0 there is none, and no second forward.
        decoder: compare through a linear layer and a norm, which are trained and are no part of the model.
        positions: of the tokens that are left: "original", with gaps, or "compact", as if nothing had been there.
        target: the second forward reads the "prefix" up to the last token of a video, or the "whole" row. Equal, since
            no token reads what follows it.
        groups: see `language_modeling`.
        reference: as the authors have it: compact positions, one share for all samples of a micro-batch, and videos
            looked for at the same place in all rows, wherever they are.
    """

    def __init__(
        self,
        *,
        rate: tuple[float, float] = (0.5, 0.1),
        clip: tuple[float, float] = (0.1, 0.7),
        weight: float = 1.0,
        decoder: bool = True,
        positions: Literal["original", "compact"] = "original",
        target: Literal["prefix", "whole"] = "prefix",
        groups: int = 1,
        reference: bool = False,
    ) -> None:
        super().__init__(groups=groups)
        where = "objective masked_video"
        if not 0 <= clip[0] <= clip[1] < 1:
            raise UserError(f"{where}: clip", "must be shares below 1, the smaller one first", got=list(clip))
        if rate[1] < 0:
            raise UserError(f"{where}: rate", "its deviation must be 0 or more", got=rate[1])
        if weight < 0:
            raise UserError(f"{where}: weight", "must be 0 or more", got=weight)
        self.rate, self.clip, self.weight, self.target = rate, clip, weight, target
        self.decodes, self.reference = decoder, reference
        self.compact = reference or positions == "compact"
        self.decoder: nn.Module = nn.Identity()

    def prepare(self, samples: list[Sample], processor: MMLLMProcessor) -> Batch:
        """Conversations -> padded batch; `removed` and `watched` [B, L] say which tokens of videos are gone and left.

        Raises:
            UserError: a sample has no answer to learn.
        """
        pairs = self.encoded(samples, processor)
        batch = self.collated([example for _, example in pairs], processor)
        removed, watched = (torch.zeros(batch["input_ids"].shape, dtype=torch.bool) for _ in range(2))
        draws = [np.random.RandomState(sample.draw % 2**32) for sample, _ in pairs]
        shares = [self._share(generator) for generator in draws]
        for row, (_, example) in enumerate(pairs):
            for places in videos(example, processor):
                gone = draw_removed(len(places), shares[0 if self.reference else row], draws[row])
                removed[row, places[gone]] = True
                watched[row, places[~gone]] = True
        return {**batch, "removed": removed, "watched": watched}

    def _share(self, draws: np.random.RandomState) -> float:
        return float(np.clip(draws.normal(*self.rate), *self.clip))

    def bind(self, context: StageContext) -> None:
        """Build the decoder, as wide as the LLM."""
        width = context.model.config.text_config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.options.seed)
            self.build(width)
        self.to(join(context.options).device)

    def build(self, width: int) -> None:
        """The decoder: a linear layer and a norm, if there is to be one."""
        if self.decodes and self.weight:
            self.decoder = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Scored tokens, tokens of videos that are left, and videos' tokens in all."""
        watched = int(batch["watched"].sum())
        shares = {"masked_video": watched, "removed": watched + int(batch["removed"].sum())}
        return {**super().counts(batch), **(shares if self.weight else {"removed": shares["removed"]})}

    def forward(self, model: MMLLMForConditionalGeneration, batch: Batch) -> dict[str, Term]:
        """The summed cross-entropy, the summed distances, and, for the log, how many tokens were removed."""
        sequence, learnt, scored, ours, theirs = model.embed(batch), Targets.of(batch), [], [], []
        for first, last, length in batch["groups"]:
            rows = slice(first, last)
            part = sequence.part(rows, length)
            removed, watched = (batch[key][rows, :length] for key in ("removed", "watched"))
            thin, starts = thinned(part, removed, self.compact), (removed | watched).int().argmax(1)
            hidden, _ = model.run(thin.inputs)
            wanted = learnt.at((rows, slice(length))).taken(thin.index, thin.real).at((slice(None), slice(1, None)))
            own = wanted.ids != -100
            scored.append((hidden[:, :-1][own], wanted.at(own), self.shares(own)))
            if self.weight:
                ours.append(hidden[self._places(thin.gather(watched), starts)])
                theirs.append(self._in_full(model, part, self._places(watched, starts)))
        states, targets, shares = zip(*scored, strict=True)
        answers = self.answers(model, torch.cat(states), Targets.joined(list(targets)), list(shares), batch)
        counts = self.counts(batch)
        terms = {
            "language_modeling": answers,
            "removed": Term(batch["removed"].sum().float(), counts["removed"], 0.0),
        }
        if self.weight:
            apart = distances(self.decoder(torch.cat(ours)), torch.cat(theirs))
            terms["masked_video"] = Term(apart.sum(), counts["masked_video"], self.weight)
        return terms

    @torch.no_grad()
    def _in_full(self, model: MMLLMForConditionalGeneration, part: LLMInputs, places: Tensor) -> Tensor:
        """[M, D], the hidden states of a forward that reads everything, at the tokens that are compared."""
        length = places.shape[1]
        if self.target == "prefix" and not self.reference:
            length = int(places.any(0).nonzero().max()) + 1 if places.any() else 1
        # Rows are right-padded and no token reads what follows it: causal kernels can skip half without a mask.
        whole = replace(part.part(slice(0, len(places)), length), mask=None)
        with evaluating(model):
            hidden, _ = model.run(replace(whole, embeds=whole.embeds.detach()))
        return hidden[places[:, :length]]

    def _places(self, found: Tensor, starts: Tensor) -> Tensor:
        """Which positions [B, L] are compared: those found, or in `reference`, as if all videos began at one place.

        Args:
            starts: [B], where they do.
        """
        if not self.reference:
            return found
        return torch.stack([row.roll(int(starts[0] - start)) for row, start in zip(found, starts, strict=True)])


@dataclass
class Thinned:
    """Rows without the tokens that were removed.

    Attributes:
        inputs: of the LLM; as long as the longest row that is left, always with a mask.
        index: [B, L'], where each position was.
        real: [B, L'], which of them are not padding.
    """

    inputs: LLMInputs
    index: Tensor
    real: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """[B, L] truth values -> [B, L']."""
        return values.gather(1, self.index) & self.real


def thinned(inputs: LLMInputs, removed: Tensor, compact: bool = False) -> Thinned:
    """Take tokens out of rows, whose own order stays; padding goes behind.

    Args:
        removed: [B, L], which.
        compact: count positions anew, instead of leaving gaps.
    """
    keep = ~removed if inputs.mask is None else inputs.mask.bool() & ~removed
    counts = keep.sum(1)
    index = (~keep).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    real = torch.arange(index.shape[1], device=index.device) < counts[:, None]
    places = torch.arange(removed.shape[1], device=index.device).expand_as(removed)
    places = places if inputs.positions is None else inputs.positions
    positions = places[:, : index.shape[1]] if compact else places.gather(1, index)
    embeds = inputs.embeds.gather(1, index[..., None].expand(-1, -1, inputs.embeds.shape[-1]))
    visual = inputs.visual.gather(1, index) & real
    return Thinned(LLMInputs(embeds, real.long(), positions, visual), index, real)


def draw_removed(tokens: int, rate: float, draws: np.random.RandomState) -> np.ndarray:
    """[tokens] truth values, `int(rate * tokens)` of them true."""
    count = int(rate * tokens)
    removed = np.repeat([False, True], [tokens - count, count])
    draws.shuffle(removed)
    return removed


def videos(example: Example, processor: MMLLMProcessor) -> list[np.ndarray]:
    """The positions of each video's tokens in a conversation."""
    found: dict[int, list[np.ndarray]] = {}
    for start, index, stream in example.spans:
        spec = example.media[index].spec
        if spec.kind == "video":
            count = processor.plan.streams(spec)[stream].tokens
            found.setdefault(index, []).append(np.arange(start, start + count))
    return [np.concatenate(parts) for parts in found.values()]


def distances(student: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cosine of rows [M, D], in float32: 0 where they point the same way, 4 where they are opposite."""
    with torch.autocast(student.device.type, enabled=False):
        return 2 - 2 * nn.functional.cosine_similarity(student.float(), target.float(), dim=-1, eps=1e-8)
