"""A text tower's position table, stretched so that it reads longer prompts than it was trained on.

Sources: Long-CLIP (Zhang et al. 2024) and PPLLaVA (Liu et al. 2024, arXiv 2411.02327), "CLIP context extension".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KEEP, FACTOR = 20, 4
"""Rows kept as they are (most texts end there, so these are well trained), and the factor that stretches the rest."""


def extended_length(rows: int, keep: int = KEEP, factor: int = FACTOR) -> int:
    """Number of rows of a table of `rows` once it is stretched.

    Raises:
        ValueError: nothing is left to stretch.
    """
    if rows < keep + 2:
        raise ValueError(f"a table of {rows} positions, of which {keep} are kept: nothing to stretch")
    return keep + factor * (rows - keep)


def extend_positions(table: Tensor, keep: int = KEEP, factor: int = FACTOR) -> Tensor:
    """[n, d] -> [keep + factor * (n - keep), d]: the first rows kept, the others interpolated.

    Old row `keep + m` becomes row `keep + factor * m`; the rows after the last of these are extrapolated.
    """
    extended_length(len(table), keep, factor)
    here = table[keep:]
    following = torch.cat([here[1:], 2 * here[-1:] - here[-2:-1]])
    step = torch.arange(factor, device=table.device, dtype=table.dtype)[:, None] / factor
    return torch.cat([table[:keep], torch.lerp(here[:, None], following[:, None], step).flatten(0, 1)])


class ExtendedPositions(nn.Embedding):
    """A stretched table whose first rows never learn; it replaces the `position_embedding` of a text tower.

    One table instead of the authors' two full-length ones: half of the rows of each of theirs are never read.

    Args:
        rows: number of rows of the stretched table.
        width: of an embedding.
        keep: number of frozen rows.
    """

    def __init__(self, rows: int, width: int, keep: int = KEEP) -> None:
        super().__init__(rows, width)
        self.keep = keep

    def forward(self, ids: Tensor) -> Tensor:
        """Positions [..., L] -> [..., L, d]; no gradient reaches the kept rows."""
        return super().forward(ids).where(ids[..., None] >= self.keep, self.weight.detach()[ids])


def extend_tower(tower: nn.Module, keep: int = KEEP, factor: int = FACTOR) -> nn.Module:
    """Stretch the positions of a CLIP or SigLIP text tower of transformers; call it where the tower is built.

    The tower's config keeps the old length. Load the weights of an original tower before stretching, and those of a
    stretched one, whose parameters have the same names, after.

    Returns:
        the tower.
    """
    embeddings = next(module for module in tower.modules() if hasattr(module, "position_embedding"))
    old = embeddings.position_embedding
    rows = extended_length(old.num_embeddings, keep, factor)
    with torch.device(old.weight.device):
        new = ExtendedPositions(rows, old.embedding_dim, keep).to(old.weight.dtype)
        numbers = torch.arange(rows)[None]
    with torch.no_grad():
        new.weight.copy_(extend_positions(old.weight, keep, factor))
    new.weight.requires_grad_(old.weight.requires_grad)
    embeddings.position_embedding = new
    embeddings.register_buffer("position_ids", numbers, persistent=False)
    return tower
