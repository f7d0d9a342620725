"""LongVLM: a long video as the merged patches of its segments, behind a few tokens of the whole (Weng et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.connectors.common.merging import Merging
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, TokenSpec, VisualTokens


@register("connector", "segment_merge")
class SegmentMerge(Part):
    """Cuts a clip into segments of equally many frames and merges the tokens of each, whatever their frame.

    Every token of the result is the mean of the patches in it. The last segment may be shorter; it gives as many
    tokens as the others, or all it has.

    Args:
        frames_per_segment: K.
        tokens_per_segment: M.
        amounts: how many tokens each step removes, at most half of those that are left; default: halve as often as M
            allows, then remove the rest.
        heads: tokens are compared by the mean over this many equal parts of their width.
        order: of the tokens of a segment: "match" as the last step leaves them (the authors'), or by "time".
    """

    def __init__(
        self,
        site: Site,
        *,
        frames_per_segment: int = 10,
        tokens_per_segment: int = 30,
        amounts: tuple[int, ...] | None = None,
        heads: int = 16,
        order: Literal["match", "time"] = "match",
    ) -> None:
        super().__init__(site)
        for name, value in (("frames_per_segment", frames_per_segment), ("tokens_per_segment", tokens_per_segment)):
            if value < 1:
                raise ValueError(f"{name} is 1 or more, not {value}")
        if amounts is not None and min(amounts, default=1) < 1:
            raise ValueError(f"amounts are numbers of tokens, not {list(amounts)}")
        if heads < 1 or site.inputs[0].width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {site.inputs[0].width}")
        self.frames, self.tokens, self.heads, self.order = frames_per_segment, tokens_per_segment, heads, order
        self.amounts = amounts

    def steps(self, tokens: int) -> list[int]:
        """How many tokens each step removes from a segment of so many."""
        if self.amounts is None:
            return halvings(tokens, self.tokens)
        steps = []
        for amount in self.amounts:
            steps.append(min(amount, tokens // 2))
            tokens -= steps[-1]
        return steps

    def segments(self, grid: Grid) -> list[int]:
        """Frames of each segment."""
        whole, rest = divmod(grid.t, self.frames)
        return [self.frames] * whole + [rest] * (rest > 0)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The tokens of all segments, in the order of time, without a grid.

        Raises:
            ValueError: the input has no grid, so its frames cannot be told apart.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"cuts a grid into segments of frames, got {spec}")
        per_frame = spec.grid.h * spec.grid.w
        counts = [frames * per_frame for frames in self.segments(spec.grid)]
        return TokenSpec(spec.media, sum(count - sum(self.steps(count)) for count in counts), spec.width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, T n, C] -> [B, M S, C]; positions are means like the values, sizes are sums."""
        tokens = inputs[0]
        per_frame, batch = tokens.grid.h * tokens.grid.w, len(tokens.values)
        lengths = [frames * per_frame for frames in self.segments(tokens.grid)]
        whole = sum(length for length in lengths if length == lengths[0])  # all of them but a shorter last one
        parts = [self._merged(tokens, slice(0, whole), lengths[0])]
        if whole < sum(lengths):
            parts.append(self._merged(tokens, slice(whole, sum(lengths)), lengths[-1]))
        values, positions, sizes = (
            torch.cat([getattr(part, name).unflatten(0, (batch, -1)).flatten(1, 2) for part in parts], dim=1)
            for name in ("values", "positions", "sizes")
        )
        followed = tokens.followed(_into(parts, batch)) if tokens.sources is not None else None
        values = values.to(tokens.values.dtype)
        return VisualTokens(values, tokens.media, None, positions, sizes, tokens.times, sources=followed)

    def _merged(self, tokens: VisualTokens, where: slice, length: int) -> Merging:
        """Equally long segments of all clips, [B S, M, ...]; in float32, since near ties decide the order."""
        values, positions, sizes = (
            value[:, where].unflatten(1, (-1, length)).flatten(0, 1)
            for value in (tokens.values.float(), tokens.positions, tokens.sizes)
        )
        merging = Merging.of(values, positions, sizes)
        for r in self.steps(length):
            merging = merging.step(merging.values.unflatten(-1, (self.heads, -1)).mean(-2), r, weighted=True)
        if self.order == "time":
            merging = merging.ordered(merging.positions[..., 0].argsort(dim=1, stable=True))
        return merging

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Whole segments, a shorter last one, fewer tokens than asked for, steps of one's own, an image."""
        clip = TokenSpec(MediaSpec("video", 5), 5 * 2 * 3, 8, Grid(5, 2, 3))
        yield {"frames_per_segment": 5, "tokens_per_segment": 4, "heads": 4}, (clip,)
        yield {"frames_per_segment": 2, "tokens_per_segment": 4, "heads": 2, "order": "time"}, (clip,)
        yield {"frames_per_segment": 3, "tokens_per_segment": 15, "heads": 1}, (clip,)
        yield {"frames_per_segment": 4, "amounts": (9, 20, 2), "heads": 8}, (clip,)
        yield {"tokens_per_segment": 4, "heads": 2}, (TokenSpec(MediaSpec("image", 1), 6, 8, Grid(1, 2, 3)),)


@register("connector", "global_tokens")
class GlobalTokens(Part):
    """One token for each of several layers of an encoder: its CLS token, averaged over all frames.

    They stand for no patch of their own: their size is 0.

    Args:
        layers: numbered like the encoder's; the deepest last.
        of: what is averaged: "cls", or "patches" of an encoder that has no CLS token. With "patches", no layers mean
            the encoder's own tokens.
        tagged: add a learned embedding per layer, which starts at zero.
    """

    def __init__(
        self,
        site: Site,
        *,
        layers: tuple[int, ...] = (-5, -4, -3, -2, -1),
        of: Literal["cls", "patches"] = "cls",
        tagged: bool = False,
    ) -> None:
        super().__init__(site)
        if of == "cls" and not layers:
            raise ValueError('no layers: name some, or average "patches"')
        self.layers, self.of = layers, of
        self.tags = nn.Parameter(torch.empty(max(1, len(layers)), site.inputs[0].width)) if tagged else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Without any effect."""
        from transformers import initialization as init

        if self.tags is not None:
            init.zeros_(self.tags)

    def needs(self) -> Needs:
        """The layers."""
        return Needs(cls=self.layers) if self.of == "cls" else Needs(hidden_states=self.layers)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """A token per layer, without a grid.

        Raises:
            ValueError: the layers are of another width than the tokens.
        """
        spec = inputs[0]
        extra = spec.extras.get("cls" if self.of == "cls" else "hidden_states")
        if extra is not None and extra[-1] != spec.width:
            raise ValueError(f"layers of width {extra[-1]} beside tokens of width {spec.width}")
        return TokenSpec(spec.media, max(1, len(self.layers)), spec.width)

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, N, C] -> [B, layers, C]."""
        tokens = inputs[0]
        if self.of == "cls":
            values = tokens.extras["cls"].float().mean(1)
        elif self.layers:
            values = tokens.extras["hidden_states"].float().mean(1)
        else:
            values = tokens.values.float().mean(1, keepdim=True)
        values = values.to(tokens.values.dtype)
        if self.tags is not None:
            values = values + self.tags.to(values.dtype)
        positions = tokens.positions.mean(1, keepdim=True).expand(-1, values.shape[1], -1)
        sizes = tokens.sizes.new_zeros(values.shape[:2])
        nowhere = None if tokens.sources is None else torch.full_like(tokens.sources, -1)
        return VisualTokens(values, tokens.media, None, positions, sizes, tokens.times, sources=nowhere)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """CLS tokens, patches of layers, the tokens themselves."""
        media, grid = MediaSpec("video", 3), Grid(3, 2, 2)
        yield {"layers": (-2, -1)}, (TokenSpec(media, 12, 6, grid, {"cls": (3, 2, 6)}),)
        layered = TokenSpec(media, 12, 6, grid, {"hidden_states": (12, 2, 6)})
        yield {"layers": (-2, -1), "of": "patches", "tagged": True}, (layered,)
        yield {"layers": (), "of": "patches"}, (TokenSpec(media, 12, 6, grid),)


def halvings(tokens: int, target: int) -> list[int]:
    """How many of so many tokens each step removes until `target` are left: half as often as it goes, then the rest."""
    steps = []
    while tokens - tokens // 2 >= target and tokens > 1:
        steps.append(tokens // 2)
        tokens -= steps[-1]
    return [*steps, tokens - target] if tokens > target else steps


def _into(parts: list[Merging], batch: int) -> Tensor:
    """[B, N], the token of the whole result that each old one went into."""
    found, first = [], 0
    for part in parts:
        count = part.values.shape[1]
        segments = len(part.into) // batch
        starts = first + count * torch.arange(segments, device=part.into.device)
        found.append((part.into.unflatten(0, (batch, segments)) + starts[:, None]).flatten(1, 2))
        first += count * segments
    return torch.cat(found, dim=1)
