"""The model: front end, splice, a stock causal LM of transformers, our head over its hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmllm.contract.batch import Batch, VisualInputs
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Part
from mmllm.contract.types import LLMInputs, Needs, VisualTokens
from mmllm.model.branches import branch_mask, split, takes_masks
from mmllm.model.config import MMLLMConfig
from mmllm.model.front_end import FrontEnd
from mmllm.model.generating import MediaGenerationMixin
from mmllm.model.head import Head
from mmllm.model.reduction.llm import Reduction
from mmllm.model.reduction.pixels import small_visual, spread
from mmllm.model.splice import spans_of, spliced
from mmllm.model.vocabulary import CoordinateTables, placed, tables_of
from mmllm.processing.collate import move

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    from mmllm.contract.objective import Objective

# What the LLM returns besides its hidden states; the library renamed past_key_values to cache after 5.23.
BESIDE = ("cache", "past_key_values", "hidden_states", "attentions")

# Settings of heads that do more than multiply: our head would silently drop them.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class MMLLMPreTrainedModel(PreTrainedModel):
    """What the two classes share with the library: flags, and how a part initialises its own weights."""

    config_class = MMLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    input_modalities = ("image", "video", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: loading initialises through `transformers.initialization`, which leaves loaded tensors unchanged.

        For custom code the library skips every module without a raw tensor of its own, and therefore a part whose
        children need more than the library's own initialisation.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Part | CoordinateTables):
            module.reset_parameters()


class MMLLMModel(MMLLMPreTrainedModel):
    """Front end and the LLM's body.

    Attributes:
        reduction: the reducer at work, a load-time setting; see `reduce`.
        vocabulary: the tables of its coordinates, or None.
    """

    def __init__(self, config: MMLLMConfig) -> None:
        super().__init__(config)
        # The LLM first: its random weights then depend on the seed alone, not on the front end.
        self.language_model = AutoModel.from_config(config.text_config)
        self.reduction: Reduction | None = None
        self.vocabulary = tables_of(config)
        self.front_end = FrontEnd(config.model_section, config.text_config.hidden_size)
        if self.vocabulary is not None:
            self.front_end.use(self.vocabulary)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's embedding."""
        self.language_model.set_input_embeddings(value)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        visual: VisualInputs | None = None,
    ) -> LLMInputs:
        """Ids [B, L] and media -> embeddings [B, L, D], visual rows written at their spans.

        Raises:
            UserError: a span does not fit into its row.
        """
        table = self.get_input_embeddings()
        if visual is None:
            visual = {"media": [], "pairs": [], "spans": input_ids.new_zeros(0, 4)}
        visual = move(visual, input_ids.device)
        blank = self.front_end.blanks(visual) if self.is_distributed_training() else ()
        where = torch.zeros_like(input_ids, dtype=torch.bool)
        if not blank and not visual["media"]:
            return LLMInputs(self._words(input_ids, visual), attention_mask, position_ids, where)
        streams = self._streams(visual, table)
        rows, blanks = self.front_end.joined(streams, blank, table)
        real, blank_rows = rows.split([len(rows) - blanks, blanks])
        source, target = spliced(visual, self.front_end.plan, input_ids.shape, input_ids.device)
        where.view(-1)[target] = True
        embeds = self._words(input_ids.masked_fill(where, 0), visual)
        flat = embeds.flatten(0, 1).index_copy(0, target, real[source].to(embeds.dtype))
        if blanks:  # they touch the same parameters as real ones do in other processes, and change nothing
            flat = flat + 0.0 * blank_rows.sum().to(embeds.dtype)
        inputs = LLMInputs(flat.view_as(embeds), attention_mask, position_ids, where)
        return inputs if self.reduction is None else replace(inputs, spans=spans_of(visual, streams))

    def _words(self, input_ids: Tensor, visual: VisualInputs) -> Tensor:
        """Embeddings [B, L, D] of the text, coordinates among it."""
        table = self.get_input_embeddings()
        if self.vocabulary is None:
            return table(input_ids)
        tables = self.vocabulary()
        embeds = table(input_ids.masked_fill(self.vocabulary.rows_of(input_ids) >= 0, 0))
        if self.is_distributed_training():  # every process uses them, whatever its batch holds
            embeds = embeds + 0.0 * tables.inputs.sum().to(embeds.dtype)
        return placed(embeds, input_ids, tables, visual.get("coordinates"))

    def _streams(self, visual: VisualInputs, table: nn.Module) -> list[list[VisualTokens]]:
        """What the front end makes of the media, as the reducer wants it."""
        if self.reduction is None:
            return self.front_end.streams(visual, table)
        reducer = self.reduction.reducer
        if reducer.shrink is None:
            return self.front_end.streams(visual, table, cls_attention=reducer.cls_attention)
        bank = self.reduction.bank
        streams = self.front_end.streams(small_visual(visual, self.front_end.bank, bank), table, bank=bank)
        return spread(streams, visual, self.front_end.plan)

    def is_distributed_training(self) -> bool:
        """Whether several processes train together, so that each must use every parameter."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.training and torch.is_grad_enabled() and distributed and torch.distributed.get_world_size() > 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual: VisualInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """The LLM's output over ids [B, L] with media, or over embeddings [B, L, D]."""
        if inputs_embeds is None:
            sequence = self.embed(input_ids, attention_mask, position_ids, visual)
        else:
            sequence = LLMInputs(inputs_embeds, attention_mask, position_ids, torch.zeros_like(inputs_embeds[..., 0]))
        return self.run(sequence, **kwargs)

    def run(self, sequence: LLMInputs, **kwargs: Any) -> BaseModelOutputWithPast:
        """The LLM's body over a sequence; `last_hidden_state` [B, L, D] and whatever else the library returns."""
        if sequence.segments is not None:
            return self._run_branches(sequence, **kwargs)
        if self.reduction is not None:
            return self.reduction(self.language_model, sequence, **kwargs)
        return self.language_model(
            inputs_embeds=sequence.embeds,
            attention_mask=sequence.mask,
            position_ids=sequence.positions,
            **kwargs,
        )

    def reduce(self, section: dict[str, Any] | None) -> None:
        """Let the LLM read fewer visual tokens, by the reducer `{type: ..., arguments}`; None = all of them.

        Raises:
            UserError: see `Reduction`.
        """
        if section is not None:  # one that cannot be switched on leaves the other as it is
            self.reduction = Reduction(self.language_model, section, self.front_end.plan)
        elif self.reduction is not None:
            self.reduction.remove()
            self.reduction = None

    def _run_branches(self, sequence: LLMInputs, **kwargs: Any) -> BaseModelOutputWithPast:
        """Branches of a shared prefix; `last_hidden_state` at their positions in the sequence, padding unspecified."""
        config = self.language_model.config
        if takes_masks(config) and self.reduction is None:
            mask = branch_mask(sequence.segments, config, sequence.embeds.dtype)
            return self.run(replace(sequence, mask=mask, segments=None), **kwargs)
        rows, where = split(sequence)
        output = self.run(rows, **kwargs)
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[where]
        return output


class MMLLMForConditionalGeneration(MMLLMPreTrainedModel, MediaGenerationMixin):
    """Front end + LLM + head; generates, saves and loads like any model of transformers."""

    def __init__(self, config: MMLLMConfig) -> None:
        super().__init__(config)
        text = config.text_config
        for name in SCALED_LOGITS:
            if getattr(text, name, None) not in (None, 1.0):
                raise UserError(text.model_type, f"its head uses {name}, ours does not", hint="another LLM")
        self.model = MMLLMModel(config)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.lm_head = Head(text.hidden_size, text.vocab_size)
        if self.model.vocabulary is not None:
            self.lm_head.use(self.model.vocabulary)
        self.post_init()

    @property
    def reduction(self) -> Reduction | None:
        """The reducer at work."""
        return self.model.reduction

    def embed(self, batch: Batch) -> LLMInputs:
        """The sequence of a batch."""
        keys = ("input_ids", "attention_mask", "position_ids", "visual")
        inputs = self.model.embed(**{key: batch[key] for key in keys if key in batch})
        return replace(inputs, segments=batch.get("segments"))

    def run(self, sequence: LLMInputs) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, L, D] of a whole sequence, without a cache; and which positions a reducer kept [B, L].

        The second is None where all were kept; the others hold zeros.
        """
        hidden = self.model.run(sequence, use_cache=False).last_hidden_state
        reduced = None if self.reduction is None else self.reduction.last
        return hidden, None if reduced is None else reduced.kept

    def pooled_images(self, batch: Batch) -> Tensor:
        """The mean of each pair's visual rows, [pairs, D]."""
        front, visual = self.model.front_end, move(batch["visual"], self.device)
        blank = front.blanks(visual) if self.model.is_distributed_training() else ()
        rows, blanks = front(visual, blank, self.model.get_input_embeddings())
        rows, rest = rows.split([len(rows) - blanks, blanks])
        specs = [visual["media"][clip]["spec"] for clip, _ in visual["pairs"]]
        counts = [sum(stream.tokens for stream in front.plan.streams(spec)) for spec in specs]
        pooled = torch.stack([part.mean(0) for part in rows.split(counts)])
        return pooled + 0.0 * rest.sum().to(pooled.dtype) if blanks else pooled

    def pooled_texts(self, batch: Batch, source: str | None = None) -> Tensor:
        """The pooled feature of each text, [B, J]; ids and mask are those of the text source (default: the first)."""
        prompts = self.model.front_end.prompts
        name = source or next(iter(prompts.sources))
        asked = {name: {"ids": batch["input_ids"], "mask": batch["attention_mask"]}}
        return prompts(asked, {name: Needs(prompt=("pooled",))}, self.model.get_input_embeddings())[name].pooled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        visual: VisualInputs | None = None,
        objective: Objective | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, L, V]; with `labels` also their mean loss; with an `objective` its terms instead.

        Args:
            visual: media, pairs and spans of the batch, as made by the processor; only with whole prompts.
            objective: runs inside this call, so that gradients are synchronised and shards gathered.
            logits_to_keep: number of last positions that need logits (0 = all).
        """
        if objective is not None:
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "visual": visual}
            if position_ids is not None:
                batch["position_ids"] = position_ids
            return objective(self, {**batch, **kwargs})
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, visual, **kwargs)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        beside = {key: value for key, value in outputs.items() if key in BESIDE}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **beside)


AutoModel.register(MMLLMConfig, MMLLMModel)
AutoModelForImageTextToText.register(MMLLMConfig, MMLLMForConditionalGeneration)
