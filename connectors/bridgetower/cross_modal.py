"""BridgeTower's cross-modal stack: two streams of layers, and a bridge from each tower before every layer.

Layer l of a stream reads the layer below it and, through a bridge, the hidden state of its own tower at layer
L - K + l. Each layer l reads what enters the other stream's layer l, not what leaves it. Source: Xu et al. 2023,
arXiv 2206.08657, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class AddNorm(nn.Module):
    """The paper's bridge: the norm of a sum."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, own: Tensor, before: Tensor) -> Tensor:
        """The tower's state and the state of the layer below, both [B, N, D] -> [B, N, D]."""
        return self.norm(own + before)


class ScaledAdd(AddNorm):
    """A learned factor on the tower's state."""

    START = 1.0

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.empty(()))

    def forward(self, own: Tensor, before: Tensor) -> Tensor:
        """[B, N, D] twice -> [B, N, D]."""
        return self.norm(own * self.weight + before)


class Interpolate(ScaledAdd):
    """A learned share of the layer below; the rest comes from the tower's state."""

    START = 0.5

    def forward(self, own: Tensor, before: Tensor) -> Tensor:
        """[B, N, D] twice -> [B, N, D]."""
        return self.norm(own * (1 - self.weight) + before * self.weight)


class Gated(AddNorm):
    """A share per token and channel, computed from both states (paper, table 1)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.gate = nn.Linear(2 * width, width)

    def forward(self, own: Tensor, before: Tensor) -> Tensor:
        """[B, N, D] twice -> [B, N, D]."""
        share = self.gate(torch.cat([own, before], dim=-1)).sigmoid()
        return self.norm(own * share + before * (1 - share))


BRIDGES: dict[str, type[AddNorm] | None] = {
    "add_norm": AddNorm,
    "scaled_add": ScaledAdd,
    "interpolate": Interpolate,
    "gated": Gated,
    "none": None,
}
"""By name; "none" is METER: only the towers' last states enter, below the first layer."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a stack.

    Attributes:
        width: of a layer.
        heads: of a layer's attention.
        feed_forward: inner width of a layer's feed-forward block.
        depth: layers of each stream.
        bridge: one of `BRIDGES`.
        eps: of the bridges' norms.
        layer_eps: of the norms within the layers.
        dropout: on attention weights and before each residual sum, in training.
        shared: whether all layers share one projection from a tower, as in the paper.
    """

    width: int = 768
    depth: int = 6
    heads: int = 12
    feed_forward: int = 3072
    bridge: str = "add_norm"
    eps: float = 1e-5
    layer_eps: float = 1e-12
    dropout: float = 0.0
    shared: bool = True

    @property
    def levels(self) -> int:
        """Number of a tower's hidden states that are read."""
        return self.depth if BRIDGES[self.bridge] else 1


class StackAttention(nn.Module):
    """Multi-head attention, its residual connection and the norm after both."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {width}")
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=sizes.layer_eps)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor | None = None, weigh: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, M, D] over a context [B, S, D].

        Args:
            mask: [B, S], which context rows are real.
            weigh: also return the weights [B, heads, M, S], in float32.
        """
        query, key, value = self._split(self.query(hidden)), self.key(context), self.value(context)
        key, value = self._split(key), self._split(value)
        seen = None if mask is None else mask.bool()[:, None, None]
        weights = None
        if weigh:
            scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
            weights = (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(-1)
            mixed = self.dropout(weights).to(value.dtype) @ value
        else:
            dropped = self.dropout.p if self.training else 0.0
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, seen, dropped)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))
        return self.norm(hidden + self.dropout(mixed)), weights

    def _split(self, rows: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, D / heads]."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU, their residual connection and the norm after both."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(sizes.width, sizes.feed_forward), nn.Linear(sizes.feed_forward, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.layer_eps)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.norm(hidden + self.dropout(self.down(nn.functional.gelu(self.up(hidden)))))


class CrossModalLayer(nn.Module):
    """Self-attention, attention to the other stream, feed-forward; a norm follows each, as in BERT."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = StackAttention(sizes), StackAttention(sizes)
        self.feed_forward = FeedForward(sizes)

    def forward(
        self,
        hidden: Tensor,
        other: Tensor,
        own_mask: Tensor | None = None,
        other_mask: Tensor | None = None,
        frames: int = 1,
        weigh: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """This stream [B, M, D] and the other one [B, S, D] -> [B, M, D], and the cross-attention if `weigh`.

        Args:
            own_mask, other_mask: [B, M] and [B, S], which rows are real.
            frames: the rows belong to this many frames, and self-attention stays within each of them.
        """
        batch = hidden.shape[0]
        hidden = hidden.unflatten(1, (frames, -1)).flatten(0, 1)
        hidden, _ = self.self_attention(hidden, hidden, own_mask)
        hidden = hidden.unflatten(0, (batch, frames)).flatten(1, 2)
        hidden, weights = self.cross_attention(hidden, other, other_mask, weigh)
        return self.feed_forward(hidden), weights


class TowerStream(nn.Module):
    """One modality: the entry from its tower (projection, type embedding, bridges) and its layers.

    Args:
        tower_width: of the tower's hidden states.
        layers: number of layers; default: all.
    """

    def __init__(self, tower_width: int, sizes: Sizes, layers: int | None = None) -> None:
        super().__init__()
        bridge = BRIDGES[sizes.bridge]
        projections = 1 if sizes.shared else sizes.levels
        self.transforms = nn.ModuleList(nn.Linear(tower_width, sizes.width) for _ in range(projections))
        self.embedding = nn.Parameter(torch.empty(sizes.width))
        self.first = nn.LayerNorm(sizes.width, eps=sizes.eps)
        count = sizes.depth - 1 if bridge else 0
        self.bridges = nn.ModuleList(bridge(sizes.width, sizes.eps) for _ in range(count))
        count = sizes.depth if layers is None else layers
        self.layers = nn.ModuleList(CrossModalLayer(sizes) for _ in range(count))

    def forward(
        self, index: int, states: Sequence[Tensor], before: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """The input of layer `index`: the tower's state there, [B, N, tower width], merged with the layer below."""
        if index > len(self.bridges):
            return before
        own = self.enter(index, states[index])
        own = own if positions is None else own + positions
        return self.first(own) if index == 0 else self.bridges[index - 1](own, before)

    def enter(self, index: int, state: Tensor) -> Tensor:
        """A state of the tower at the stack's width, with the type embedding."""
        return self.transforms[index % len(self.transforms)](state) + self.embedding


@dataclass
class Fused:
    """What a stack gives: both streams [B, L, D] and [B, N, D], and [B, N], how much the text attends to each token.

    `text` is the last text state computed: where the stack has no last text layer, that layer's input.
    """

    text: Tensor
    image: Tensor
    relevance: Tensor | None = None


class CrossModalStack(nn.Module):
    """Both streams and their layers.

    Args:
        text_width, image_width: of the towers' hidden states.
        last_text: whether the last text layer exists; nothing but its own output depends on it.

    Raises:
        ValueError: the sizes do not fit.
    """

    def __init__(self, text_width: int, image_width: int, sizes: Sizes, last_text: bool = True) -> None:
        super().__init__()
        if sizes.depth < 1:
            raise ValueError(f"depth is at least 1, not {sizes.depth}")
        self.sizes = sizes
        self.text = TowerStream(text_width, sizes, sizes.depth - (not last_text))
        self.image = TowerStream(image_width, sizes)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights, zero biases, identity norms (authors' code); set through the library, as loading needs."""
        from transformers import initialization as init

        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=std)
                init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, TowerStream):
                init.normal_(module.embedding, std=std)
            elif isinstance(module, ScaledAdd):
                init.constant_(module.weight, module.START)

    def forward(
        self,
        text: Sequence[Tensor],
        image: Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        frames: int = 1,
        positions: Tensor | None = None,
        weigh: bool = False,
    ) -> Fused:
        """Both towers' hidden states -> both streams.

        Args:
            text, image: `sizes.levels` states each, [B, L, C] and [B, N, C'], the lowest first.
            mask: [B, L], which text tokens are real; at least one per row.
            frames: the N image tokens belong to this many frames; frames see one another only through the text.
            positions: [B, N, D], position embeddings added to every image state that enters.
            weigh: also return the relevance of each image token to the text, from the last text layer.
        """
        words = below = relevance = None
        for index in range(self.sizes.depth):
            words, below = self.text(index, text, words), self.image(index, image, below, positions)
            above, last = words, index == self.sizes.depth - 1
            if index < len(self.text.layers):
                layer = self.text.layers[index]
                above, weights = layer(words, below, mask, weigh=weigh and last)
                relevance = None if weights is None else masked_mean(weights.mean(1), mask)
            below, _ = self.image.layers[index](below, words, None, mask, frames)
            words = above
        return Fused(words, below, relevance)


def masked_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B, C] over the real ones among the rows [B, L, C], in float32."""
    if mask is None:
        return rows.float().mean(1)
    real = mask.to(torch.float32)[..., None]
    return (rows.float() * real).sum(1) / real.sum(1)
