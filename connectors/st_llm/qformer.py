"""A Q-Former before the LLM: learned queries read each frame with the instruction in mind (InstructBLIP, BLIP-2).

Sources: Dai et al. 2023, arXiv 2305.06500; Li et al. 2023, arXiv 2301.12597; as used by ST-LLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.library import check_attention, pretrained
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import register
from mmllm.contract.types import Grid, MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens


@register("connector", "qformer")
class QFormer(Part):
    """transformers' Q-Former on every frame of a clip, with the same prompt.

    Args:
        weights: hub id or folder of an InstructBLIP or BLIP-2 model whose Q-Former, queries and norm initialise it.
        config: of the Q-Former (hidden_size, num_hidden_layers, ...); what it lacks is the library's default.
        queries: tokens per frame.
        guided: whether it reads the prompt: its ids, from a text source of kind `ids` with BERT's tokenizer.
            InstructBLIP's does, BLIP-2's does not.
        cls_layer: the encoder's layer whose CLS tokens it reads before the patches; None = none.
        norm: a layer norm over what it reads, as both models have behind their tower.
    """

    def __init__(
        self,
        site: Site,
        *,
        weights: str | None = None,
        config: dict | None = None,
        queries: int = 32,
        guided: bool = True,
        cls_layer: int | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__(site)
        if queries < 1:
            raise ValueError(f"queries are 1 or more, not {queries}")
        self.weights, self.guided, self.cls_layer = weights, guided, cls_layer
        self.tower = _build({**(config or {}), "encoder_hidden_size": site.inputs[0].width}, guided)
        self.width = self.tower.config.hidden_size
        self.norm = nn.LayerNorm(site.inputs[0].width) if norm else nn.Identity()
        self.queries = nn.Parameter(torch.empty(queries, self.width))
        last = f"tower.encoder.layer.{self.tower.config.num_hidden_layers - 1}"
        self.idle = (f"{last}.intermediate.", f"{last}.output.")  # of the prompt's tokens, which are not passed on
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries as the library's models draw them."""
        from transformers import initialization as init

        init.normal_(self.queries, std=self.tower.config.initializer_range)

    def train(self, mode: bool = True) -> QFormer:
        """Training mode only where something of it trains: a frozen one has no dropout."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def needs(self) -> Needs:
        """The prompt's ids, and the CLS tokens."""
        cls = () if self.cls_layer is None else (self.cls_layer,)
        return Needs(cls=cls, prompt=("ids",) if self.guided else ())

    def output_spec(self, *inputs: TokenSpec) -> TokenSpec:
        """As many tokens per frame as there are queries, in no raster.

        Raises:
            ValueError: the input has no grid, so its frames cannot be told apart.
        """
        spec = inputs[0]
        if spec.grid is None:
            raise ValueError(f"reads the frames of a grid, got {spec}")
        return spec.to_grid(self._grid(spec.grid), self.width)

    def _grid(self, grid: Grid) -> Grid:
        return Grid(grid.t, 1, len(self.queries), raster=False)

    def forward(self, *inputs: VisualTokens, prompt: PromptFeatures | None = None) -> VisualTokens:
        """[B, T n, C] -> [B, T queries, width]; every query stands for an equal share of its frame."""
        tokens = inputs[0]
        frames = tokens.by_frame()
        if self.cls_layer is not None:
            frames = torch.cat([tokens.extras["cls"], frames], dim=2)
        read = self.norm(frames.flatten(0, 1))
        asked = self.queries.expand(len(read), -1, -1).to(read.dtype)
        given: dict[str, Tensor] = {"query_embeds": asked, "encoder_hidden_states": read}
        if self.guided:
            given |= self._instruction(prompt, asked, frames.shape[1])
        read = self.tower(**given).last_hidden_state
        values = read[:, : len(self.queries)]
        if self.training:  # so that every weight has a gradient, as training in several processes requires
            values = values + 0.0 * read.sum()
        values = values.unflatten(0, frames.shape[:2]).flatten(1, 2).to(tokens.values.dtype)
        grid, count = self._grid(tokens.grid), tokens.grid.h * tokens.grid.w
        positions = tokens.by_frame(tokens.positions).mean(2).repeat_interleave(grid.w, dim=1)
        sizes = (tokens.by_frame(tokens.sizes).sum(2) / grid.w).repeat_interleave(grid.w, dim=1)
        followed = None
        if tokens.sources is not None:  # all queries read a patch; the first of its frame stands for them
            first = torch.arange(grid.t, device=values.device).repeat_interleave(count) * grid.w
            followed = tokens.followed(first)
        return VisualTokens(values, tokens.media, grid, positions, sizes, tokens.times, sources=followed)

    def _instruction(self, prompt: PromptFeatures, asked: Tensor, frames: int) -> dict[str, Tensor]:
        """The prompt's ids, once per frame; an absent prompt is masked as a whole."""
        mask = prompt.mask if prompt.present is None else prompt.mask * prompt.present[:, None]
        ids, mask = (value.repeat_interleave(frames, dim=0) for value in (prompt.ids, mask))
        seen = torch.cat([mask.new_ones(asked.shape[:2]), mask], dim=1).bool()
        seen = seen[:, None, None].expand(-1, 1, seen.shape[1], -1)  # the library never inspects such a mask
        return {"input_ids": ids, "attention_mask": seen}

    def load_weights(self) -> None:
        """Load the Q-Former of the model that `weights` names.

        Raises:
            UserError: it cannot be loaded, or has another Q-Former.
        """
        if self.weights is None:
            return
        from transformers import AutoModel

        try:
            whole = pretrained(AutoModel, self.weights)
            self.tower.load_state_dict(whole.qformer.state_dict())
            self.queries.data.copy_(whole.query_tokens[0])
            if isinstance(self.norm, nn.LayerNorm):
                self.norm.load_state_dict(whole.vision_model.post_layernorm.state_dict())
        except OSError as error:
            raise UserError(self.weights, "cannot fetch the weights", hint=f"hf download {self.weights}") from error
        except (AttributeError, RuntimeError) as error:
            why = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"qformer.weights: {self.weights}", f"has no such Q-Former: {why}") from error

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[TokenSpec, ...]]]:
        """With the prompt and CLS tokens, and without either."""
        config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        clip = TokenSpec(MediaSpec("video", 3), 12, 6, Grid(3, 2, 2))
        yield {"config": {**config, "vocab_size": 9}, "queries": 3, "cls_layer": -1}, (clip,)
        yield {"config": config, "queries": 2, "guided": False, "norm": False}, (clip,)


def _build(config: dict[str, Any], guided: bool) -> nn.Module:
    """InstructBLIP's Q-Former, which reads a prompt, or BLIP-2's, which does not.

    Raises:
        ValueError: a value that the library does not accept.
    """
    from transformers import (
        Blip2QFormerConfig,
        Blip2QFormerModel,
        InstructBlipQFormerConfig,
        InstructBlipQFormerModel,
    )

    kinds = (InstructBlipQFormerConfig, InstructBlipQFormerModel), (Blip2QFormerConfig, Blip2QFormerModel)
    settings, model = kinds[0 if guided else 1]
    check_attention(config, "config")
    try:
        return model(settings(**config))
    except Exception as error:  # the library checks values its own way and raises many error types
        raise ValueError(f"config of a Q-Former: {' '.join(str(error).split())[:200]}") from error
