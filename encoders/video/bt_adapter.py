"""BT-Adapter: a temporal side stream beside a frozen image tower (Liu et al. 2023, arXiv 2309.15785).

The tower's own stream never reads the side stream, so the adapter is a function of the tower's hidden states alone: it
works beside CLIP's tower (PPLLaVA) and EVA's (ST-LLM) alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.transform import CropArguments
from mmllm.encoders.image.huggingface import SMALL, ClipEncoder


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
        drop: stochastic depth rate of every time layer; in the space layers it grows from 0 to this at the last of
            `depth` layers (default: of those that are built).
        blend_cls: blend the CLS rows with the side stream too, as EVA's version does; otherwise they stay the tower's.
        spread: initial standard deviation of the time embedding; 1 in the authors' library.
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
    ) -> None:
        super().__init__(Site())
        self.blend_cls, self.spread = blend_cls, spread
        self.cls = nn.Parameter(torch.empty(block.width))
        self.times = nn.Embedding(frames, block.width)
        rates = [drop * layer / max(1, (depth or layers) - 1) for layer in range(layers)]
        self.space = nn.ModuleList(SpaceLayer(block, rate) for rate in rates)
        self.time = nn.ModuleList(TimeLayer(block, drop) for _ in rates)
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
            positions: [1 + N, C], the tower's own table.
        """
        streams: list[SideStream] = []
        for state, time, space in zip(states, self.time, self.space, strict=False):
            cls, patches = state[:, :, 0].mean(1), state[:, :, 1:]
            if streams:
                stream = SideStream(streams[-1].cls + cls, streams[-1].patches + patches)
            else:
                moments = self.times(torch.arange(state.shape[1], device=state.device))
                start = (cls + self.cls + positions[0]) / 2
                stream = SideStream(start, patches + positions[1:] + moments[:, None])
            streams.append(space(time(stream)))
        return streams

    def blend(self, state: Tensor, stream: SideStream) -> Tensor:
        """A state of the tower [B, T, 1 + N, C] with the stream of the same block: (tower + stream) / 2."""
        cls = state[:, :, :1]
        if self.blend_cls:
            cls = (cls + stream.cls[:, None, None]) / 2
        return torch.cat([cls, (state[:, :, 1:] + stream.patches) / 2], dim=2)

    def copy_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Initialise the space layers from blocks of a CLIP tower of transformers, in order."""
        for layer, block in zip(self.space, blocks, strict=False):
            names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
            for ours, theirs in names.items():
                getattr(layer.attention, ours).load_state_dict(getattr(block.self_attn, theirs).state_dict())
            pairs = (
                (layer.norm, block.layer_norm1),
                (layer.mlp_norm, block.layer_norm2),
                (layer.wide, block.mlp.fc1),
                (layer.narrow, block.mlp.fc2),
            )
            for ours, theirs in pairs:
                ours.load_state_dict(theirs.state_dict())


@register("encoder", "clip_bt_adapter")
class ClipBTAdapterEncoder(ClipEncoder):
    """CLIP's image tower with a BT-Adapter; see `clip` for the tower's arguments.

    Frames of a clip attend to each other; the views of an image do not. Layers within the adapter's depth are blended
    with the side stream; CLS tokens are the tower's own.

    Args:
        depth: number of the tower's last blocks that the side stream runs beside.
        max_frames: most frames per clip.
        drop: stochastic depth rate in training.
        reference: start as the authors do: also build a layer whose output is never used; time embeddings are N(0, 1).
    """

    per_frame = False

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        layer: int = -2,
        frames: int | None = None,
        size: int | None = None,
        depth: int = 4,
        max_frames: int = 64,
        drop: float = 0.1,
        reference: bool = False,
        **pixels: Unpack[CropArguments],
    ) -> None:
        super().__init__(site, name=name, config=config, layer=layer, frames=frames, size=size, **pixels)
        blocks, last = self.config.num_hidden_layers, self._index(layer)
        if not blocks - depth < last <= blocks or depth > blocks:
            raise ValueError(f"depth {depth}: layer {layer} of {blocks} blocks lies before the adapter")
        self.depth, self.max_frames = depth, max_frames
        self.reads = tuple(range(blocks - depth + 1, last + 1))
        heads, activation = self.config.num_attention_heads, self.config.hidden_act
        eps = (self.config.layer_norm_eps, self.config.layer_norm_eps)
        block = Block(self.config.hidden_size, self.config.intermediate_size, heads, activation, eps=eps)
        layers, spread = (depth, 1.0) if reference else (len(self.reads), 0.0)
        self.adapter = BTAdapter(block, layers, max_frames, drop=drop, depth=depth, spread=spread)

    def load_weights(self) -> None:
        """Load the tower's weights, and copy its last blocks into the adapter's space layers."""
        super().load_weights()
        self.adapter.copy_blocks(self.tower.encoder.layers[-self.depth :])

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """As without the adapter.

        Raises:
            ValueError: the clip has more frames than the adapter has time embeddings.
        """
        if media.kind == "video" and self.frames_of(media) > self.max_frames:
            raise ValueError(f"reads {self.max_frames} frames of a clip at most, this one has {self.frames_of(media)}")
        return super().output_spec(media)

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """[B, F, 3, h, w] uint8 -> tokens [B, N, C], frame by frame in row-major order, and the extras needed."""
        wanted = list(dict.fromkeys([*self.reads, *map(self._index, needs.hidden_states)]))
        cls = list(dict.fromkeys([*self.reads, *map(self._index, needs.cls)]))
        tokens = super().forward(pixels, media, replace(needs, hidden_states=tuple(wanted), cls=tuple(cls)))
        layers = dict(zip(wanted, tokens.extras["hidden_states"].unbind(2), strict=True))
        firsts = dict(zip(cls, tokens.extras["cls"].unbind(2), strict=True))
        frames = [torch.cat([firsts[at][:, :, None], tokens.by_frame(layers[at])], dim=2) for at in self.reads]
        if media.kind == "image":
            frames = [state.flatten(0, 1)[:, None] for state in frames]
        streams = self.adapter(frames, self._positions(frames[0]))
        for at, state, stream in zip(self.reads, frames, streams, strict=True):
            layers[at] = self.adapter.blend(state, stream)[:, :, 1:].reshape(tokens.values.shape)
        extras = {"keys": tokens.extras["keys"]} if needs.keys else {}
        if needs.hidden_states:
            extras["hidden_states"] = torch.stack([layers[self._index(layer)] for layer in needs.hidden_states], dim=2)
        if needs.cls:
            extras["cls"] = torch.stack([firsts[self._index(layer)] for layer in needs.cls], dim=2)
        return replace(tokens, values=layers[self.reads[-1]], extras=extras)

    def _positions(self, state: Tensor) -> Tensor:
        """[1 + N, C]: the tower's positions at this size."""
        own, side = self.tower.embeddings, self.geometry.height
        if side == self.config.image_size:
            return own.position_embedding(own.position_ids)[0]
        return own.interpolate_pos_encoding(state[:1, 0], side, side)[0]

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip, a deeper adapter up to the last layer, views of an image."""
        config = {**SMALL, "image_size": 28, "patch_size": 14}
        yield {"config": config, "depth": 2}, (MediaSpec("video", 3),)
        yield {"config": config, "depth": 3, "layer": -1}, (MediaSpec("video", 2),)
        yield {"config": config, "depth": 2, "size": 42}, (MediaSpec("image", 2),)
