"""RoBERTa as a source of prompt features: BridgeTower's text tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmllm.contract.parts import Site
from mmllm.contract.registry import register
from mmllm.encoders.text.huggingface import SMALL, TransformersText, attend_to_all, pad

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


@register("text", "roberta_text")
class RobertaText(TransformersText):
    """RoBERTa's layers (Liu et al. 2019, arXiv 1907.11692), bidirectional, without a space shared with images.

    Each layer ends with its norm: a part that norms the tower's states again (`bridge`) needs `text_norm: false`.

    Args:
        name, config, tokenizer, length: as for `clip_text`.
    """

    model_type = "roberta"

    def __init__(
        self,
        site: Site,
        *,
        name: str | None = None,
        config: dict | None = None,
        tokenizer: str | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(site, name=name, config=config, tokenizer=tokenizer, length=length)

    def position_count(self) -> int:
        """Positions are counted from after the padding's own."""
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def build(self) -> nn.Module:
        """RoBERTa without its pooler."""
        from transformers import RobertaModel

        return RobertaModel(self.config, add_pooling_layer=False)

    def collate(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded to the longest; the tower derives positions from the padding id."""
        return pad(rows, self.config.pad_token_id, max([1, *map(len, rows)]))

    def run(self, ids: Tensor, mask: Tensor, **options: Any) -> ModelOutput:
        """Bidirectional attention over the real tokens."""
        return attend_to_all(self.tower, ids, mask, **options)

    def pooled(self, output: ModelOutput) -> None:
        """None: there is no joint space."""

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], tuple[list[int], ...]]]:
        """Rows of ids between a start and an end."""
        rows = ([0, 5, 6, 2], [0, 7, 2], [0, 8, 9, 10, 11, 2])
        config = {**SMALL, "vocab_size": 99, "max_position_embeddings": 14}
        yield {"config": config}, rows
        yield {"config": config, "length": 6}, rows
