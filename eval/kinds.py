"""Kinds of items: how each is asked, how long its answer may be, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mmllm.contract.grounding import Box, Coordinates, TimeSpan
from mmllm.eval import grounding
from mmllm.eval.grounding_scores import by_frame, span_iou, tube_iou
from mmllm.eval.items import Item, defect_of_choice, gold_missing
from mmllm.eval.parsing import parsers
from mmllm.processing.grounding import read

Layout = Coordinates | None


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth.

    Attributes:
        score: 0 to 1.
        parsed: whether it says anything that can be scored; if not, it counts as 0.
        letter: the chosen option's.
        measures: other numbers in 0..1 about it, by name.
    """

    score: float
    parsed: bool
    letter: str | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What is particular to a kind of items.

    Attributes:
        judge: (parser, response, item, the model's coordinates) -> verdict; None = it takes a judge, not a rule.
        defect: why an item cannot be scored, or None.
        plain: whether the question alone is asked, instead of the protocol's prompt.
        max_new_tokens: longest answer; None = the protocol's.
        sampler: how its clips are sampled; None = as the protocol says.
    """

    judge: Callable[[str, str, Item, Layout], Verdict] | None
    defect: Callable[[Item], str | None]
    plain: bool = False
    max_new_tokens: int | None = None
    sampler: str | None = None


def judge_choice(parser: str, response: str, item: Item, layout: Layout) -> Verdict:
    """1 for the right option."""
    letter = parsers[parser](response, list(item.options))
    return Verdict(float(item.is_right(letter)), letter is not None, letter)


def judge_grounding(parser: str, response: str, item: Item, layout: Layout) -> Verdict:
    """The overlap of what an answer says with the truth; of several places the first one counts."""
    found = read(response, layout or Coordinates())
    if isinstance(item.truth, TimeSpan):
        spans = found.spans or ([found.tube.span] if found.tube.boxes else [])
        score = span_iou(spans[0], item.truth) if spans else 0.0
        return Verdict(score, bool(spans), measures={"tIoU": score})
    if isinstance(item.truth, Box):
        boxes = found.boxes or [box for _, box in found.tube.boxes]
        return Verdict(boxes[0].iou(item.truth) if boxes else 0.0, bool(boxes))
    truth, own = by_frame(item.truth, item.frames), by_frame(found.tube, item.frames)
    inner, whole = tube_iou(own, truth)
    time = span_iou(found.tube.span, item.truth.span) if found.tube.boxes else 0.0
    return Verdict(whole, bool(found.tube.boxes), measures={"tIoU": time, "sIoU": inner, "vIoU": whole})


KINDS = {
    "choice": Kind(judge_choice, defect_of_choice),
    "open": Kind(None, lambda item: None),
    "grounding": Kind(
        judge_grounding, gold_missing, plain=True, max_new_tokens=grounding.MAX_NEW_TOKENS, sampler=grounding.SAMPLER
    ),
}
