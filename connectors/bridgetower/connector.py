"""Question-aware visual tokens: BridgeTower's cross-modal stack beside a plain connector, for clips.

Source of the stack: Xu et al. 2023, arXiv 2206.08657. Its use in front of an LLM is ours: see
docs/methods/bridgetower.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.connectors.bridgetower.cross_modal import CrossModalStack, Fused, Sizes, masked_mean
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Part, Site, TextSource, Tower
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens

LAYERED = ("hidden_states", "cls", "keys")
POST_NORMS = ("post_layernorm", "ln_post", "final_layer_norm", "ln_final", "layernorm", "norm")
"""What the libraries call the norm after a tower's last block."""


@register("connector", "bridge")
class Bridge(Part):
    """Adds to plain tokens what a cross-modal stack computes from the encoder's layers and the prompt's.

    tokens = plain + gate * W(Y + mean of X), with the stack's image stream Y and its text stream X. The gate starts
    at zero, so a fresh bridge changes nothing; a clip without a prompt keeps its plain tokens. Within the stack a frame
    attends to itself and to the prompt, and the prompt to all frames.

    The first input is the encoder, the last the plain tokens (`in: [clip, mlp]`); with a single input the encoder's
    own tokens are the plain ones. The output has the plain tokens' grid and width, and the extra `relevance` [B, N]:
    how much the prompt attends to each token, summing to 1.

    Args:
        depth, width, heads, feed_forward: of the stack; feed_forward None = 4 * width.
        bridge: how a tower's state is merged with the layer below; "none" = METER.
        levels: layers of the encoder to read, lowest first; None = the last `depth`. Empty: its tokens as they
            are, before every layer, for an encoder that gives no layers.
        text_levels: likewise for the text source.
        norm, text_norm: first pass the towers' layers through a norm, copied from the towers' own norm after the last
            block; for towers that normalise before their blocks (CLIP, SigLIP).
        tower: the encoder whose norm is copied; None = the only one of its width.
        gate: initial value of the gate.
        relevance: build the last text layer, whose mean is added to the tokens and whose attention is the relevance.
        drop: share of prompts left out in training.
        dropout: within the stack, in training.
        std: of the fresh weights.
    """

    def __init__(
        self,
        site: Site,
        *,
        depth: int = 2,
        width: int = 512,
        heads: int = 8,
        feed_forward: int | None = None,
        bridge: Literal["add_norm", "scaled_add", "interpolate", "gated", "none"] = "add_norm",
        levels: tuple[int, ...] | None = None,
        text_levels: tuple[int, ...] | None = None,
        norm: bool = True,
        text_norm: bool = True,
        tower: str | None = None,
        gate: float = 0.0,
        relevance: bool = True,
        drop: float = 0.0,
        dropout: float = 0.0,
        std: float = 0.02,
    ) -> None:
        super().__init__(site)
        sizes = Sizes(width, depth, heads, feed_forward or 4 * width, bridge, dropout=dropout)
        self.levels = _chosen(levels, sizes.levels, "levels", empty=True)
        self.text_levels = _chosen(text_levels, sizes.levels, "text_levels")
        self.tower, self.start, self.relevance, self.drop, self.std = tower, gate, relevance, drop, std
        seen, read, plain = site.inputs[0].width, site.text_width(), site.inputs[-1].width
        self.norm = nn.LayerNorm(seen) if norm else nn.Identity()
        self.text_norm = nn.LayerNorm(read) if text_norm else nn.Identity()
        self.moment = nn.Linear(width, width, bias=False)
        self.stack = CrossModalStack(read, seen, sizes, last_text=relevance)
        self.out = nn.Linear(width, plain)
        self.gate = nn.Parameter(torch.empty(plain))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the stack as its authors do and the gate as requested; the embedding of times starts at zero."""
        from transformers import initialization as init

        self.stack.reset_parameters(self.std)
        init.normal_(self.out.weight, std=self.std)
        init.zeros_(self.out.bias)
        init.zeros_(self.moment.weight)
        init.constant_(self.gate, self.start)

    def initialise(self, sources: dict[str, nn.Module]) -> None:
        """Copy the towers' own norms after their last block, where they have one.

        Raises:
            UserError: several encoders or text sources match.
        """
        named = {name: source for name, source in sources.items() if self.tower in (None, name)}
        _copy_norm(self.norm, named, Encoder, "tower: one of them")
        _copy_norm(self.text_norm, sources, TextSource, "text_norm: false")

    def needs(self) -> Needs:
        """Layers of the encoder and of the text source."""
        return Needs(hidden_states=self.levels, prompt_hidden_states=self.text_levels)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The plain tokens' shape, and the relevance.

        Raises:
            ValueError: the encoder's tokens have no grid, or the plain tokens do not lie on it.
        """
        seen, plain = inputs[0], inputs[-1]
        if len(inputs) > 2:
            raise ValueError(f"reads an encoder and plain tokens, got {len(inputs)} inputs")
        if seen.grid is None:
            raise ValueError("attends within frames, so the encoder's tokens need a grid")
        if (seen.tokens, seen.grid) != (plain.tokens, plain.grid):
            raise ValueError(f"adds to tokens of the encoder's grid: {seen.grid} and {plain.grid or plain.tokens}")
        width, layers = self.site.inputs[0].width, seen.extras.get("hidden_states", (0,))
        if self.levels and layers[-1] not in (0, width):
            raise ValueError(f"the encoder's layers have width {layers[-1]} and its tokens {width}")
        extras = {name: shape for name, shape in plain.extras.items() if name not in LAYERED}
        if self.relevance:
            extras["relevance"] = (plain.tokens,)
        return replace(plain, extras=extras)

    def forward(self, *inputs: VisualTokens, prompt: PromptFeatures) -> VisualTokens:
        """[B, N, C] and the prompt of each clip -> [B, N, C of the plain tokens].

        Args:
            prompt: hidden_states [B, L, K, C], mask [B, L], present [B].
        """
        seen, plain = inputs[0], inputs[-1]
        fused = self._fuse(seen, prompt)
        found = fused.image
        if self.relevance:
            found = found + masked_mean(fused.text, prompt.mask)[:, None].to(found.dtype)
        here = self._present(prompt, len(found))
        added = self.gate * self.out(found)
        values = plain.values + torch.where(here[:, None, None], added, torch.zeros_like(added)).to(plain.values.dtype)
        extras = {name: value for name, value in plain.extras.items() if name not in LAYERED}
        if self.relevance:
            uniform = torch.full_like(fused.relevance, 1 / found.shape[1])
            extras["relevance"] = torch.where(here[:, None], fused.relevance, uniform)
        return replace(plain, values=values, extras=extras)

    def _fuse(self, seen: VisualTokens, prompt: PromptFeatures) -> Fused:
        """Both streams over the clip and the prompt."""
        count = self.stack.sizes.levels
        image = self.norm(seen.extras["hidden_states"] if self.levels else seen.values[:, :, None]).unbind(2)
        image = image if self.levels else image * count
        text = self.text_norm(prompt.hidden_states).unbind(2)
        frames = seen.grid.t
        # the seconds of the grid's rows: after a pooling these differ from the frames'
        seconds = seen.positions[..., 0].unflatten(1, (frames, -1)).mean(-1)
        moments = self.moment(_waves(seconds, self.moment.in_features).to(image[0].dtype))
        moments = moments.repeat_interleave(image[0].shape[1] // frames, dim=1)
        return self.stack(text, image, prompt.mask, frames=frames, positions=moments, weigh=self.relevance)

    def _present(self, prompt: PromptFeatures, batch: int) -> Tensor:
        """[B], true where the prompt is used."""
        present = prompt.present
        if present is None:
            present = torch.ones(batch, dtype=torch.bool, device=prompt.mask.device)
        if self.training and self.drop:
            present = present & (torch.rand(batch, device=present.device) >= self.drop)
        return present

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """On the encoder's tokens and on a connector's, a clip and an image, with and without the encoder's layers."""
        small = {"width": 8, "heads": 2, "gate": 0.5, "std": 0.3}
        clip = TokenSpec(MediaSpec("video", 3), 12, 6, Grid(3, 2, 2))
        yield small, (clip,)
        yield {**small, "relevance": False, "bridge": "gated"}, (clip, clip.to_width(10))
        still = TokenSpec(MediaSpec("image", 1), 6, 6, Grid(1, 2, 3))
        yield {**small, "levels": (), "depth": 1, "text_norm": False}, (still,)
        yield {**small, "bridge": "none", "norm": False}, (still, still.to_width(10))


def _chosen(levels: tuple[int, ...] | None, count: int, name: str, empty: bool = False) -> tuple[int, ...]:
    """The layers to read: the requested ones, or the last ones."""
    if levels is None:
        return tuple(range(-count, 0))
    if len(levels) != count and not (empty and not levels):
        raise ValueError(f"{name}: {len(levels)} layers for a stack that reads {count}")
    return tuple(levels)


def _waves(times: Tensor, width: int) -> Tensor:
    """Seconds [B, T] as sines and cosines [B, T, width] of growing wavelengths (Vaswani et al. 2017)."""
    half = (width + 1) // 2
    rates = 10000 ** -(torch.arange(half, device=times.device, dtype=torch.float32) / half)
    angles = times.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def _copy_norm(norm: nn.Module, sources: dict[str, nn.Module], kind: type[Tower], hint: str) -> None:
    """Copy into `norm` the norm of its width that follows the tower's last block, where there is one.

    Heads and adapters have norms of such names too; the tower's own is less deeply nested than theirs.
    """
    if not isinstance(norm, nn.LayerNorm):
        return
    found, shape = {}, norm.normalized_shape
    for name, source in sources.items():
        named = [(path, one) for path, one in source.named_modules() if path.rpartition(".")[2] in POST_NORMS]
        norms = {path: one for path, one in named if isinstance(one, nn.LayerNorm) and one.normalized_shape == shape}
        if norms and isinstance(source, kind):
            found[name] = norms[min(reversed(norms), key=lambda path: path.count("."))]
    if len(found) > 1:
        raise UserError("connector bridge", f"the norm of {' or of '.join(found)}: their widths are equal", hint=hint)
    for chosen in found.values():
        norm.load_state_dict(chosen.state_dict())
