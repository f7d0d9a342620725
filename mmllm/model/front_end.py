"""The front end: encoders and connectors at work. Called once per forward, returns one tensor of rows.

Rows are in the order of the pairs and, within a pair, in the order of its streams; blank rows come last.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.batch import VisualInputs
from mmllm.contract.types import MediaSpec, Needs, PromptFeatures, VisualTokens
from mmllm.model.connector_graph import KINDS, own_prompt, select_hidden_states
from mmllm.model.encoder_bank import EncoderBank
from mmllm.model.front_end_plan import FrontEndPlan
from mmllm.model.vocabulary import CoordinateTables


class FrontEnd(nn.Module):
    """Encoders, text sources and connectors of a `model` section.

    Args:
        section: the resolved `model` section of a recipe.
        llm_width: width of the LLM's embeddings.

    Attributes:
        plan: which part reads what, and all shapes.

    Raises:
        UserError: see `FrontEndPlan`.
    """

    def __init__(self, section: dict[str, Any], llm_width: int) -> None:
        super().__init__()
        self.plan = FrontEndPlan(section, llm_width)
        self.bank, self.prompts, self.parts = self.plan.bank, self.plan.prompts, self.plan.parts
        self._vocabulary: tuple[CoordinateTables, ...] = ()

    def use(self, vocabulary: CoordinateTables) -> None:
        """Hand the tables of a vocabulary to parts that read them; they stay the model's."""
        self._vocabulary = (vocabulary,)

    def forward(
        self, visual: VisualInputs, blank: tuple[MediaSpec, ...] = (), embed_tokens: nn.Module | None = None
    ) -> tuple[Tensor, int]:
        """All visual rows of a batch.

        Args:
            visual: the batch's dict of media, pairs, prompts and spans.
            blank: kinds of media to run on blank inputs, so that every process uses the same parameters.
            embed_tokens: the LLM's embedding table, for text sources without their own.

        Returns:
            rows [R, D], and how many of the last are blank.
        """
        return self.joined(self.streams(visual, embed_tokens), blank, embed_tokens)

    def streams(
        self,
        visual: VisualInputs,
        embed_tokens: nn.Module | None = None,
        sources: bool = False,
        cls_attention: bool = False,
        bank: EncoderBank | None = None,
    ) -> list[list[VisualTokens]]:
        """For each pair its streams, [1, N, D] each.

        Args:
            sources: they know the encoder's patches that they hold.
            cls_attention: they carry the attention of the tower's CLS token, if there is one and parts keep the tokens.
            bank: encoders of the same names to use instead.
        """
        pairs, device = visual["pairs"], next(self.parameters()).device
        asked = visual.get("prompts") or self.prompts.blank(device)
        prompts = self.prompts(asked, self.plan.text_needs, embed_tokens) if pairs else {}
        per_pair: dict[int, list[VisualTokens]] = {}
        for spec, members in _groups(visual):
            tokens, guides = self._encode(spec, visual, members, prompts, cls_attention, bank)
            if sources:
                tokens = {name: _with_sources(value) for name, value in tokens.items()}
            streams = self._connect(spec, tokens, guides)
            for row, index in enumerate(members):
                per_pair[index] = [stream.row(row) for stream in streams]
        return [per_pair[index] for index in range(len(pairs))]

    def joined(
        self,
        streams: list[list[VisualTokens]],
        blank: tuple[MediaSpec, ...] = (),
        embed_tokens: nn.Module | None = None,
    ) -> tuple[Tensor, int]:
        """The rows of `streams`, then those of blank inputs; see `forward`."""
        rows = [stream.values[0] for pair in streams for stream in pair]
        blanks = [tokens.values.flatten(0, 1) for spec in blank for tokens in self._run_blank(spec, embed_tokens)]
        if not rows and not blanks:
            return next(self.parameters()).new_zeros(0, self.plan.llm_width), 0
        return torch.cat(rows + blanks), sum(len(rows) for rows in blanks)

    def tokens_of(self, visual: VisualInputs, name: str, embed_tokens: nn.Module | None = None) -> list[VisualTokens]:
        """The output of the encoder or node `name` for each pair, in order, one row each: for inspection."""
        asked = visual.get("prompts") or self.prompts.blank(next(self.parameters()).device)
        prompts = self.prompts(asked, self.plan.text_needs, embed_tokens)
        found: dict[int, VisualTokens] = {}
        for spec, members in _groups(visual):
            tokens, guides = self._encode(spec, visual, members, prompts)
            self._connect(spec, tokens, guides)
            for row, index in enumerate(members):
                found[index] = tokens[name].row(row)
        return [found[index] for index in range(len(visual["pairs"]))]

    def _encode(
        self,
        spec: MediaSpec,
        visual: VisualInputs,
        members: list[int],
        prompts: dict[str, PromptFeatures],
        cls_attention: bool = False,
        bank: EncoderBank | None = None,
    ) -> tuple[dict[str, VisualTokens], dict[str, PromptFeatures]]:
        """Tokens and prompts of some pairs: each clip is encoded once, however many prompts go with it."""
        pairs = [visual["pairs"][index] for index in members]
        clips = list(dict.fromkeys(clip for clip, _ in pairs))
        used, needs = set(self.plan.encoders_of(spec)), self.plan.needs
        if cls_attention:
            needs = {name: replace(needs.get(name, Needs()), cls_attention=True) for name in used}
        tokens = (bank or self.bank)([visual["media"][clip] for clip in clips], spec, needs, used)
        if len(clips) < len(pairs):
            index = torch.tensor([clips.index(clip) for clip, _ in pairs], device=next(self.parameters()).device)
            tokens = {name: value.select(index) for name, value in tokens.items()}
        if "prompts" not in visual:  # there is then one empty prompt
            pairs = [(clip, 0) for clip, _ in pairs]
        chosen = [prompt for _, prompt in pairs]
        return tokens, {name: features.select(chosen) for name, features in prompts.items()}

    def _run_blank(self, spec: MediaSpec, embed_tokens: nn.Module | None) -> list[VisualTokens]:
        parameter = next(self.parameters())
        encoded = {}
        for name in sorted(self.plan.encoders_of(spec)):
            encoder = self.bank.encoders[name]
            if encoder.trainable:
                g = encoder.geometry
                shape = (1, encoder.frames_of(spec), 3, g.height, g.width)
                pixels = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
                encoded[name] = encoder(pixels, spec, self.plan.needs.get(name, Needs()))
            else:
                encoded[name] = self.bank.blank(spec, name, parameter, self.plan.needs.get(name, Needs()))
        prompts = self.prompts(self.prompts.blank(parameter.device), self.plan.text_needs, embed_tokens)
        return self._connect(spec, encoded, prompts)

    def _connect(
        self, spec: MediaSpec, tokens: dict[str, VisualTokens], prompts: dict[str, PromptFeatures]
    ) -> list[VisualTokens]:
        for node in self.plan.nodes:
            if node.name not in self.plan.used[spec.kind]:
                continue
            if not node.runs(spec):
                tokens[node.name] = tokens[node.inputs[0]]
                continue
            inputs = [tokens[name] for name in node.inputs]
            part, first = self.parts[node.name], node.inputs[0]
            if first in self.bank.encoders:
                inputs[0] = select_hidden_states(inputs[0], part.needs(), self.plan.needs[first])
            context = {}
            if part.needs().tables:
                context["tables"] = self._vocabulary[0]()
            if self.plan.guided(node):
                context["prompt"] = own_prompt(prompts[node.prompt], part.needs(), self.plan.text_needs[node.prompt])
            tokens[node.name] = part(*inputs, **context)
        return [tokens[name] for name in self.plan.output[spec.kind]]

    def blanks(self, visual: VisualInputs) -> tuple[MediaSpec, ...]:
        """The kinds of media missing from this batch, as blanks: run when several processes train together."""
        present = {clip["spec"].kind for clip in visual["media"]}
        return tuple(self.plan.nominal(kind) for kind in KINDS if kind not in present)


def _with_sources(tokens: VisualTokens) -> VisualTokens:
    """An encoder's tokens, each of which is a patch."""
    count = tokens.values.shape[1]
    return replace(tokens, sources=torch.arange(count, device=tokens.values.device).expand(len(tokens.values), -1))


def _groups(visual: VisualInputs) -> list[tuple[MediaSpec, list[int]]]:
    """(kind of media, indices of its pairs), in an order that is the same in every process."""
    groups: dict[MediaSpec, list[int]] = {}
    for index, (clip, _) in enumerate(visual["pairs"]):
        groups.setdefault(visual["media"][clip]["spec"], []).append(index)
    return sorted(groups.items(), key=lambda item: item[0].sort_key)
