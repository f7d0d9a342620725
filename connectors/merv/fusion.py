"""MERV's fusion: streams of several encoders on one grid become one stream (Chung et al. 2025, section 3.3).

Beside it are the alternatives that the paper compares it with: channels joined, sequences joined, static weights, a
mean. Every weighted sum writes its weights to the extras of its tokens: `fusion` [B, E], a weight per clip and stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.connectors.merv.attention import AuthorsAttention, CollapsedAttention, blend
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


class Aligned(Part):
    """A part that reads streams on one grid and of one width; a stream of one token is repeated at all positions."""

    def aligned(self, inputs: list[TokenSpec]) -> int:
        """The stream that determines the grid: the first with more than one token.

        Raises:
            ValueError: a stream has another width, another grid or another number of tokens.
        """
        lead = next((index for index, spec in enumerate(inputs) if spec.tokens > 1), 0)
        first = inputs[lead]
        for number, spec in enumerate(inputs, start=1):
            if spec.width != first.width:
                raise ValueError(f"stream {number} has width {spec.width}, stream {lead + 1} has {first.width}")
            if spec.tokens > 1 and (spec.tokens, _shape(spec.grid)) != (first.tokens, _shape(first.grid)):
                raise ValueError(f"stream {number} is {_grid_name(spec)}, stream {lead + 1} is {_grid_name(first)}")
        return lead

    def common(self, inputs: list[TokenSpec]) -> TokenSpec:
        """The spec of the output stream; it is a raster where all streams are."""
        lead = inputs[self.aligned(inputs)]
        grid = lead.grid
        if grid is not None:
            raster = all(spec.grid is None or spec.grid.raster for spec in inputs if spec.tokens == lead.tokens)
            grid = replace(grid, raster=raster)
        return TokenSpec(lead.media, lead.tokens, lead.width, grid)

    def lead(self, inputs: tuple[VisualTokens, ...]) -> tuple[VisualTokens, list[Tensor]]:
        """The leading stream on the common grid and without extras, and the values [B, T, d] of all."""
        specs = [tokens.spec for tokens in inputs]
        common = self.common(specs)
        lead = replace(inputs[self.aligned(specs)], grid=common.grid, extras={})
        return lead, [tokens.values.expand(-1, common.tokens, -1) for tokens in inputs]

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Two streams, three of which one has one token, streams that are a set, one frame without a grid."""
        yield {}, _streams(Grid(2, 2, 3), Grid(2, 2, 3))
        yield {}, _streams(Grid(1, 1, 1), Grid(3, 2, 1), Grid(3, 2, 1, raster=False))
        still = TokenSpec(MediaSpec("image", 1), 5, 16)
        yield {}, (still, still)


class WeightedSum(Aligned):
    """Sum of the streams by weights that sum to 1 over them."""

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One stream; extras: `fusion`, the weight of each stream.

        Raises:
            ValueError: the streams are not aligned.
        """
        return replace(self.common(list(inputs)), extras={"fusion": (len(inputs),)})

    def mix(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their sum [B, T, d] and the weights [B, E] in float32."""
        raise NotImplementedError

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """E token sets [B, T, d] -> [B, T, d]; positions, sizes and times are those of the leading stream."""
        lead, streams = self.lead(inputs)
        values, weights = self.mix(streams)
        return replace(lead, values=values, extras={"fusion": weights})

    def multiply_adds(self, *inputs: TokenSpec) -> int:
        """One per number in each stream."""
        spec = self.common(list(inputs))
        return len(inputs) * spec.tokens * spec.width


@register("connector", "cross_attentive_fusion")
class CrossAttentiveFusion(WeightedSum):
    """A learned query looks at each stream's mean token; the softmax over streams is the clip's own mixture.

    By default an exact cheap form: only the direction u that the means are multiplied by is stored, and the streams
    are not copied. `reference` builds the authors' module, including the projections that have no effect.

    Args:
        attn_dim: width of the authors' attention; None = the paper's formula, softmax(<Q, mean> / sqrt(d)).
        positions: add what a stream is worth whatever it shows (P_e; in the cheap form one number per stream).
        keys: what the query attends to: the "mean" token of a stream, or all its tokens concatenated ("flat").
        tokens: per stream; only for flat keys, whose weights depend on their number.
        reference: the authors' module, for their checkpoints.
    """

    def __init__(
        self,
        site: Site,
        *,
        attn_dim: int | None = 3072,
        positions: bool = False,
        keys: Literal["mean", "flat"] = "mean",
        tokens: int | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__(site)
        if (tokens is None) != (keys == "mean"):
            raise ValueError("tokens: set this (tokens per stream) with flat keys, and only then")
        if positions and keys == "flat":
            raise ValueError("positions: they are added to mean keys only")
        if reference and attn_dim is None:
            raise ValueError("reference: the authors' module has an attn_dim")
        self.flat_tokens = tokens
        form = AuthorsAttention if reference else CollapsedAttention
        self.attention = form(site.inputs[0].width, len(site.inputs), attn_dim, positions, tokens)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' module starts; the cheap form with the same variance of u."""
        self.attention.reset_parameters()

    def load_authors(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights of the authors' module (`Q`, `attention.*`, `pe`) into either form."""
        self.attention.load_authors(weights)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One stream; extras: `fusion`, the weight of each stream.

        Raises:
            ValueError: the streams are not aligned, or flat keys are for another number of tokens.
        """
        spec = super().output_spec(*inputs)
        if self.flat_tokens not in (None, spec.tokens):
            raise ValueError(f"flat keys of {self.flat_tokens} tokens, a stream has {spec.tokens}")
        return spec

    def mix(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their sum [B, T, d] and the weights [B, E]."""
        return self.attention(streams)

    def multiply_adds(self, *inputs: TokenSpec) -> int:
        """Those of means and sum, the query's products, and the authors' projections where they exist."""
        projected = self.attention.multiply_adds(len(inputs))
        return 2 * super().multiply_adds(*inputs) + projected

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Both keys, positions, the paper's formula. Not `reference`: half of its weights get no gradient."""
        for _, inputs in super().examples():
            yield {}, inputs
        inputs = _streams(Grid(2, 2, 3), Grid(2, 2, 3), Grid(1, 1, 1))
        yield {"positions": True, "attn_dim": 8}, inputs
        yield {"attn_dim": None}, inputs
        yield {"keys": "flat", "tokens": 12, "attn_dim": 16}, inputs


@register("connector", "static_fusion")
class StaticFusion(WeightedSum):
    """Learned weights, the same for every clip."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.logits = nn.Parameter(torch.empty(len(site.inputs)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal, as in the authors' code."""
        from transformers import initialization as init

        init.normal_(self.logits)

    def mix(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their sum [B, T, d] and the weights [B, E]."""
        weights = self.logits.float().softmax(0).expand(streams[0].shape[0], -1)
        return blend(streams, weights), weights


@register("connector", "mean_fusion")
class MeanFusion(WeightedSum):
    """The mean of the streams."""

    def mix(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their mean [B, T, d] and the weights [B, E], all equal."""
        shape = (streams[0].shape[0], len(streams))
        weights = torch.full(shape, 1 / len(streams), device=streams[0].device)
        return blend(streams, weights), weights


@register("connector", "channel_concat")
class ChannelConcat(Aligned):
    """The streams joined along the width, then one linear layer.

    Args:
        width: output width, a number or "llm".
        norm: a layer norm before the linear layer.
    """

    def __init__(self, site: Site, *, width: int | str = "llm", norm: bool = False) -> None:
        super().__init__(site)
        joined = sum(spec.width for spec in site.inputs)
        self.norm = nn.LayerNorm(joined) if norm else nn.Identity()
        self.linear = nn.Linear(joined, site.width(width))

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One stream.

        Raises:
            ValueError: the streams are not aligned.
        """
        return self.common(list(inputs)).to_width(self.linear.out_features)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """E token sets [B, T, d] -> [B, T, width]."""
        lead, streams = self.lead(inputs)
        return replace(lead, values=self.linear(self.norm(torch.cat(streams, dim=-1))))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """With and without a norm."""
        for number, (_, inputs) in enumerate(super().examples()):
            yield {"norm": number == 1, "width": 20 if number == 1 else "llm"}, inputs


@register("connector", "sequence_concat")
class SequenceConcat(Part):
    """The tokens of the first stream, then those of the second, and so on; only the widths have to match."""

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The tokens of all streams; no grid.

        Raises:
            ValueError: a stream has another width.
        """
        for number, spec in enumerate(inputs, start=1):
            if spec.width != inputs[0].width:
                raise ValueError(f"stream {number} has width {spec.width}, stream 1 has {inputs[0].width}")
        return TokenSpec(inputs[0].media, sum(spec.tokens for spec in inputs), inputs[0].width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """E token sets [B, T_e, d] -> [B, sum of T_e, d]; times are those of the first."""
        fields = ("values", "positions", "sizes")
        joined = {name: torch.cat([getattr(tokens, name) for tokens in inputs], dim=1) for name in fields}
        return replace(inputs[0], grid=None, extras={}, sources=_joined_sources(inputs), **joined)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Streams of different lengths, and a single one."""
        yield {}, _streams(Grid(2, 2, 3), Grid(1, 1, 1), Grid(3, 1, 2))
        yield {}, _streams(Grid(2, 2, 3))


def _joined_sources(inputs: tuple[VisualTokens, ...]) -> Tensor | None:
    """[B, P], where each patch went: into the first stream that has it; None for streams of other patches."""
    sources = [tokens.sources for tokens in inputs]
    if any(into is None or into.shape != sources[0].shape for into in sources):
        return None
    found, first = torch.full_like(sources[0], -1), 0
    for tokens, into in zip(inputs, sources, strict=True):
        found = torch.where((found < 0) & (into >= 0), into + first, found)
        first += tokens.values.shape[1]
    return found


def _shape(grid: Grid | None) -> tuple[int, int, int] | None:
    return grid and (grid.t, grid.h, grid.w)


def _grid_name(spec: TokenSpec) -> str:
    return f"on a grid of {spec.grid}" if spec.grid else f"{spec.tokens} tokens without a grid"


def _streams(*grids: Grid) -> tuple[TokenSpec, ...]:
    return tuple(TokenSpec(MediaSpec("video", 6), grid.tokens, 16, grid) for grid in grids)
