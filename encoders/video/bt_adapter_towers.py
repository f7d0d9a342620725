"""Image towers with a BT-Adapter beside their last blocks: CLIP's, SigLIP's, and EVA's of timm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.contract.types import MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.layered import LayeredEncoder
from mmllm.encoders.common.transform import PixelArguments
from mmllm.encoders.image.huggingface import SMALL, ClipEncoder, SiglipEncoder
from mmllm.encoders.image.timm import TimmEncoder
from mmllm.encoders.video.bt_adapter import Block, BTAdapter

HUGGING_FACE = {
    "norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "wide": "mlp.fc1",
    "narrow": "mlp.fc2",
}
"""Modules of a space layer, and of a block of a tower of transformers."""
TIMM = {"norm": "norm1", "mlp_norm": "norm2", "attention.out": "attn.proj", "wide": "mlp.fc1", "narrow": "mlp.fc2"}
"""And of a block of timm's EVA, whose queries, keys and values are one matrix."""


class SideStreamEncoder(LayeredEncoder):
    """An encoder with a BT-Adapter: a mixin in front of the tower's own class.

    Frames of a clip attend to each other; the views of an image do not. Layers within the adapter's depth are blended
    with the side stream.
    """

    per_frame = False
    adapter: BTAdapter

    def add_adapter(
        self, block: Block, blocks: int, *, depth: int, max_frames: int, drop: float, reference: bool, eva: bool
    ) -> None:
        """Build the adapter beside the tower, which is built already.

        Args:
            block: what its layers are modelled on.
            blocks: of the tower.
            depth, max_frames, drop, reference: see the encoders.
            eva: blend CLS rows and let rates grow as ST-LLM does; see `BTAdapter`.

        Raises:
            ValueError: the layer that is read lies before the adapter, or the tower has registers.
        """
        count, last = len(self.shapes), self._index(self.layers[0])
        if depth > blocks or last < count - depth:
            raise ValueError(f"depth {depth}: layer {self.layers[0]} of {blocks} blocks lies before the adapter")
        if self.before > 1:
            raise ValueError("a tower with registers has no place for a BT-Adapter")
        self.depth, self.max_frames = depth, max_frames
        self.reads = tuple(range(count - depth, last + 1))
        layers, spread = (depth, 1.0) if reference else (len(self.reads), 0.0)
        options = {"drop": drop, "depth": None if eva else depth, "spread": spread, "blend_cls": eva}
        self.adapter = BTAdapter(block, layers, max_frames, tower_cls=self.before == 1, **options)

    def position_table(self, patches: Tensor) -> Tensor:
        """[1 + N, C] or [N, C]: the tower's positions at this size.

        Args:
            patches: [B, N, C], for towers that need to see what they are for.
        """
        raise NotImplementedError

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
        cls = list(dict.fromkeys([*self.reads, *map(self._index, needs.cls)])) if self.adapter.tower_cls else []
        tokens = super().forward(pixels, media, replace(needs, hidden_states=tuple(wanted), cls=tuple(cls)))
        layers = dict(zip(wanted, tokens.extras["hidden_states"].unbind(2), strict=True))
        firsts = dict(zip(cls, tokens.extras["cls"].unbind(2), strict=True)) if cls else {}
        frames = [tokens.by_frame(layers[at]) for at in self.reads]
        if cls:
            pairs = zip(self.reads, frames, strict=True)
            frames = [torch.cat([firsts[at][:, :, None], state], dim=2) for at, state in pairs]
        if media.kind == "image":
            frames = [state.flatten(0, 1)[:, None] for state in frames]
        streams = self.adapter(frames, self.position_table(tokens.by_frame(layers[self.reads[0]])[:1, 0]))
        for at, state, stream in zip(self.reads, frames, streams, strict=True):
            blended = self.adapter.blend(state, stream)
            layers[at] = blended[:, :, len(cls) > 0 :].reshape(tokens.values.shape)
            if cls:
                firsts[at] = blended[:, :, 0].reshape(firsts[at].shape)
        extras = {name: tokens.extras[name] for name in ("keys", "cls_attention") if name in tokens.extras}
        if needs.hidden_states:
            extras["hidden_states"] = torch.stack([layers[self._index(layer)] for layer in needs.hidden_states], dim=2)
        if needs.cls:
            extras["cls"] = torch.stack([firsts[self._index(layer)] for layer in needs.cls], dim=2)
        return replace(tokens, values=layers[self.reads[-1]], extras=extras)


class _BesideTransformers(SideStreamEncoder):
    """What CLIP's and SigLIP's towers have in common; in front of the tower's own class, whose arguments it takes too.

    Args:
        depth: number of the tower's last blocks that the side stream runs beside.
        max_frames: most frames per clip.
        drop: stochastic depth rate in training.
        reference: start as the authors do: also build a layer whose output is never used; time embeddings are N(0, 1).
    """

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
        **pixels: Unpack[PixelArguments],
    ) -> None:
        super().__init__(site, name=name, config=config, layer=layer, frames=frames, size=size, **pixels)
        own = self.config
        eps = (own.layer_norm_eps, own.layer_norm_eps)
        block = Block(own.hidden_size, own.intermediate_size, own.num_attention_heads, own.hidden_act, eps=eps)
        options = {"depth": depth, "max_frames": max_frames, "drop": drop, "reference": reference}
        self.add_adapter(block, own.num_hidden_layers, **options, eva=False)

    def load_weights(self) -> None:
        """Load the tower's weights, and copy its last blocks into the adapter's space layers."""
        super().load_weights()
        blocks = self.tower.encoder.layers[-self.depth :]
        self.adapter.copy_blocks([_renamed(block, HUGGING_FACE) for block in blocks])

    def position_table(self, patches: Tensor) -> Tensor:
        """The table itself, or what the library makes of it at another size."""
        own, side = self.tower.embeddings, self.geometry.height
        if side == self.config.image_size:
            return own.position_embedding(own.position_ids)[0]
        whole = torch.cat([patches[:, :1], patches], dim=1) if self.adapter.tower_cls else patches
        return own.interpolate_pos_encoding(whole, side, side)[0]


@register("encoder", "clip_bt_adapter")
class ClipBTAdapterEncoder(_BesideTransformers, ClipEncoder):
    """CLIP's image tower with a BT-Adapter; CLS tokens are the tower's own.

    Args:
        name, config, layer, frames, size: as for `clip`.
        depth, max_frames, drop, reference: of the adapter, see `_BesideTransformers`.
    """

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip, a deeper adapter up to the last layer, views of an image."""
        config = {**SMALL, "image_size": 28, "patch_size": 14}
        yield {"config": config, "depth": 2}, (MediaSpec("video", 3),)
        yield {"config": config, "depth": 3, "layer": -1}, (MediaSpec("video", 2),)
        yield {"config": config, "depth": 2, "size": 42}, (MediaSpec("image", 2),)


@register("encoder", "siglip_bt_adapter")
class SiglipBTAdapterEncoder(_BesideTransformers, SiglipEncoder):
    """SigLIP's image tower with a BT-Adapter; there being no CLS token, the side stream's starts as its own.

    Args:
        name, config, layer, frames, size: as for `siglip`.
        depth, max_frames, drop, reference: of the adapter, see `_BesideTransformers`.
    """

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip, and views of an image at another size."""
        config = {**SMALL, "image_size": 28, "patch_size": 14}
        yield {"config": config, "depth": 3}, (MediaSpec("video", 3),)
        yield {"config": config, "depth": 2, "size": 42, "layer": -1}, (MediaSpec("image", 2),)


@register("encoder", "timm_bt_adapter")
class TimmBTAdapterEncoder(SideStreamEncoder, TimmEncoder):
    """timm's EVA (BEiT-like blocks without a bias of the keys, absolute positions) with a BT-Adapter, as in ST-LLM.

    CLS tokens are blended with the side stream too. The authors' space layers norm with 1e-5, not with the tower's own
    1e-6.

    Args:
        name, weights, architecture, layer, frames, size, model_args: as for `timm`.
        depth, max_frames, drop, reference: of the adapter, see `_BesideTransformers`.
    """

    def __init__(
        self,
        site: Site,
        *,
        name: str,
        weights: str | None = None,
        architecture: str | None = None,
        layer: int = -2,
        frames: int | None = None,
        size: int | None = None,
        model_args: dict | None = None,
        depth: int = 4,
        max_frames: int = 64,
        drop: float = 0.1,
        reference: bool = False,
        **pixels: Unpack[PixelArguments],
    ) -> None:
        known = {"weights": weights, "architecture": architecture, "layer": layer, "frames": frames, "size": size}
        super().__init__(site, name=name, model_args=model_args, **known, **pixels)
        blocks = getattr(self.tower, "blocks", None)
        if not blocks or not _is_eva(blocks[-1]) or getattr(self.tower, "pos_embed", None) is None:
            raise ValueError(f"{self.architecture}: no EVA with a table of positions")
        first, hidden = blocks[0], blocks[0].mlp.fc1.out_features
        norms = {"activation": "gelu", "key_bias": False, "eps": (1e-5, first.norm1.eps)}
        block = Block(first.mlp.fc1.in_features, hidden, first.attn.num_heads, **norms)
        options = {"depth": depth, "max_frames": max_frames, "drop": drop, "reference": reference}
        self.add_adapter(block, len(blocks), **options, eva=True)

    def load_weights(self) -> None:
        """Load the tower's weights, and copy its last blocks into the adapter's space layers."""
        super().load_weights()
        self.adapter.copy_blocks([_eva_states(block) for block in self.tower.blocks[-self.depth :]])

    def position_table(self, patches: Tensor) -> Tensor:
        """The table: timm builds it for the size that is read."""
        return self.tower.pos_embed[0].clone()  # a view of a parameter has no place in a graph without gradients

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[MediaSpec, ...]]]:
        """A clip, and views of an image."""
        small = {"embed_dim": 24, "depth": 3, "num_heads": 2}
        eva = {"name": "eva_giant_patch14_clip_224", "size": 28, "model_args": small}
        yield {**eva, "depth": 2}, (MediaSpec("video", 3),)
        yield {**eva, "depth": 3, "layer": -1}, (MediaSpec("image", 2),)


def _is_eva(block: nn.Module) -> bool:
    """Whether a block of timm is what a space layer can be: joint queries, keys and values, no bias of the keys."""
    attention = getattr(block, "attn", None)
    return hasattr(getattr(block, "mlp", None), "fc1") and getattr(attention, "q_bias", None) is not None


def _renamed(block: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """A block's weights under the names of a space layer."""
    pairs = ((ours, block.get_submodule(theirs)) for ours, theirs in names.items())
    return {f"{ours}.{key}": value for ours, part in pairs for key, value in part.state_dict().items()}


def _eva_states(block: nn.Module) -> dict[str, Tensor]:
    """A block of timm's EVA under the names of a space layer."""
    biases = (block.attn.q_bias, None, block.attn.v_bias)
    states = _renamed(block, TIMM)
    parts = zip(("query", "key", "value"), block.attn.qkv.weight.chunk(3), biases, strict=True)
    for name, weight, bias in parts:
        states[f"attention.{name}.weight"] = weight
        if bias is not None:
            states[f"attention.{name}.bias"] = bias
    return states
