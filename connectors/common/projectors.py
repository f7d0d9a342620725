"""Projectors: token by token from the width of an encoder to another width, usually the LLM's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens


class Projector(Part):
    """Changes the width and nothing else: the token set, its grid and its extras stay."""

    out_width: int

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One input; the same tokens at the new width."""
        return inputs[0].to_width(self.out_width)

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        raise NotImplementedError

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """The same token set, projected."""
        return inputs[0].with_values(self.project(inputs[0].values))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """A clip on a grid, to the LLM's width and to a number."""
        spec = TokenSpec(MediaSpec("video", 2), 8, 12, Grid(2, 2, 2))
        yield {}, (spec,)
        yield {"width": 20}, (spec,)


@register("connector", "linear")
class Linear(Projector):
    """One linear layer, optionally with an activation after it.

    Args:
        width: output width, a number or "llm".
        bias: whether the layer has one.
        activation: "gelu" or None.
    """

    def __init__(
        self,
        site: Site,
        *,
        width: int | str = "llm",
        bias: bool = True,
        activation: Literal["gelu"] | None = None,
    ) -> None:
        super().__init__(site)
        self.out_width = site.width(width)
        self.linear = nn.Linear(site.inputs[0].width, self.out_width, bias=bias)
        self.activation = nn.GELU() if activation else nn.Identity()

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        return self.activation(self.linear(values))


@register("connector", "mlp")
class MLP(Projector):
    """LLaVA-1.5's projector: linear, GELU, linear (Liu et al. 2023, section 3).

    Args:
        width: output width, a number or "llm".
        depth: number of linear layers.
    """

    def __init__(self, site: Site, *, width: int | str = "llm", depth: int = 2) -> None:
        super().__init__(site)
        if depth < 1:
            raise ValueError(f"depth is at least 1, not {depth}")
        self.out_width = site.width(width)
        layers: list[nn.Module] = [nn.Linear(site.inputs[0].width, self.out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(self.out_width, self.out_width)]
        self.layers = nn.Sequential(*layers)

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        return self.layers(values)
