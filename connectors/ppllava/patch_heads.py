"""How patches enter the space that an image tower shares with its text tower; CLIP trains this for pooled images only.

Source: PPLLaVA (Liu et al. 2024, arXiv 2411.02327), for CLIP and SigLIP towers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmllm.connectors.common.precision import without_autocast
from mmllm.connectors.common.projectors import Projector
from mmllm.contract.errors import UserError
from mmllm.contract.library import pretrained
from mmllm.contract.parts import Site
from mmllm.contract.registry import register


class ClipPatchHead(nn.Module):
    """CLIP's last norm and projection, made for the CLS token, applied to every patch: v = W LN(x).

    Args:
        width: of the tokens.
        joint: width of the space shared with the text tower.
    """

    def __init__(self, width: int, joint: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projection = nn.Linear(width, joint, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """[..., C] -> [..., J]."""
        return self.projection(self.norm(values))

    def load_from(self, pair: nn.Module) -> None:
        """Copy the weights of a CLIP model."""
        self.norm.load_state_dict(pair.vision_model.post_layernorm.state_dict())
        self.projection.load_state_dict(pair.visual_projection.state_dict())


@register("connector", "clip_head")
class ClipHead(Projector):
    """`ClipPatchHead` as a part, to train it by the contrastive objective.

    A `prompt_relevance` of the same name can start from it: `init: {connector.NAME.head: RUN}`.

    Args:
        width: of the joint space, a number or "llm".
        weights: hub id or folder of the CLIP model whose head initialises it; None = random.
    """

    def __init__(self, site: Site, *, width: int | str = "llm", weights: str | None = None) -> None:
        super().__init__(site)
        self.out_width, self.weights = site.width(width), weights
        self.head = ClipPatchHead(site.inputs[0].width, self.out_width)

    def load_weights(self) -> None:
        """Load the head of the model that `weights` names.

        Raises:
            UserError: it cannot be loaded, or has another head.
        """
        if self.weights is not None:
            load_head(self.head, self.weights, "clip_head.weights")

    def project(self, values: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, width]."""
        return self.head(values)


class SiglipPatchHead(nn.Module):
    """The value path of SigLIP's probe head, as if a patch got all of the probe's attention.

    Args:
        width: of the tokens, and of the space shared with the text tower.
        hidden: of the head's MLP.
        heads: of its attention.
        probe: also build the probe, for `attention`.
        reference: without the attention's output projection, as in the authors' code.
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
        """Patches [..., N, C] of a frame -> [..., heads, N] float32, each one's share of the probe's attention."""
        keys = self.key(self.norm(values)).unflatten(-1, (self.heads, -1))
        query = self.query(self.probe).unflatten(-1, (self.heads, -1))
        with without_autocast(values):
            logits = torch.einsum("...nhc,hc->...hn", keys.float(), query.float()) / math.sqrt(query.shape[-1])
        return logits.softmax(-1)

    def load_from(self, pair: nn.Module) -> None:
        """Copy the weights of a SigLIP model."""
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


def load_head(head: ClipPatchHead | SiglipPatchHead, name: str, where: str) -> Tensor:
    """Load the head of an image-text model into `head`; returns the logarithm of its scale [].

    Args:
        name: hub id or folder of the model.
        where: key path for errors.

    Raises:
        UserError: it cannot be loaded, or has another head.
    """
    from transformers import AutoModel

    try:
        pair = pretrained(AutoModel, name)
        head.load_from(pair)
        return pair.logit_scale.detach().reshape(())
    except OSError as error:
        raise UserError(name, "cannot fetch the weights", hint=f"hf download {name}") from error
    except (AttributeError, RuntimeError) as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{where}: {name}", f"has no such head: {why}") from error


def cosine(visual: Tensor, prompt: Tensor) -> Tensor:
    """Cosine of every token [B, N, J] with the prompt [B, J] of its row -> [B, N], in float32."""
    with without_autocast(visual):
        visual = nn.functional.normalize(visual.float(), dim=-1)
        return torch.einsum("bnj,bj->bn", visual, nn.functional.normalize(prompt.float(), dim=-1))
