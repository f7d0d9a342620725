"""From a rendered conversation to token ids: every placeholder expanded to the tokens of its medium."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from mmllm.contract.errors import UserError
from mmllm.contract.places import Located
from mmllm.model.front_end_plan import FrontEndPlan
from mmllm.processing.chat_template import Rendered
from mmllm.processing.collate import Example, Medium
from mmllm.processing.content import MediumEntry
from mmllm.processing.control_tokens import ControlTokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ReadEntry = Callable[[int, MediumEntry, bool], Medium]
"""(index of a medium in its conversation, its entry, whether to cut it into tiles) -> the medium, read."""


def share_of(seconds: float, times: Tensor) -> float:
    """A moment of a clip as a share of its time, which runs from the first frame that is seen to the last one."""
    first, last = float(times[0]), float(times[-1])
    return min(max((seconds - first) / (last - first), 0.0), 1.0) if last > first else 0.0


def seconds_of(share: float, times: Tensor) -> float:
    """The other way round."""
    first, last = float(times[0]), float(times[-1])
    return first + share * (last - first)


class Expander:
    """Tokenises conversations and gives each medium as many positions as it has tokens.

    Args:
        tokenizer: of the language model.
        controls: its control tokens.
        placeholder_ids: ids that stand for a medium.
        filler_id: id at the positions of a medium's tokens.
        plan: says how many they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        controls: ControlTokens,
        placeholder_ids: set[int],
        filler_id: int,
        plan: FrontEndPlan,
    ) -> None:
        self.tokenizer, self.controls, self.plan = tokenizer, controls, plan
        self.placeholder_ids, self.filler_id = placeholder_ids, filler_id

    def expand(
        self, rendered: Rendered, read: ReadEntry, answers: bool | Literal["last"] = False, name: str = ""
    ) -> Example:
        """Ids and spans of one conversation.

        Args:
            rendered: its text, its media and the extents of its answers.
            read: called for each medium, in order.
            answers: whether to make labels; "last" = of the last answer alone.
            name: of the conversation, for errors.

        Raises:
            UserError: placeholders and media do not go together.
        """
        typed = self.controls.spelled(rendered.text, rendered.typed)
        located = {start: (where, of) for start, where, of in rendered.located}
        if located and self.plan.vocabulary is None:
            what = "this model has no words for places and moments"
            raise UserError(name or "content entry", what, hint="model.vocabulary: {type: coordinates}")
        placed = answers or bool(typed or located)
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=placed)
        offsets = encoded["offset_mapping"] if placed else None
        example = Example([], [] if answers else None, name=name)
        extents = rendered.answers[-1:] if answers == "last" else rendered.answers
        for position, token in enumerate(encoded["input_ids"]):
            if token in self.placeholder_ids:
                self._append_medium(example, rendered, read)
                continue
            if located and offsets[position][0] in located:
                token = self._locate(example, rendered, *located.pop(offsets[position][0]))
            ids = self.controls.ids_of(token, rendered.text, offsets[position], typed) if typed else [token]
            example.ids += ids
            if answers:
                # Overlap, not inclusion: many tokenizers join a word with the space before it.
                first, last = offsets[position]
                learnt = any(last > start and first < end for start, end in extents)
                example.labels += ids if learnt else [-100] * len(ids)
        if len(example.media) != len(rendered.media) or located:
            raise UserError(name or "text", "a placeholder was lost in tokenisation")
        if self.plan.first:
            self._put_first(example)
        return example

    def visual_tokens(self, example: Example) -> int:
        """How many of its positions hold visual tokens."""
        return sum(self._length(example.media[index], stream) for _, index, stream in example.spans)

    def _put_first(self, example: Example) -> None:
        """Put the streams meant for the start of the sequence there, after BOS, wherever their medium is."""
        start = int(bool(example.ids) and example.ids[0] == self.tokenizer.bos_token_id)
        plan, at = self.plan, start
        first: list[tuple[int, int, int]] = []
        for index, medium in enumerate(example.media):
            for stream, node in enumerate(plan.output[medium.spec.kind]):
                if node in plan.first:
                    first.append((at, index, stream))
                    at += self._length(medium, stream)
        example.ids[start:start] = [self.filler_id] * (at - start)
        if example.labels is not None:
            example.labels[start:start] = [-100] * (at - start)
        example.spans = [*first, *((position + at - start, index, stream) for position, index, stream in example.spans)]
        example.coordinates = [(position + at - start, *rest) for position, *rest in example.coordinates]

    def _locate(self, example: Example, rendered: Rendered, where: Located, of: MediumEntry | None) -> int:
        """The token nearest to a coordinate, whose exact place is noted.

        Raises:
            UserError: a moment of no clip, or of one that comes later.
        """
        layout, share = self.plan.vocabulary, where.value
        if where.seconds:
            index = next((number for number, medium in enumerate(rendered.media) if medium is of), len(rendered.media))
            if index >= len(example.media):
                raise UserError(example.name or "time entry", "a moment of a clip that does not come before it")
            share = share_of(where.value, example.media[index].times)
        low, high, ratio = layout.rows(where.axis, share)
        example.coordinates.append((len(example.ids), layout.first + low, layout.first + high, ratio))
        return layout.first + layout.nearest(where.axis, share)

    def _append_medium(self, example: Example, rendered: Rendered, read: ReadEntry) -> None:
        index = len(example.media)
        if index >= len(rendered.media):
            raise UserError(example.name or "text", "more placeholders than media")
        # one image alone is worth its details; with others, each is one view (LLaVA-OneVision)
        medium = read(index, rendered.media[index], len(rendered.media) == 1)
        for stream, node in enumerate(self.plan.output[medium.spec.kind]):
            if node in self.plan.first:
                continue  # put in once everything is known
            example.spans.append((len(example.ids), len(example.media), stream))
            example.ids += [self.filler_id] * self._length(medium, stream)
        if example.labels is not None:
            example.labels += [-100] * (len(example.ids) - len(example.labels))
        example.media.append(medium)

    def _length(self, medium: Medium, stream: int) -> int:
        return self.plan.streams(medium.spec)[stream].tokens
