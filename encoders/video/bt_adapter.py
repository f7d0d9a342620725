"""BT-Adapter: a temporal side stream beside a frozen image tower (Liu et al. 2023, arXiv 2309.15785).

The tower's own stream never reads the side stream, so the adapter is a function of the tower's hidden states alone: it
works beside CLIP's tower (PPLLaVA), EVA's (ST-LLM) and SigLIP's, which has no CLS token. The encoders are in
`bt_adapter_towers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site


class SideStream(NamedTuple):
    """The side stream: one CLS token per clip [B, C], patches of every frame [B, T, N, C]."""

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Block:
    """What the adapter's layers are modelled on: the tower's own blocks.

    Attributes:
        width: of the tokens.
        hidden: width of the MLP.
        heads: of the attention.
        activation: transformers' name of it.
        key_bias: whether keys have a bias; EVA's have none.
        eps: of the norms before space attention, MLP and time attention.
    """

    width: int
    hidden: int
    heads: int
    activation: str = "quick_gelu"
    key_bias: bool = True
    eps: tuple[float, float] = (1e-5, 1e-5)


class FrameAttention(nn.Module):
    """Plain attention over the second to last axis."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads = block.heads
        self.query, self.value = nn.Linear(block.width, block.width), nn.Linear(block.width, block.width)
        self.key = nn.Linear(block.width, block.width, bias=block.key_bias)
        self.out = nn.Linear(block.width, block.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., L, C] -> [..., L, C]."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class DropPath(nn.Module):
    """Stochastic depth: drops a branch for whole clips, in training only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, *branches: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, ...] of one branch, each clip kept or dropped in all of them."""
        if not self.training or not self.rate:
            return branches
        keep = torch.rand(branches[0].shape[0], device=branches[0].device) >= self.rate
        kept = [keep.view(-1, *[1] * (branch.ndim - 1)) / (1 - self.rate) for branch in branches]
        return tuple(branch * factor.to(branch.dtype) for branch, factor in zip(branches, kept, strict=True))


class SpaceLayer(nn.Module):
    """A block of the tower over each frame's patches and the clip's one CLS token, which takes the mean over frames."""

    def __init__(self, block: Block, drop: float) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.norm = nn.LayerNorm(block.width, eps=block.eps[0])
        self.attention = FrameAttention(block)
        self.mlp_norm = nn.LayerNorm(block.width, eps=block.eps[0])
        self.wide, self.narrow = nn.Linear(block.width, block.hidden), nn.Linear(block.hidden, block.width)
        self.activation = ACT2FN[block.activation]
        self.drop = DropPath(drop)

    def forward(self, stream: SideStream) -> SideStream:
        """The stream one block further on."""
        cls, patches = stream
        frames = cls[:, None, None].expand(-1, patches.shape[1], -1, -1)
        mixed = self.attention(self.norm(torch.cat([frames, patches], dim=2)))
        seen, moved = self.drop(mixed[:, :, 0].mean(1), mixed[:, :, 1:])
        cls, patches = cls + seen, patches + moved
        seen, moved = self.drop(self._mlp(cls), self._mlp(patches))
        return SideStream(cls + seen, patches + moved)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.narrow(self.activation(self.wide(self.mlp_norm(x))))


class TimeLayer(nn.Module):
    """Attention of every patch over the frames, followed by a linear layer that starts at zero."""

    def __init__(self, block: Block, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(block.width, eps=block.eps[1])
        self.attention = FrameAttention(block)
        self.out = nn.Linear(block.width, block.width)
        self.drop = DropPath(drop)

    def forward(self, stream: SideStream) -> SideStream:
        """The patches one layer further on; the CLS token belongs to the whole clip and stays."""
        (moved,) = self.drop(self.attention(self.norm(stream.patches.transpose(1, 2))))
        return SideStream(stream.cls, stream.patches + self.out(moved).transpose(1, 2))


class BTAdapter(Part):
    """The side stream over the tower's last blocks; it is a part within an encoder, so it initialises itself.

    Args:
        block: what its layers are modelled on.
        layers: their number: d - 1 for an adapter of depth d over a tower whose last but one state is
            read (one more would reach nothing).
        frames: most frames per clip.
        drop: stochastic depth rate of every time layer; in the space layers it grows from 0 to this at the last.
        depth: of so many layers. Without it, as in ST-LLM, of those that are built, and in the time layers too.
        blend_cls: blend the CLS rows with the side stream too, as EVA's version does; otherwise they stay the tower's.
        spread: initial standard deviation of the time embedding; 1 in the authors' library.
        tower_cls: whether the tower has a CLS token; without one the side stream's is its own.
    """

    def __init__(
        self,
        block: Block,
        layers: int,
        frames: int,
        *,
        drop: float = 0.1,
        depth: int | None = None,
        blend_cls: bool = False,
        spread: float = 0.0,
        tower_cls: bool = True,
    ) -> None:
        super().__init__(Site())
        self.blend_cls, self.spread, self.tower_cls = blend_cls, spread, tower_cls
        self.cls = nn.Parameter(torch.empty(block.width))
        self.times = nn.Embedding(frames, block.width)
        rates = [drop * layer / max(1, (depth or layers) - 1) for layer in range(layers)]
        self.space = nn.ModuleList(SpaceLayer(block, rate) for rate in rates)
        self.time = nn.ModuleList(TimeLayer(block, drop if depth else rate) for rate in rates)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without any effect over time."""
        from transformers import initialization as init

        init.normal_(self.cls, std=self.cls.shape[0] ** -0.5)
        init.normal_(self.times.weight, std=self.spread)
        for layer in self.time:
            init.zeros_(layer.out.weight)
            init.zeros_(layer.out.bias)

    def forward(self, states: Sequence[Tensor], positions: Tensor) -> list[SideStream]:
        """The stream after each of the tower's last blocks.

        Args:
            states: outputs of these blocks, [B, T, 1 + N, C] each, CLS first; as many as there are layers, or fewer.
                [B, T, N, C] beside a tower without CLS.
            positions: [1 + N, C] or [N, C], the tower's own table.
        """
        streams: list[SideStream] = []
        for state, time, space in zip(states, self.time, self.space, strict=False):
            cls, patches = self._parted(state)
            if streams:
                before = streams[-1]
                stream = SideStream(before.cls if cls is None else before.cls + cls.mean(1), before.patches + patches)
            else:
                moments = self.times(torch.arange(state.shape[1], device=state.device))
                own = self.cls.expand(len(state), -1)
                start = own if cls is None else (cls.mean(1) + self.cls + positions[0]) / 2
                stream = SideStream(start, patches + positions[-patches.shape[2] :] + moments[:, None])
            streams.append(space(time(stream)))
        return streams

    def _parted(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """The CLS token of each frame [B, T, C], or None, and the patches [B, T, N, C]."""
        return (state[:, :, 0], state[:, :, 1:]) if self.tower_cls else (None, state)

    def blend(self, state: Tensor, stream: SideStream) -> Tensor:
        """A state of the tower with the stream of the same block: (tower + stream) / 2."""
        cls, patches = self._parted(state)
        patches = (patches + stream.patches) / 2
        if cls is None:
            return patches
        if self.blend_cls:
            cls = (cls + stream.cls[:, None]) / 2
        return torch.cat([cls[:, :, None], patches], dim=2)

    def copy_blocks(self, blocks: Sequence[dict[str, Tensor]]) -> None:
        """Initialise the space layers from blocks of a tower, in order, given under a space layer's own names."""
        for layer, states in zip(self.space, blocks, strict=False):
            layer.load_state_dict(states)
