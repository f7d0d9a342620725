"""A small text tower that learns NanoWorld's language from scratch in minutes, beside the nano encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.encoders.text.huggingface import TransformersText, attend_to_all, pad

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


@register("text", "nano_text")
class NanoText(TransformersText):
    """A few layers of BERT with random weights; the pooled feature is the projected mean over the words.

    Args:
        tokenizer: hub id or folder; "llm" = that of the LLM.
        width, depth, heads: of the tower.
        joint: width of the space shared with an image tower; None = no such space.
        length: most tokens of a prompt that are read; all questions of a NanoWorld conversation take up to 150.
        vocabulary: rows of the embedding table, at least as many as the tokenizer has entries.
    """

    model_type = "bert"

    def __init__(
        self,
        site: Site,
        *,
        tokenizer: str = "llm",
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
        joint: int | None = None,
        length: int = 192,
        vocabulary: int = 1000,
    ) -> None:
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        if length < 3:
            raise ValueError(f"length {length}: leaves no room for a token between the start and the end")
        config = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "max_position_embeddings": length,
            "initializer_range": width**-0.5,  # with the library's 0.02 attention stays flat for hundreds of steps
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        super().__init__(site, config=config, tokenizer=tokenizer)
        self.joint = joint
        self.project = None if joint is None else nn.Linear(width, joint)

    def build(self) -> nn.Module:
        """BERT without its pooler."""
        from transformers import BertModel

        return BertModel(self.config, add_pooling_layer=False)

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt between a start and an end token (the tokenizer's own; two ends where it has no start).

        Raises:
            UserError: the tokenizer has more entries than the tower.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.length - 2]
        end = self.tokenizer.eos_token_id
        start = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        rows = self.config.vocab_size
        if max(start, *ids, end) >= rows:
            needed = len(self.tokenizer)
            raise UserError("text nano_text: vocabulary", "smaller than the tokenizer", expected=needed, got=rows)
        return [start, *ids, end]

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the longest."""
        return pad(rows, 0, max([1, *map(len, rows)]))

    def run(self, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
        """Bidirectional attention over the real tokens."""
        output = attend_to_all(self.tower, ids, mask, **options)
        real = mask[..., None].to(output.last_hidden_state.dtype)
        output.pooler_output = (output.last_hidden_state * real).sum(1) / real.sum(1)
        return output

    def pooled(self, output: ModelOutput) -> Tensor | None:
        """[B, J], not normalised; None without a joint space."""
        return None if self.project is None else self.project(output.pooler_output)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """With a joint space and without."""
        small = {"width": 16, "length": 12, "vocabulary": 40}
        rows = ([1, 7, 8, 5], [1, 9, 5], [1, 10, 11, 12, 13, 5])
        yield {**small, "joint": 24}, rows
        yield {**small, "depth": 1}, rows
