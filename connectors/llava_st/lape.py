"""Language-aligned positions: visual tokens carry the coordinates' own embeddings (LLaVA-ST, Li et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mmllm.contract.grounding import Tables
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, TokenSpec, VisualTokens


@register("connector", "lape")
class LanguageAlignedPositions(Part):
    """Adds to each token what the vocabulary says of its row, its column and its frame: the mean of how a bin is read
    and how it is written. It stands behind the projector and has no weights of its own: gradients reach the tables.

    An image is at the first moment.

    Args:
        reference: take row t for frame t, as the authors do, instead of resampling time like space; a clip then has to
            have as many frames as there are bins.
    """

    def __init__(self, site: Site, *, reference: bool = False) -> None:
        super().__init__(site)
        self.reference = reference
        if site.llm_width and site.inputs[0].width != site.llm_width:
            raise ValueError(f"adds rows of the LLM's width {site.llm_width}, its input has {site.inputs[0].width}")

    def needs(self) -> Needs:
        """The tables."""
        return Needs(tables=True)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """As it came.

        Raises:
            ValueError: no raster, so tokens have no row and column; or an image in tiles.
        """
        spec = inputs[0]
        if spec.grid is None or not spec.grid.raster:
            raise ValueError(f"needs a raster of rows and columns, got {spec}")
        if spec.media.tiles is not None:
            raise ValueError("an image in tiles: each would be taken for the whole")
        return spec

    def multiply_adds(self, *inputs: TokenSpec) -> int:
        """None worth counting."""
        return 0

    def forward(self, *inputs: VisualTokens, tables: Tables) -> VisualTokens:
        """[B, t h w, D] -> the same.

        Raises:
            ValueError: in `reference`, another number of frames than bins.
        """
        tokens = inputs[0]
        grid = tokens.grid
        time = self._moments(tables.aligned("time"), tokens)
        rows = resampled(tables.aligned("height"), grid.h)
        columns = resampled(tables.aligned("width"), grid.w)
        where = time[:, None, None] + rows[None, :, None] + columns[None, None, :]
        values = tokens.values + where.flatten(0, 2).to(tokens.values.dtype)
        return tokens.with_values(values)

    def _moments(self, table: Tensor, tokens: VisualTokens) -> Tensor:
        """[t, D]."""
        frames = tokens.grid.t
        if tokens.media.kind == "image":
            return table[:1].expand(frames, -1)
        if not self.reference:
            return resampled(table, frames)
        if frames != len(table):
            raise ValueError(f"reads {len(table)} frames in `reference`, this clip has {frames}")
        return table

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip, one of as many frames as there are bins, an image."""
        yield {}, (TokenSpec(MediaSpec("video", 4), 24, 16, Grid(4, 2, 3)),)
        yield {"reference": True}, (TokenSpec(MediaSpec("video", 7), 28, 16, Grid(7, 2, 2)),)
        yield {}, (TokenSpec(MediaSpec("image", 1), 9, 16, Grid(1, 3, 3)),)


def resampled(table: Tensor, size: int) -> Tensor:
    """[N, D] -> [size, D], linearly between the centres of bins; the table itself where the sizes agree."""
    if size == len(table):
        return table
    return nn.functional.interpolate(table.float().T[None], size=size, mode="linear")[0].T.to(table.dtype)
