"""The types passed between the parts, from a file's header to the loss.

Letters in shapes: B clips of a group, N visual tokens, C width, T frames, L sequence positions, D width of the LLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from mmllm.contract.carrying import blended, inverse, picked

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class MediaSpec:
    """Everything that a token count may depend on; known from a header probe and the sampler, before decoding.

    Attributes:
        kind: "image" or "video"; decides where a part treats stills differently (one frame does not make an image).
        frames: number of frames that the reader delivers; for an image, the number of its views.
        tiles: (rows, columns) of an any-resolution image's tiles, or None.
        crop: (height, width) kept of the tiles' joint grid, or None.
    """

    kind: Kind
    frames: int
    tiles: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @property
    def sort_key(self) -> tuple:
        """A sort key giving a total order, the same in every process."""
        return (self.kind, self.frames, self.tiles or (), self.crop or ())


@dataclass(frozen=True)
class Grid:
    """`t` frames of `h` x `w` tokens. `raster=False`: the tokens of a frame are an unordered set of h * w."""

    t: int
    h: int
    w: int
    raster: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens, t * h * w."""
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}" + ("" if self.raster else " (set)")


@dataclass(frozen=True)
class TokenSpec:
    """The shape of a token set, by arithmetic: what `VisualTokens` will be before anything runs."""

    media: MediaSpec
    tokens: int
    width: int
    grid: Grid | None = None
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid.tokens != self.tokens:
            raise ValueError(f"a grid of {self.grid} has {self.grid.tokens} tokens, not {self.tokens}")

    def __str__(self) -> str:
        grid = f"grid {self.grid}" if self.grid else "no grid"
        return f"{self.tokens} tokens of width {self.width} ({grid})"

    def to_grid(self, grid: Grid, width: int | None = None) -> TokenSpec:
        """The same medium on another grid; extras belong to the old token set and are dropped."""
        return TokenSpec(self.media, grid.tokens, self.width if width is None else width, grid)

    def to_width(self, width: int) -> TokenSpec:
        """The same token set at another width: grid and extras stay."""
        return replace(self, width=width)


@dataclass
class VisualTokens:
    """What passes from encoder to LLM: the tokens of B clips of one `MediaSpec`.

    Attributes:
        values: [B, N, C].
        media: what all B clips are.
        grid: (T, h, w), or None where the tokens have no such order.
        positions: [B, N, 3], seconds, y and x in 0..1 of each token's centre.
        sizes: [B, N], how many encoder patches a token stands for; 0 for separators.
        times: [B, T], seconds of the frames.
        extras: tensors that belong to this token set ([B, N, ...] or [B, T, ...]): hidden_states, cls, relevance, ...
        sources: [B, P], for each patch of the encoder the token that it went into, -1 for none; None where nobody
            asked, or a part on the way did not say.
    """

    values: Tensor
    media: MediaSpec
    grid: Grid | None
    positions: Tensor
    sizes: Tensor
    times: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    sources: Tensor | None = None

    @property
    def spec(self) -> TokenSpec:
        """The actual shape of these tokens, to compare with what a part declared."""
        extras = {name: tuple(value.shape[1:]) for name, value in self.extras.items()}
        return TokenSpec(self.media, self.values.shape[1], self.values.shape[2], self.grid, extras)

    def as_grid(self, values: Tensor | None = None) -> Tensor:
        """[B, T, h, w, C] view of `values` (default: the tokens).

        Raises:
            ValueError: the tokens have no raster grid.
        """
        if self.grid is None or not self.grid.raster:
            raise ValueError("these tokens have no raster grid")
        values = self.values if values is None else values
        return values.unflatten(1, (self.grid.t, self.grid.h, self.grid.w))

    def by_frame(self, values: Tensor | None = None) -> Tensor:
        """[B, T, h * w, C] view of `values` (default: the tokens).

        Raises:
            ValueError: the tokens have no grid.
        """
        if self.grid is None:
            raise ValueError("these tokens have no grid")
        values = self.values if values is None else values
        return values.unflatten(1, (self.grid.t, self.grid.h * self.grid.w))

    def with_values(self, values: Tensor) -> VisualTokens:
        """The same token set with other values [B, N, C']; everything else that belongs to the tokens is kept."""
        if values.shape[:2] != self.values.shape[:2]:
            raise ValueError(f"not the same token set: {tuple(values.shape[:2])} and {tuple(self.values.shape[:2])}")
        return replace(self, values=values)

    def derive(
        self, values: Tensor, grid: Grid | None, *, weights: Tensor | None = None, index: Tensor | None = None
    ) -> VisualTokens:
        """A new token set made from this one; extras are dropped, positions and sizes move.

        Args:
            values: [B, M, C'].
            grid: the new grid or None.
            weights: [M, N] or [B, M, N], rows summing to 1: each new token is this mean of old ones. Its size is the
                sum of the sizes that it covers, shared in proportion where several new tokens cover one.
            index: [M] or [B, M], the old token that each new one comes from; -1 = a separator (size 0).

        Raises:
            ValueError: not exactly one of `weights` and `index`.
        """
        if (weights is None) == (index is None):
            raise ValueError("give either weights or index")
        if weights is not None:
            positions, sizes = blended(self.positions, self.sizes, weights)
            into = weights.argmax(-2)
        else:
            positions, sizes = picked(self.positions, self.sizes, index)
            into = inverse(index, self.values.shape[1])
        return VisualTokens(values, self.media, grid, positions, sizes, self.times, sources=self.followed(into))

    def followed(self, into: Tensor) -> Tensor | None:
        """The sources of a new token set.

        Args:
            into: [N] or [B, N], the new token that each old one went into; -1 for none.
        """
        if self.sources is None:
            return None
        into = into.expand(self.sources.shape[0], -1)
        return into.gather(1, self.sources.clamp_min(0)).masked_fill(self.sources < 0, -1)

    def row(self, number: int) -> VisualTokens:
        """One clip of this group, as a view."""
        return self.select(slice(number, number + 1))

    def select(self, index: Tensor | slice) -> VisualTokens:
        """The clips `index` [P] of this group, repeats allowed (one row per pair of clip and prompt)."""
        extras = {name: value[index] for name, value in self.extras.items()}
        fields = {name: getattr(self, name)[index] for name in ("values", "positions", "sizes", "times")}
        return replace(self, extras=extras, sources=None if self.sources is None else self.sources[index], **fields)


@dataclass
class PromptFeatures:
    """A text source's features of the prompts; row b belongs to clip b.

    Attributes:
        ids: [B, L] token ids of the human turns.
        mask: [B, L], which of them are real.
        tokens: [B, L, C] or None.
        pooled: [B, J] in the joint space, or None.
        hidden_states: [B, L, K, C] or None.
        present: [B] bool; a row without a prompt is absent and has one token unmasked.
        alignment_level: [B] alignment level that the record carries, -1 where it carries none.
    """

    ids: Tensor
    mask: Tensor
    tokens: Tensor | None = None
    pooled: Tensor | None = None
    hidden_states: Tensor | None = None
    present: Tensor | None = None
    alignment_level: Tensor | None = None

    def select(self, index: list[int]) -> PromptFeatures:
        """The prompts `index` [P], repeats allowed."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return PromptFeatures(**{name: None if value is None else value[index] for name, value in values.items()})


@dataclass(frozen=True)
class Needs:
    """What a part reads besides the values of its inputs; the front end delivers exactly this.

    Attributes:
        hidden_states: requested layers of the encoder; like cls and keys, only for a part whose input is an encoder.
        cls: layers whose CLS token is requested.
        keys: layers whose attention keys are requested.
        cls_attention: whether the CLS token's attention to each patch is wanted, in the block that gives the tokens; an
            encoder without one leaves it out.
        extras: names of extras of the first input.
        tables: whether it reads the tables of the vocabulary of coordinates, as the keyword `tables`.
        prompt: fields of PromptFeatures.
        prompt_hidden_states: text layers.
        alignment_levels: number of alignment levels it knows, if it reads `PromptFeatures.alignment_level`; a record
            with another level is refused when it is read.
    """

    hidden_states: tuple[int, ...] = ()
    cls: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    cls_attention: bool = False
    extras: tuple[str, ...] = ()
    tables: bool = False
    prompt: tuple[str, ...] = ()
    prompt_hidden_states: tuple[int, ...] = ()
    alignment_levels: int | None = None


@dataclass(frozen=True)
class VisualSpan:
    """A medium's tokens among the LLM's inputs.

    Attributes:
        row: of the batch.
        start: its first position.
        tokens: [1, N, D].
    """

    row: int
    start: int
    tokens: VisualTokens


@dataclass
class LLMInputs:
    """What enters the LLM.

    Attributes:
        embeds: [B, L, D].
        mask: [B, L] of 1 (real) and 0 (padding), or None.
        positions: [B, L] or None.
        visual: [B, L] bool, which positions hold visual tokens.
        segments: [B, L] or None; 0 = prefix, 1, 2, ... = branches that see the prefix and themselves, -1 = padding.
        spans: where the media are and what their tokens stand for; for reducers.
    """

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor | None
    visual: Tensor
    segments: Tensor | None = None
    spans: tuple[VisualSpan, ...] = ()

    def part(self, rows: slice, length: int) -> LLMInputs:
        """The first `length` positions of some rows, none of whose spans reaches further."""
        tensors = (self.embeds, self.mask, self.positions, self.visual, self.segments)
        start, stop, _ = rows.indices(len(self.embeds))
        spans = tuple(replace(span, row=span.row - start) for span in self.spans if start <= span.row < stop)
        return LLMInputs(*(None if tensor is None else tensor[rows, :length] for tensor in tensors), spans)


@dataclass
class Term:
    """A named part of the loss: `weight * sum / count`, where count is summed over micro-batches and processes."""

    sum: Tensor
    count: Tensor | int
    weight: float = 1.0


@dataclass(frozen=True)
class Geometry:
    """How a frame's pixels are brought to an encoder's input size, on uint8, before batching.

    Attributes:
        height: pixels.
        width: pixels.
        fit: "squash" (to the size, whatever the aspect ratio), "crop" (short side to `short`, then the centre) or
            "pad" (long side to the size, the rest filled with `fill`).
        interpolation: "bicubic", "bilinear" or "nearest"; antialiased.
        short: length of the short side before the crop; None = the size itself.
        fill: grey level 0..255 of the padding.
        resampler: "torch" (torchvision on uint8 tensors) or "pillow"; a few values differ by a grey level.
        centre: how half of an odd crop margin is rounded: "down", or to the "even" neighbour as in torchvision.
    """

    height: int
    width: int
    fit: Literal["squash", "crop", "pad"] = "squash"
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    short: int | None = None
    fill: int = 0
    resampler: Literal["torch", "pillow"] = "torch"
    centre: Literal["down", "even"] = "down"
