"""Encoders whose tokens are layers of a tower: what they have in common, whatever the library.

A library's class says how its tower is built (`create`), read (`read`) and loaded. The shapes of all layers come from
one forward on the meta device when the encoder is built, so no table of models has to list them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Encoder, Site
from mmllm.contract.types import Grid, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.encoders.common.transform import Transform

KEYS = ("k_proj", "key")
"""What the libraries call an attention layer's key projection, where it is a module of its own."""
QUERIES = ("q_proj", "query")
"""And its query projection."""
CLS = ("cls_token", "class_token", "class_embedding")
"""What they call the CLS token; a tower without one has only registers before its patches."""


@dataclass
class State:
    """A layer of M inputs: patches [M, t, h, w, C], and the tokens before them [M, R, C] (CLS first) or None."""

    patches: Tensor
    prefix: Tensor | None = None

    def tokens(self, cls: bool = False) -> Tensor:
        """[M, t h w, C], or [M, 1 + t h w, C] with the CLS token first."""
        flat = self.patches.flatten(1, 3)
        return torch.cat([self.prefix[:, :1], flat], dim=1) if cls else flat

    @property
    def shape(self) -> Shape:
        """The shape of one input's layer."""
        before = 0 if self.prefix is None else self.prefix.shape[1]
        return Shape(tuple(self.patches.shape[1:4]), self.patches.shape[-1], before)


@dataclass(frozen=True)
class Shape:
    """A layer of one input: a grid of (t, h, w) patches of this width, and the number of tokens before them."""

    view: tuple[int, int, int]
    width: int
    before: int


class LayeredEncoder(Encoder):
    """An encoder over layers of `self.tower`, one input of the tower per frame.

    Args:
        transform: how its pixels are resized and normalised.
        layer: which layer gives the tokens, or several, joined along the width.
        cls: keep the CLS token of every frame; the tokens then have no grid.
        frames: how many frames of a clip to read, evenly spaced; None = all.
    """

    tower: nn.Module
    reads_frames: ClassVar[bool] = True
    """Whether an input of the tower is a single frame rather than a clip."""

    def __init__(
        self, site: Site, transform: Transform, *, layer: int | tuple[int, ...], cls: bool, frames: int | None
    ) -> None:
        super().__init__(site)
        self.layers = layer if isinstance(layer, tuple) else (layer,)
        self.cls, self.frames = cls, frames
        self.mean, self.std, self.geometry = transform.mean, transform.std, transform.geometry

    def create(self) -> nn.Module:
        """The tower with random weights, on the current default device."""
        raise NotImplementedError

    def read(self, tower: nn.Module, inputs: Tensor, layers: list[int] | None) -> dict[int, State]:
        """{layer: state}, layers counted from 0; None = all of them.

        Args:
            inputs: normalised pixels [M, 3, h, w].
        """
        raise NotImplementedError

    def inputs(self, pixels: Tensor, media: MediaSpec) -> Tensor:
        """Pixels [B, F, 3, h, w] as the inputs of the tower [M, ...]; those of a clip are adjacent."""
        return pixels.flatten(0, 1)

    def inputs_of(self, media: MediaSpec) -> int:
        """How many inputs of the tower a clip makes."""
        return self.frames_of(media)

    def blank(self) -> Tensor:
        """One zero input of the tower, on the current default device."""
        return torch.zeros(1, 3, self.geometry.height, self.geometry.width)

    def build_tower(self) -> None:
        """Build the tower and learn the shapes of its layers.

        Raises:
            ValueError: the tower cannot read such pixels, or has no such layer or CLS token.
        """
        self.tower = self.create()
        self.shapes, self.key_shapes = self._measure()
        chosen = [self._shape(layer) for layer in self.layers]
        self.view, self.before = chosen[0].view, chosen[0].before
        if any(shape.view != self.view for shape in chosen):
            raise ValueError(f"layers {list(self.layers)} have different grids")
        self.has_cls = any(name.rpartition(".")[2] in CLS for name, _ in self.tower.named_parameters())
        if self.cls and not all(self._has_cls(shape) for shape in chosen):
            raise ValueError("cls: this tower has no CLS token")
        self.width = sum(shape.width for shape in chosen)

    def _measure(self) -> tuple[list[Shape], list[tuple[int, ...]]]:
        """Shapes of all layers and keys.

        Raises:
            ValueError: the tower cannot read pixels of this size.
        """
        training = self.tower.training
        self.tower.eval()  # training may drop patches
        try:
            states, keys = self._read_meta()
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            why = (str(error).splitlines() or [error.__class__.__name__])[0]
            raise ValueError(f"cannot read {self.geometry.height}x{self.geometry.width} pixels: {why}") from error
        finally:
            self.tower.train(training)
        return [states[index].shape for index in range(len(states))], [tuple(key.shape) for key in keys]

    def _read_meta(self) -> tuple[dict[int, State], list[Tensor]]:
        """Layers and keys of one input that has no memory, through weights without memory."""
        tensors = {**dict(self.tower.named_parameters()), **dict(self.tower.named_buffers())}
        with torch.device("meta"), torch.no_grad(), recorded(key_projections(self.tower)) as keys:
            weights = {f"tower.{name}": torch.empty_like(value, device="meta") for name, value in tensors.items()}
            blank = self.blank().to(next(iter(weights.values())))
            return torch.func.functional_call(_Reader(self.tower, self.read), weights, (blank,)), keys

    def _index(self, layer: int) -> int:
        count = len(self.shapes)
        if not -count <= layer < count:
            raise ValueError(f"layer {layer}: this tower has the layers {-count} to {count - 1}")
        return layer % count

    def _shape(self, layer: int) -> Shape:
        return self.shapes[self._index(layer)]

    def _has_cls(self, shape: Shape) -> bool:
        return self.has_cls and shape.before > 0

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        """One token per patch of every frame it reads, plus the CLS token where it is asked for."""
        rows, columns = self.view[1:]
        grid = Grid(self.inputs_of(media) * self.view[0], rows, columns)
        if self.cls:
            return TokenSpec(media, grid.tokens + self.inputs_of(media), self.width)
        return TokenSpec(media, grid.tokens, self.width, grid)

    def extras_spec(self, media: MediaSpec, needs: Needs) -> dict[str, tuple[int, ...]]:
        """Levels and keys on the tokens' own grid, CLS tokens of any layer that has one.

        Raises:
            ValueError: no such layer, another grid or width, no CLS token, or no key projections.
        """
        count, extras = self.output_spec(media).tokens, {}
        if needs.hidden_states:
            extras["hidden_states"] = (count, len(needs.hidden_states), self._level_width(needs.hidden_states))
        if needs.cls:
            extras["cls"] = (self.inputs_of(media), len(needs.cls), self._cls_width(needs.cls))
        if needs.keys:
            extras["keys"] = (count, len(needs.keys), self._key_width(needs.keys))
        return extras

    def _level_width(self, layers: tuple[int, ...]) -> int:
        shapes = [self._shape(layer) for layer in layers]
        if any(shape.view != self.view or (self.cls and not self._has_cls(shape)) for shape in shapes):
            raise ValueError(f"hidden states {list(layers)}: not on the tokens' own grid")
        return _one({shape.width for shape in shapes}, f"hidden states {list(layers)}")

    def _cls_width(self, layers: tuple[int, ...]) -> int:
        if not self.reads_frames:
            raise ValueError("gives no cls: its CLS token is of a whole clip, not of a frame")
        shapes = [self._shape(layer) for layer in layers]
        if not all(self._has_cls(shape) for shape in shapes):
            raise ValueError("gives no cls: this tower has no CLS token")
        return _one({shape.width for shape in shapes}, f"cls {list(layers)}")

    def _key_width(self, layers: tuple[int, ...]) -> int:
        rows = self.before + self.view[0] * self.view[1] * self.view[2]
        shapes = [self.key_shapes[self._block(layer)] for layer in layers]
        if any(shape[:-1] != (1, rows) for shape in shapes):
            raise ValueError(f"keys {list(layers)}: not one per token")
        return _one({shape[-1] for shape in shapes}, f"keys {list(layers)}")

    def _block(self, layer: int) -> int:
        """The attention layer whose output is layer `layer`; the lowest layer may be the input of the first block."""
        first = len(self.shapes) - len(self.key_shapes)
        if first not in (0, 1):
            raise ValueError("gives no keys: this tower has no key projection per layer")
        block = self._index(layer) - first
        if block < 0:
            raise ValueError(f"keys {layer}: no attention before this layer")
        return block

    def forward(self, pixels: Tensor, media: MediaSpec, needs: Needs) -> VisualTokens:
        """[B, F, 3, h, w] uint8 -> tokens [B, N, C], frame by frame in row-major order, and the extras needed."""
        batch, frames = pixels.shape[:2]
        inputs = self.inputs(self.normalise(pixels), media)
        wanted = {self._index(layer) for layer in (*self.layers, *needs.hidden_states, *needs.cls)}
        modules = key_projections(self.tower) if needs.keys else []
        watched = self._attending() if needs.cls_attention else []
        with recorded([modules[self._block(layer)] for layer in needs.keys]) as keys, recorded(watched) as heads:
            states = self.read(self.tower, inputs, sorted(wanted))
        chosen = [states[self._index(layer)].tokens(self.cls) for layer in self.layers]
        values = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        per_clip = values.shape[0] // batch
        grid = None if self.cls else Grid(per_clip * self.view[0], *self.view[1:])
        tokens = frame_tokens(values.unflatten(0, (batch, per_clip)).flatten(1, 2), media, grid, frames)
        found = self._extras(states, keys, needs)
        if watched:
            found["cls_attention"] = self._cls_attention(*heads)
        for name, rows in found.items():
            rows = rows.unflatten(0, (batch, per_clip))
            tokens.extras[name] = rows if name == "cls" else rows.flatten(1, 2)
        return tokens

    def _attending(self) -> list[nn.Module]:
        """The projections to queries and keys in the block that gives the tokens; none without a CLS token."""
        queries, keys = (projections(self.tower, names) for names in (QUERIES, KEYS))
        if not self.has_cls or not self.before or len(queries) != len(self.key_shapes) or self._heads() is None:
            return []
        block = self._block(self.layers[-1])
        return [queries[block], keys[block]]

    def _heads(self) -> int | None:
        return getattr(getattr(self.tower, "config", None), "num_attention_heads", None)

    def _cls_attention(self, query: Tensor, key: Tensor) -> Tensor:
        """[M, tokens, C] each -> [M, patches], the CLS token's attention, averaged over the heads."""
        q, k = (value.float().unflatten(-1, (self._heads(), -1)) for value in (query[:, 0], key))
        logits = torch.einsum("mhd,mnhd->mhn", q, k) * q.shape[-1] ** -0.5
        return logits.softmax(-1).mean(1)[:, self.before :]

    def _extras(self, states: dict[int, State], keys: list[Tensor], needs: Needs) -> dict[str, Tensor]:
        """{extra: [M, rows, K, C]}, or [M, K, C] for cls."""
        extras = {}
        if needs.hidden_states:
            layered = [states[self._index(layer)].tokens(self.cls) for layer in needs.hidden_states]
            extras["hidden_states"] = torch.stack(layered, dim=2)
        if needs.cls:
            extras["cls"] = torch.stack([states[self._index(layer)].prefix[:, 0] for layer in needs.cls], dim=1)
        if needs.keys:
            stacked = torch.stack(keys, dim=2)
            patches = stacked[:, self.before :]
            extras["keys"] = torch.cat([stacked[:, :1], patches], dim=1) if self.cls else patches
        return extras


class _Reader(nn.Module):
    """A tower's `read` as a module's forward, so that its weights can be swapped for meta tensors."""

    def __init__(self, tower: nn.Module, read: Callable) -> None:
        super().__init__()
        self.tower, self.read = tower, read

    def forward(self, inputs: Tensor) -> dict[int, State]:
        """{layer: state} of all layers."""
        return self.read(self.tower, inputs, None)


def key_projections(tower: nn.Module) -> list[nn.Module]:
    """The key projections of a tower's attention layers, in order; empty where fused with queries and values."""
    return projections(tower, KEYS)


def projections(tower: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Modules of a tower by the last part of their name, in order."""
    return [module for name, module in tower.named_modules() if name.rpartition(".")[2] in names]


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules during a forward, in the order of the modules (a module listed twice gives it twice)."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int) -> Callable:
        return lambda module, args, output: outputs.__setitem__(index, output)

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _one(widths: set[int], what: str) -> int:
    if len(widths) != 1:
        raise ValueError(f"{what}: different widths, {sorted(widths)}")
    return widths.pop()
