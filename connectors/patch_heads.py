"""How a patch enters the space that an image tower shares with its text tower; CLIP trains this for pooled images only.

Source: PPLLaVA (Liu et al. 2024, arXiv 2411.02327), for the towers of CLIP and SigLIP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmllm.connectors.projectors import Projector
from mmllm.contract.parts import Site
from mmllm.contract.registry import register


class ClipPatchHead(nn.Module):
    """CLIP's last norm and projection, which were made for the CLS token, over every patch: v = W LN(x).

    Args:
        width: of the tokens. joint: of the space shared with the text tower.
    """

    def __init__(self, width: int, joint: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projection = nn.Linear(width, joint, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """[..., C] -> [..., J]."""
        return self.projection(self.norm(values))

    def take(self, pair: nn.Module) -> None:
        """Weights out of a CLIP model."""
        self.norm.load_state_dict(pair.vision_model.post_layernorm.state_dict())
        self.projection.load_state_dict(pair.visual_projection.state_dict())


@register("connector", "clip_head")
class ClipHead(Projector):
    """`ClipPatchHead` as a part: trained by the contrastive objective, its `head` is that of `prompt_relevance`.

    Args:
        width: of the joint space, a number or "llm".
    """

    def __init__(self, site: Site, *, width: int | str = "llm") -> None:
        super().__init__(site)
        self.out_width = site.width(width)
        self.head = ClipPatchHead(site.inputs[0].width, self.out_width)

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        return self.head(values)


class SiglipPatchHead(nn.Module):
    """The value path of SigLIP's probe head, as if a patch got all of the probe's attention.

    Args:
        width: of the tokens, and of the space shared with the text tower.
        hidden: of the head's MLP. heads: of its attention.
        probe: build the probe too, for `attention`.
        reference: without the attention's output projection, as the authors have it.
    """

    def __init__(self, width: int, hidden: int, heads: int, *, probe: bool = False, reference: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.value = nn.Linear(width, width)
        self.out = nn.Identity() if reference else nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.heads = heads
        if probe:
            self.probe = nn.Parameter(torch.empty(width))
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        values = self.out(self.value(self.norm(values)))
        return values + self.mlp(self.mlp_norm(values))

    def attention(self, values: Tensor) -> Tensor:
        """Patches [..., N, C] of a frame -> [..., heads, N] float32, how much of the probe's attention each gets."""
        keys = self.key(self.norm(values)).unflatten(-1, (self.heads, -1))
        query = self.query(self.probe).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("...nhc,hc->...hn", keys, query) / math.sqrt(query.shape[-1])
        return logits.float().softmax(-1)

    def take(self, pair: nn.Module) -> None:
        """Weights out of a SigLIP model."""
        head = pair.vision_model.head
        query, key, value = (
            dict(zip(("weight", "bias"), both, strict=True))
            for both in zip(head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3), strict=True)
        )
        self.norm.load_state_dict(pair.vision_model.post_layernorm.state_dict())
        self.value.load_state_dict(value)
        if not isinstance(self.out, nn.Identity):
            self.out.load_state_dict(head.attention.out_proj.state_dict())
        self.mlp_norm.load_state_dict(head.layernorm.state_dict())
        self.mlp[0].load_state_dict(head.mlp.fc1.state_dict())
        self.mlp[2].load_state_dict(head.mlp.fc2.state_dict())
        if hasattr(self, "probe"):
            self.query.load_state_dict(query)
            self.key.load_state_dict(key)
            self.probe.data.copy_(head.probe.flatten())


def cosine(visual: Tensor, prompt: Tensor) -> Tensor:
    """Cosine of every token [B, N, J] with the prompt [B, J] of its row -> [B, N], in float32."""
    visual = nn.functional.normalize(visual.float(), dim=-1)
    return torch.einsum("bnj,bj->bn", visual, nn.functional.normalize(prompt.float(), dim=-1))
