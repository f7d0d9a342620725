"""PPLLaVA: pooling of visual tokens by what the prompt asks for (Liu et al. 2024, arXiv 2411.02327).

Two parts. `prompt_relevance` scores every token of an encoder against the prompt, in the space that the encoder shares
with its twin text tower; the scores ride along through projectors. `prompt_pool` takes means in windows, weighted by
the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.connectors.common.windows import (
    Size,
    Windows,
    by_window,
    distance_from_mean,
    resolve_windows,
    weighted_means,
    window_weights,
)
from mmllm.connectors.ppllava.patch_heads import ClipPatchHead, SiglipPatchHead, cosine, load_head
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens


@register("connector", "prompt_relevance")
class PromptRelevance(Part):
    """Scores every token of an encoder against the prompt and writes them as the extra `relevance` [B, N].

    The tokens pass unchanged. A clip's scores are softmax(scale * cosine) over all of its tokens, so they sum to 1;
    a clip without a prompt has equal scores.

    Args:
        head: how a token enters the joint space: "clip" (last norm and projection) or "siglip" (value path of the
            probe head).
        normalise: "global", or "window" = the raw scale * cosine, for `prompt_pool` to normalise in each window
            (there with `temperature: 1`).
        weights: hub id or folder of the image-text model that provides head and scale; None = the head is learned.
        scale: of the cosine, where no model provides it; it is not learned.
        hidden, heads: of SigLIP's probe head: width of its MLP (default 4 times the tokens') and attention heads.
        probe_attention: also multiply by 1000 times the probe's attention over a frame (SigLIP; the authors' option).
        reference: SigLIP's value path without the output projection of its attention.
    """

    def __init__(
        self,
        site: Site,
        *,
        head: Literal["clip", "siglip"] = "clip",
        normalise: Literal["global", "window"] = "global",
        weights: str | None = None,
        scale: float = 100.0,
        hidden: int | None = None,
        heads: int = 16,
        probe_attention: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(site)
        width, joint = site.inputs[0].width, site.prompt_joint
        if joint is None:
            site.text_width()  # reports a missing text source first
            raise ValueError("the text source has no space that it shares with an image tower")
        if head == "siglip" and joint != width:
            raise ValueError(f"a SigLIP head keeps the width of {width}, the text source's space has {joint}")
        if probe_attention and head != "siglip":
            raise ValueError("probe_attention: only a SigLIP head has a probe")
        if probe_attention and width % heads:
            raise ValueError(f"heads {heads} does not divide the width of {width}")
        self.normalise, self.weights, self.scale, self.probe_attention = normalise, weights, scale, probe_attention
        if head == "clip":
            self.head: nn.Module = ClipPatchHead(width, joint)
        else:
            options = {"probe": probe_attention, "reference": reference}
            self.head = SiglipPatchHead(width, hidden or 4 * width, heads, **options)
        self.register_buffer("logit_scale", torch.empty(()))  # a buffer: frozen but saved
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale as given (CLIP learned 100), and the probe."""
        from transformers import initialization as init

        init.constant_(self.logit_scale, math.log(self.scale))
        if self.probe_attention:
            init.normal_(self.head.probe, std=self.head.probe.shape[0] ** -0.5)

    def load_weights(self) -> None:
        """Load head and scale from the image-text model that `weights` names.

        Raises:
            UserError: it cannot be loaded, or has another head.
        """
        if self.weights is not None:
            self.logit_scale.copy_(load_head(self.head, self.weights, "prompt_relevance.weights"))

    def needs(self) -> Needs:
        """The prompt in the joint space."""
        return Needs(prompt=("pooled",))

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """The same tokens, each with a score.

        Raises:
            ValueError: the probe's attention is requested but the input has no frames.
        """
        spec = inputs[0]
        if self.probe_attention and spec.grid is None:
            raise ValueError(f"probe_attention: looks at the patches of a frame, got {spec}")
        return replace(spec, extras={**spec.extras, "relevance": (spec.tokens,)})

    def forward(self, *inputs: VisualTokens, prompt: PromptFeatures | None = None) -> VisualTokens:
        """Tokens [B, N, C] as they are, with extras["relevance"] [B, N] in float32."""
        tokens = inputs[0]
        relevance = self.logits(tokens.values, prompt)
        if self.normalise == "global":
            relevance = relevance.softmax(1)
        if self.probe_attention and prompt is not None:
            looked = relevance * 1000 * self.head.attention(tokens.by_frame()).mean(2).flatten(1, 2)
            relevance = looked if prompt.present is None else looked.where(prompt.present[:, None], relevance)
        return replace(tokens, extras={**tokens.extras, "relevance": relevance})

    def logits(self, values: Tensor, prompt: PromptFeatures | None) -> Tensor:
        """scale * cosine [B, N] in float32; zero in rows without a prompt."""
        if prompt is None:
            return values.new_zeros(values.shape[:2], dtype=torch.float32)
        scores = self.logit_scale.float().exp() * cosine(self.head(values), prompt.pooled)
        return scores if prompt.present is None else scores.masked_fill(~prompt.present[:, None], 0)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Either head over a clip, scores left to the windows, and an image of two views."""
        clip = TokenSpec(MediaSpec("video", 2), 12, 12, Grid(2, 2, 3))
        yield {}, (clip,)
        yield {"normalise": "window"}, (clip,)
        yield {"head": "siglip", "heads": 3, "probe_attention": True}, (clip,)
        yield {"head": "siglip", "hidden": 20}, (TokenSpec(MediaSpec("image", 2), 12, 12, Grid(2, 2, 3)),)


@register("connector", "prompt_pool")
class PromptPool(Part):
    """Fewer tokens: in every window of the grid, the mean with weights softmax(relevance / temperature).

    Windows along (time, rows, columns), see `resolve_windows`. `kernel` alone is also the stride. The views of an image
    stay apart unless `still_*` says otherwise. Positions move with the weights; the size of a token is that of its
    window. Weights sum to 1, so pooling before the last linear layer is equivalent to pooling after it, and cheaper.

    Args:
        grid: output grid, whatever the input.
        kernel, stride: of the windows.
        still_grid, still_kernel, still_stride: the same for images.
        temperature: of the softmax in a window. Relevance over N tokens is about 1/N, so 0.01 leaves all but the most
            relevant windows flat; "auto" = 0.01 * 18432 / N, as flat for any N as for the paper's 32 frames.
        reference: the authors' windows, which drop the remainder and overlap where `grid` alone is given.
    """

    PAPER = 32 * 24 * 24

    def __init__(
        self,
        site: Site,
        *,
        grid: Size | None = None,
        kernel: Size | None = None,
        stride: Size | None = None,
        still_grid: Size | None = None,
        still_kernel: Size | None = None,
        still_stride: Size | None = None,
        temperature: float | Literal["auto"] = 0.01,
        reference: bool = False,
    ) -> None:
        super().__init__(site)
        if grid is None and kernel is None:
            raise ValueError("give grid or kernel")
        if temperature != "auto" and not temperature > 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        self.asked = {"video": (grid, kernel, stride), "image": (still_grid, still_kernel, still_stride)}
        self.temperature, self.reference = temperature, reference
        self.last_distance: Tensor | None = None

    def needs(self) -> Needs:
        """A score per token."""
        return Needs(extras=("relevance",))

    def windows(self, media: MediaSpec, grid: Grid) -> Windows:
        """The windows over a clip's grid.

        Raises:
            ValueError: they do not fit.
        """
        asked = self.asked[media.kind]
        if asked == (None, None, None):  # an image without settings of its own: as a video, each view alone
            target, *rest = self.asked["video"]
            asked = (target and (grid.t, *target[1:]), *(values and (1, *values[1:]) for values in rest))
        target, kernel, stride = asked
        if target is None and stride is None:
            stride = kernel
        return resolve_windows((grid.t, grid.h, grid.w), target, kernel, stride, reference=self.reference)

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """One input on a raster grid.

        Raises:
            ValueError: it has none, or the windows do not fit.
        """
        spec = inputs[0]
        if spec.grid is None or not spec.grid.raster:
            raise ValueError(f"pools a raster grid, got {spec}")
        return spec.to_grid(Grid(*self.windows(spec.media, spec.grid).grid))

    def forward(self, *inputs: VisualTokens) -> VisualTokens:
        """[B, t h w, C] -> [B, t' h' w', C]."""
        tokens = inputs[0]
        windows = self.windows(tokens.media, tokens.grid)
        relevance = tokens.extras.get("relevance")
        scores = None if relevance is None else tokens.as_grid(relevance)
        weights = window_weights(scores, windows, self._temperature(tokens.grid), tokens.values.device)
        self.last_distance = distance_from_mean(weights.detach(), windows)
        values = weighted_means(tokens.as_grid(), weights, windows).flatten(1, 3)
        positions = weighted_means(tokens.as_grid(tokens.positions), weights, windows).flatten(1, 3)
        size = (tokens.grid.t, tokens.grid.h, tokens.grid.w)
        share = tokens.as_grid(tokens.sizes) / windows.coverage(size, tokens.sizes.device)
        sizes = (by_window(share, windows) * windows.inside(share.device)).sum(-1).flatten(1)
        return VisualTokens(values, tokens.media, Grid(*windows.grid), positions, sizes, tokens.times)

    def _temperature(self, grid: Grid) -> float:
        return 0.01 * self.PAPER / grid.tokens if self.temperature == "auto" else self.temperature

    def statistics(self) -> dict[str, Tensor]:
        """How far the last forward's weights were from the plain mean (total variation, 0 = the mean), for the log."""
        return {} if self.last_distance is None else {"distance": self.last_distance}

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """Windows that divide evenly, are cut or adapt; a clip, one frame, an image of two views."""
        extras = {"relevance": (60,)}
        clip = TokenSpec(MediaSpec("video", 4), 60, 6, Grid(4, 3, 5), extras)
        yield {"kernel": (2, 3, 3), "temperature": "auto"}, (clip,)
        yield {"kernel": (2, 2, 2), "stride": (1, 2, 1)}, (clip,)
        yield {"grid": (3, 2, 2)}, (clip,)
        yield (
            {"grid": (8, 2, 2), "stride": (1, 1, 2)},
            (TokenSpec(clip.media, 240, 6, Grid(8, 3, 10), {"relevance": (240,)}),),
        )
        yield {"kernel": (2, 3, 5)}, (TokenSpec(MediaSpec("video", 1), 15, 6, Grid(1, 3, 5), {"relevance": (15,)}),)
        yield {"grid": (4, 2, 2)}, (TokenSpec(MediaSpec("image", 2), 30, 6, Grid(2, 3, 5), {"relevance": (30,)}),)
