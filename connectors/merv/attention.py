"""The weights of MERV's cross-attentive fusion, in an exact cheap form and in the authors' form.

With the learned query q = W_q Q + b_q and keys W_k m_e + b_k of the streams' mean tokens m_e, the logits are
<q, W_k m_e + b_k> / sqrt(a). b_k moves all of them alike, so softmax over e is that of <u, m_e> with one vector
u = W_k' q / sqrt(a). Nothing else of the authors' module reaches the output: its values are the raw streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


class CollapsedAttention(nn.Module):
    """Softmax over streams of <u, mean token>; the streams are not copied.

    Args:
        width: of the streams.
        streams: their number.
        attn_dim: of the authors' module, or None (see the part).
        positions: one learned logit per stream.
        tokens: per stream, where all of them form the key; None = their mean.

    Attributes:
        query: [d], or [T, d] for flat keys: u, or Q where `attn_dim` is None.
        scale: factor on the products.
    """

    def __init__(self, width: int, streams: int, attn_dim: int | None, positions: bool, tokens: int | None) -> None:
        super().__init__()
        self.attn_dim = attn_dim
        self.query = nn.Parameter(torch.empty(width) if tokens is None else torch.empty(tokens, width))
        self.bias = nn.Parameter(torch.empty(streams)) if positions else None
        self.scale = 1.0 if attn_dim else self.query.numel() ** -0.5

    def reset_parameters(self) -> None:
        """u with the variance that it has when the authors' module is initialised; Q Xavier-uniform, as [1, d]."""
        from transformers import initialization as init

        keys = self.query.numel()
        if self.attn_dim is None:
            bound = math.sqrt(6 / (1 + keys))
            init.uniform_(self.query, -bound, bound)
        else:
            init.normal_(self.query, std=math.sqrt(start_variance(self.attn_dim, keys)))
        if self.bias is not None:
            init.zeros_(self.bias)

    def load_authors(self, weights: Mapping[str, Tensor]) -> None:
        """Load the authors' weights, collapsed."""
        vector, bias = collapse(weights)
        states = {"query": vector.view_as(self.query) / self.scale}
        self.load_state_dict(states if bias is None else {**states, "bias": bias})

    def forward(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their sum [B, T, d] and the weights [B, E]."""
        streams = [stream.to(streams[0].dtype) for stream in streams]
        query, own = self.query.float() * self.scale, self.query.new_zeros(len(streams), dtype=torch.float32)
        own = own if self.bias is None else self.bias.float()
        if query.dim() == 1:
            return Mixture.apply(query, own, *streams)
        logits = torch.stack([(stream.float() * query).sum((1, 2)) for stream in streams], dim=1)
        weights = (logits + own).softmax(1)
        return blend(streams, weights), weights

    def multiply_adds(self, streams: int) -> int:
        """Those of the products of query and keys."""
        return streams * self.query.numel()


class Mixture(torch.autograd.Function):
    """`blend` by softmax_e(<u, mean token of e> + own_e), and both gradients of a stream written at once.

    A stream reaches the output twice, as a summand and through its mean. Computing two gradients of its size and adding
    them, as autograd does, would cost more time than all the rest.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, own: Tensor, *streams: Tensor) -> tuple[Tensor, Tensor]:
        """u [d] and own logits [E] in float32, streams [B, T, d] -> their sum [B, T, d], weights [B, E]."""
        means = torch.stack([stream.mean(1, dtype=torch.float32) for stream in streams], dim=1)
        weights = ((means * query).sum(-1) + own).softmax(1)
        ctx.save_for_backward(query, means, weights, *streams)
        return blend(list(streams), weights), weights

    @staticmethod
    def backward(ctx: FunctionCtx, of_sum: Tensor, of_weights: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the same."""
        query, means, weights, *streams = ctx.saved_tensors
        # Token by token first: a single sum over T d products would lose digits, and the softmax magnifies the error.
        products = [torch.linalg.vecdot(of_sum, stream).float().sum(1) for stream in streams]
        of_weights = of_weights + torch.stack(products, dim=1)
        of_logits = weights * (of_weights - (weights * of_weights).sum(1, keepdim=True))
        through_mean = (of_logits / of_sum.shape[1])[:, :, None, None] * query
        shares = weights.to(of_sum.dtype)[:, :, None, None]
        gradients = [
            torch.addcmul(through_mean[:, index].to(of_sum.dtype), of_sum, shares[:, index]) if wanted else None
            for index, wanted in enumerate(ctx.needs_input_grad[2:])
        ]
        return (of_logits[..., None] * means).sum((0, 1)), of_logits.sum(0), *gradients


class AuthorsAttention(nn.Module):
    """The authors' module, with their names: `Q`, `attention` (whose values and output are thrown away), `pe`.

    Args: as for `CollapsedAttention`.
    """

    def __init__(self, width: int, streams: int, attn_dim: int, positions: bool, tokens: int | None) -> None:
        super().__init__()
        self.flat, keys = tokens is not None, width * (tokens or 1)
        self.Q = nn.Parameter(torch.empty(1, attn_dim))
        self.attention = nn.MultiheadAttention(attn_dim, 1, kdim=keys, vdim=keys, batch_first=True)
        self.pe = nn.Parameter(torch.empty(streams, keys)) if positions else None

    def reset_parameters(self) -> None:
        """Matrices Xavier-uniform, biases zero; the output matrix as torch initialises a linear layer."""
        from transformers import initialization as init

        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                init.zeros_(parameter)
            elif name == "attention.out_proj.weight":
                init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                init.xavier_uniform_(parameter)

    def load_authors(self, weights: Mapping[str, Tensor]) -> None:
        """Load the authors' weights as they are."""
        self.load_state_dict(dict(weights))

    def forward(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [B, T, d] -> their sum [B, T, d] and the weights [B, E]."""
        stacked = torch.stack(streams, dim=1)
        keys = stacked.flatten(2) if self.flat else stacked.mean(2)
        keys = keys if self.pe is None else keys + self.pe
        _, weights = self.attention(self.Q.expand(keys.shape[0], 1, -1), keys, keys)
        return (weights @ stacked.flatten(2)).view_as(streams[0]), weights[:, 0].float()

    def multiply_adds(self, streams: int) -> int:
        """Those of the projections (query, keys and values, output) and of both products."""
        width, keys = self.attention.embed_dim, self.attention.kdim
        return 2 * width * width + 2 * streams * keys * width + 2 * streams * width


def blend(streams: list[Tensor], weights: Tensor) -> Tensor:
    """sum_e w_e X_e of streams [B, T, d] and weights [B, E], one stream after the other: they are never stacked."""
    shares = weights.to(streams[0].dtype)[:, :, None, None].unbind(1)
    total = streams[0] * shares[0]
    for stream, share in zip(streams[1:], shares[1:], strict=True):
        total.addcmul_(stream.to(total.dtype), share)
    return total


def collapse(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The authors' weights -> u [key width] and, with positions, each stream's own logit <u, P_e> in [E].

    Args:
        weights: `Q`, `attention.*` and, with positions, `pe`.
    """
    query, bias = weights["Q"].double()[0], weights["attention.in_proj_bias"].double()
    size = query.shape[0]
    if "attention.in_proj_weight" in weights:  # one matrix where the keys are as wide as the attention
        to_query, to_key, _ = weights["attention.in_proj_weight"].double().chunk(3)
    else:
        to_query, to_key = (weights[f"attention.{name}_proj_weight"].double() for name in "qk")
    vector = (to_query @ query + bias[:size]) @ to_key / math.sqrt(size)
    own = weights["pe"].double() @ vector if "pe" in weights else None
    dtype = weights["Q"].dtype
    return vector.to(dtype), None if own is None else own.to(dtype)


def start_variance(size: int, keys: int) -> float:
    """Variance of the elements of u when Q, W_q and W_k start Xavier-uniform."""
    query = 2 / (1 + size)
    if size == keys:  # torch keeps the three matrices in one and initialises it as one
        return query * (1 / (2 * size)) / 2
    return query * 2 / (size + keys)
