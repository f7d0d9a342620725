"""How much of the record's own answer is in an answer: a rule, for data with known truth."""

from __future__ import annotations

import re
from collections import Counter

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.contract.scorer import Scorer
from mmllm.data.records.conversations import Sample


@register("scorer", "words")
class WordScorer(Scorer):
    """F1 of the answer's words and those of the record's own answer, 0..1."""

    def score(self, sample: Sample, answer: str) -> float:
        """See `Scorer`; the record's own answer is its field `answer`, or `chosen`.

        Raises:
            UserError: the record has none.
        """
        truth = sample.fields.get("answer", sample.fields.get("chosen"))
        if not isinstance(truth, str):
            what = "no answer of its own to compare with"
            raise UserError(f"sample {sample.id}", what, expected="a conversation with an answer")
        given, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, truth))
        common = sum((given & wanted).values())
        return 2 * common / max(1, sum(given.values()) + sum(wanted.values()))
