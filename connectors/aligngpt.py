"""AlignGPT: one token that says how completely a text describes its image (Zhao et al. 2024, arXiv 2405.14129)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens


@register("connector", "level_gate")
class LevelGate(Part):
    """A stream of one token: the embedding of the clip's alignment level, or a mixture of levels where it is unknown.

    Levels go from weak to strong; the last is the global one. Pre-training records carry their level. Otherwise a gate
    compares every visual token with the mean of the prompt's tokens and mixes: global + sum of weight * local, weights
    from a softmax. Without a prompt the local levels have equal weights.

    Args:
        levels: their number.
        hidden: width of the gate.
        length: similarities that the gate reads; for another number of tokens they are resampled (adaptive means
            along the tokens). The authors' value: 576, the patches of a view.
        similarity: "dot" as the authors have it; "scaled" by 1 / sqrt(width) or "cosine" where that saturates.
    """

    def __init__(
        self,
        site: Site,
        *,
        levels: int = 8,
        hidden: int = 256,
        length: int = 576,
        similarity: Literal["dot", "scaled", "cosine"] = "dot",
    ) -> None:
        super().__init__(site)
        width = site.inputs[0].width
        if levels < 2:
            raise ValueError(f"levels: a global one and at least one other, not {levels}")
        if site.text_width() != width:
            raise ValueError(f"compares tokens of width {width} with a prompt of width {site.prompt_width}")
        self.levels, self.length, self.similarity = levels, length, similarity
        self.table = nn.Parameter(torch.empty(levels, width))
        self.gate = nn.Sequential(nn.Linear(length, hidden), nn.GELU(), nn.Linear(hidden, levels - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the table as the authors do."""
        from transformers import initialization as init

        init.xavier_uniform_(self.table)

    def needs(self) -> Needs:
        """The prompt's tokens, and levels within the table."""
        return Needs(prompt=("tokens",), alignment_levels=self.levels)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One token."""
        return TokenSpec(inputs[0].media, 1, inputs[0].width)

    def forward(self, *inputs: VisualTokens, prompt: PromptFeatures | None = None) -> VisualTokens:
        """[B, N, D] -> [B, 1, D]; the token has size 0, as it stands for no patch.

        Args:
            prompt: its tokens [B, L, D] without a start token, and `level` [B]: a record's level, -1 = unknown.
        """
        tokens = inputs[0]
        # All weights take part in every batch, whatever its records carry: all processes must use the same parameters.
        token = self.table[-1] + self.weights(tokens.values, prompt).to(self.table.dtype) @ self.table[:-1]
        level = None if prompt is None else prompt.alignment_level
        if level is not None:
            token = token.where(level[:, None] < 0, self.table[level.clamp_min(0)])
        first = torch.full((1,), -1, device=tokens.values.device)
        return tokens.derive(token[:, None].to(tokens.values.dtype), None, index=first)

    def weights(self, values: Tensor, prompt: PromptFeatures | None) -> Tensor:
        """[B, N, D] -> [B, levels - 1] in float32, summing to 1: the weight of each local level."""
        if prompt is None:
            return values.new_full((values.shape[0], self.levels - 1), 1 / (self.levels - 1), dtype=torch.float32)
        near = self._similarity(values.float(), _mean(prompt.tokens.float(), prompt.mask))
        if near.shape[1] != self.length:
            near = nn.functional.adaptive_avg_pool1d(near, self.length)
        logits = self.gate(near.to(values.dtype)).float()
        if prompt.present is not None:
            logits = logits.masked_fill(~prompt.present[:, None], 0)
        return logits.softmax(-1)

    def _similarity(self, values: Tensor, text: Tensor) -> Tensor:
        """Visual tokens [B, N, D] and a prompt [B, D] -> [B, N]."""
        if self.similarity == "cosine":
            values, text = nn.functional.normalize(values, dim=-1), nn.functional.normalize(text, dim=-1)
        near = torch.einsum("bnd,bd->bn", values, text)
        return near / values.shape[-1] ** 0.5 if self.similarity == "scaled" else near

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """As many tokens as the gate reads, more, fewer; each kind of similarity."""
        clip = TokenSpec(MediaSpec("video", 2), 12, 16, Grid(2, 2, 3))
        yield {"length": 12, "hidden": 20, "similarity": "scaled"}, (clip,)
        yield {"length": 5, "hidden": 20, "levels": 4, "similarity": "cosine"}, (clip,)
        yield {"length": 9, "levels": 3, "hidden": 8}, (TokenSpec(MediaSpec("image", 1), 4, 16),)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] over the real ones among the tokens [B, L, D]."""
    real = mask.to(tokens.dtype)
    return torch.einsum("bld,bl->bd", tokens, real) / (real.sum(1, keepdim=True) + 1e-8)
