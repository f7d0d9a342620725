"""The tables behind the coordinate tokens: rows beside the LLM's own in its embedding and in its head.

Source: LLaVA-ST (Li et al. 2025, arXiv 2501.08282), section on coordinates; the gradients of neighbours as in its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import bind
from mmllm.contract.grounding import AXES, Coordinates, Tables

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    from mmllm.contract.batch import CoordinateInputs, VisualInputs
    from mmllm.model.config import MMLLMConfig


class CoordinateTables(nn.Module):
    """One input and one output table per axis; neither is tied to the LLM's.

    A bin learns from its neighbours: to a row's gradient those of the rows around it are added, halved with every step.

    Args:
        layout: the axes.
        width: of the LLM's embeddings.
        std: of the fresh rows, as the LLM's own.
    """

    def __init__(self, layout: Coordinates, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.layout, self.std = layout, std
        self.inputs, self.outputs = (
            nn.ParameterDict({axis: nn.Parameter(torch.empty(layout.bins(axis), width)) for axis in AXES})
            for _ in range(2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh rows."""
        from transformers import initialization as init

        for table in self.parameters():
            init.normal_(table, std=self.std)

    def forward(self) -> Tables:
        """All rows, axis by axis."""
        both = (torch.cat([_Neighbours.apply(of[axis]) for axis in AXES]) for of in (self.inputs, self.outputs))
        return Tables(*both, self.layout)

    def ids(self, device: torch.device) -> Tensor:
        """[rows], the token of each row."""
        return torch.arange(self.layout.first, self.layout.first + len(self.layout), device=device)

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row of each token, -1 for a token that is none of these."""
        return self.layout.rows_of(ids)


class _Neighbours(torch.autograd.Function):
    """The table itself, whose gradient G becomes G + M'G with M_ij = 2^-|i - j|."""

    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor) -> Tensor:
        """[N, D] as it is: exact in every number format."""
        return table.view_as(table)

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> Tensor:
        """Each row's own gradient twice, and shares of the others'."""
        places = torch.arange(len(upstream), device=upstream.device, dtype=torch.float32)
        shares = 0.5 ** (places[:, None] - places).abs()
        return upstream + (shares @ upstream.float()).to(upstream.dtype)


def tables_of(config: MMLLMConfig) -> CoordinateTables | None:
    """The tables of a model's vocabulary, if it has one; fresh rows as large as the LLM's own."""
    section, text = config.model_section.get("vocabulary"), config.text_config
    if not section:
        return None
    layout = Coordinates(**bind(Coordinates, section, "model.vocabulary"))
    return CoordinateTables(layout, text.hidden_size, getattr(text, "initializer_range", 0.02))


def repeated(visual: VisualInputs, times: int) -> VisualInputs:
    """The coordinates of a batch whose rows are repeated, as beams are; nothing where it has none."""
    given = visual.get("coordinates")
    if given is None:
        return {}
    several = {key: value.repeat_interleave(times, dim=0) for key, value in given.items()}
    repeat = torch.arange(times, device=several["places"].device).repeat(len(given["places"]))
    several["places"][:, 0] = several["places"][:, 0] * times + repeat
    return {"coordinates": several}


def placed(embeds: Tensor, ids: Tensor, tables: Tables, given: CoordinateInputs | None) -> Tensor:
    """Embeddings [B, L, D] in which coordinate tokens have their rows.

    Args:
        ids: [B, L].
        given: exact places: `places` [K, 2] (row of the batch, position), `ids` [K, 2] the tokens on both sides of each
            and `ratio` [K], how far it is from the first to the second; elsewhere a token means its bin.
    """
    rows = tables.layout.rows_of(ids)
    where = rows >= 0
    if not bool(where.any()):
        return embeds
    low = rows.clone()
    high, ratio = rows.clone(), torch.zeros(ids.shape, device=ids.device)
    if given is not None and len(given["places"]):
        at = given["places"].unbind(1)
        low[at], high[at] = (given["ids"] - tables.layout.first).unbind(1)
        ratio[at] = given["ratio"]
    share = ratio[where, None].to(tables.inputs.dtype)
    found = (1 - share) * tables.inputs[low[where]] + share * tables.inputs[high[where]]
    return embeds.masked_scatter(where[..., None], found.to(embeds.dtype))
