"""Distilling a large model into a small one that reads the same tokens.

Source: LLaVA-KD (Cai et al. 2024, arXiv 2410.16236): distributions of the response and of the visual tokens, and the
relations among the visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.objective import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term
from mmllm.data.records.alignment_levels import level_of
from mmllm.data.records.conversations import Sample
from mmllm.model.head import log_probs
from mmllm.processing.collate import Example, Medium
from mmllm.processing.content import MediumEntry
from mmllm.processing.expansion import ReadEntry
from mmllm.train.machine import join
from mmllm.train.objectives.divergences import DIVERGENCES, SKEWS, gram_distance
from mmllm.train.teacher import load_teacher, shared_vocabulary, teacher_processor

if TYPE_CHECKING:
    from mmllm.model.head import Head
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor
    from mmllm.train.context import StageContext


@register("objective", "distillation")
class Distillation(Objective):
    """Cross-entropy of the answers, and how far the student is from its teacher at the tokens that both read.

    Args:
        teacher: run folder or model folder of the teacher.
        language_modeling: weight of the answers' cross-entropy.
        response: weight of the divergence where an answer's token is predicted.
        visual: weight of the divergence at the visual tokens themselves.
        relation: weight of 1 - cosine between the self-correlations of both models' logits at the visual tokens.
        divergence: forward = KL(teacher || student); reverse, skew_forward, skew_reverse, js or tv.
        skew: of the last four; default: the authors'.
        relation_over: one cosine per "sample", or one for all samples of a micro-"batch" as the authors have it.
        relation_center: subtract each model's mean over the visual tokens first, which hides the relations otherwise.
    """

    def __init__(
        self,
        *,
        teacher: str,
        language_modeling: float = 1.0,
        response: float = 1.0,
        visual: float = 1.0,
        relation: float = 0.5,
        divergence: Literal["forward", "reverse", "skew_forward", "skew_reverse", "js", "tv"] = "forward",
        skew: float | None = None,
        relation_over: Literal["sample", "batch"] = "sample",
        relation_center: bool = False,
    ) -> None:
        super().__init__()
        self.weights = {"language_modeling": language_modeling, "response": response, "visual": visual}
        self.weights["relation"] = relation
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"objective distillation: {name}", "must be 0 or more", got=weight)
        self.teacher, self.divergence = teacher, divergence
        self.skew = SKEWS.get(divergence, 0.0) if skew is None else skew
        if not 0 <= self.skew < 1:
            raise UserError("objective distillation: skew", "must be at least 0 and below 1", got=skew)
        self.relation_over, self.relation_center = relation_over, relation_center
        self.vocabulary: int | None = None
        self._teacher: tuple[MMLLMForConditionalGeneration, ...] = ()
        self._grams: dict[int, Tensor] = {}

    @property
    def looks(self) -> bool:
        """Whether the visual tokens are compared."""
        return bool(self.weights["visual"] or self.weights["relation"])

    def locate(self, path: Callable[[str], str]) -> None:
        """The teacher's folder, which may stand below a root."""
        self.teacher = path(self.teacher)

    def prepare(self, samples: list[Sample], processor: MMLLMProcessor) -> Batch:
        """Conversations -> the student's batch and, as `teacher`, the teacher's; each clip is decoded once.

        Raises:
            UserError: a sample has no answer, or the models read other tokens.
        """
        teacher = teacher_processor(self.teacher)
        self._check(teacher, processor)
        pairs = [self._encode(sample, processor, teacher) for sample in samples]
        batch = processor.collate([student for student, _ in pairs], padding_side="right")
        theirs = teacher.collate([example for _, example in pairs], padding_side="right")
        seen = [processor.visual_tokens(student) if self.looks else 0 for student, _ in pairs]
        return {**batch, "names": [sample.id for sample in samples], "teacher": dict(theirs), "seen": seen}

    def _check(self, teacher: MMLLMProcessor, student: MMLLMProcessor) -> None:
        """Once per process: what the teacher's and the student's processors have to have in common."""
        if self.vocabulary is None:
            self.vocabulary = shared_vocabulary(teacher.tokenizer, student.tokenizer)
            if teacher.plan.tiling != student.plan.tiling:
                raise UserError("objective distillation: teacher", "cuts images into other tiles than the student")

    def _encode(self, sample: Sample, ours: MMLLMProcessor, theirs: MMLLMProcessor) -> tuple[Example, Example]:
        wanted = {"student": set(ours.plan.geometries.values()), "teacher": set(theirs.plan.geometries.values())}
        read = ours.reader(beside=sorted(wanted["teacher"], key=repr))  # the student's own may come from a cache

        def view(whose: str) -> ReadEntry:
            """The medium with the pixels of one of them; what is cached of the student's encoders is the student's."""

            def own(index: int, entry: MediumEntry, tiled: bool) -> Medium:
                medium = read(index, entry, tiled)
                pixels = {geometry: value for geometry, value in medium.pixels.items() if geometry in wanted[whose]}
                return replace(medium, pixels=pixels, **({} if whose == "student" else {"features": {}, "keys": {}}))

            return own

        name, level = sample.id, level_of(sample)
        student = ours.encode(sample.messages, name=name, alignment_level=level, read=view("student"))
        teacher = theirs.encode(sample.messages, name=name, read=view("teacher"))
        self._compare(name, (student, ours), (teacher, theirs))
        return student, teacher

    def _compare(self, name: str, *sides: tuple[Example, MMLLMProcessor]) -> None:
        answers = [[label for label in example.labels if label != -100] for example, _ in sides]
        if not answers[0]:
            raise UserError(f"sample {name}", "has no assistant's turn to learn")
        if answers[0] != answers[1]:
            what = "student and teacher read its answers differently"
            raise UserError(f"sample {name}", what, hint="a teacher with the student's chat template")
        seen = [processor.visual_tokens(example) for example, processor in sides]
        if self.looks and seen[0] != seen[1]:
            hint = "objective.visual=0 and objective.relation=0 of the stage"
            raise UserError(f"sample {name}: visual tokens", f"student {seen[0]}, teacher {seen[1]}", hint=hint)

    def bind(self, context: StageContext) -> None:
        """Load the teacher.

        Raises:
            UserError: no model there, another vocabulary, or a student with tables of coordinates.
        """
        if context.processor.plan.vocabulary is not None:
            what = "a student with tables of coordinates has words that no teacher scores"
            raise UserError(
                context.where("objective"), what, hint="distil without them, and add model.vocabulary later"
            )
        self._check(teacher_processor(self.teacher), context.processor)
        teacher = load_teacher(self.teacher, context)
        widths = teacher.lm_head.out_features, context.model.lm_head.out_features
        shared, self.vocabulary = self.vocabulary, min(self.vocabulary, *widths)
        if context.run is not None and join(context.options).is_main_process:
            said = f"vocabulary: {shared} ids equal; logits {widths[0]}, {widths[1]} wide: padding rows left out"
            context.run.log_event(context.name, said)
        self._teacher = (teacher,)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens of the answers, visual tokens, and the samples that have some (or 1, where there is one cosine)."""
        scored = int((batch["labels"][:, 1:] != -100).sum())
        relations = sum(count > 0 for count in batch["seen"])
        relations = min(relations, 1) if self.relation_over == "batch" else relations
        return {"language_modeling": scored, "response": scored, "visual": sum(batch["seen"]), "relation": relations}

    def forward(self, model: MMLLMForConditionalGeneration, batch: Batch) -> dict[str, Term]:
        """Summed terms."""
        (teacher,) = self._teacher
        ours, targets = _rows(model, batch, self.looks)
        with torch.no_grad():
            theirs, _ = _rows(teacher, batch["teacher"], self.looks)
        sums = self.score(model.lm_head, ours, teacher.lm_head, theirs, targets, batch)
        sums["relation"] = self.relate(
            model.lm_head, ours[len(targets) :], teacher.lm_head, theirs[len(targets) :], batch
        )
        counts = self.counts(batch)
        return {name: Term(value, counts[name], self.weights[name]) for name, value in sums.items()}

    def score(
        self, head: Head, rows: Tensor, teacher_head: Head, teacher_rows: Tensor, targets: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """{term: sum} of cross-entropy, response and visual divergence.

        Args:
            head: of the student.
            rows: [M, D], hidden states before each of the answers' tokens, then those at the visual tokens.
            teacher_head: of the teacher.
            teacher_rows: [M, D'] at the same positions.
            targets: [N], the answers' tokens.
            batch: for the counts.
        """
        compared = self.vocabulary or min(head.out_features, teacher_head.out_features)

        def score(logits: Tensor, which: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                theirs = teacher_head(teacher_rows[which])[:, :compared].to(logits.dtype)
            apart = DIVERGENCES[self.divergence](logits[:, :compared], theirs, self.skew)
            own = targets[which]
            return {
                "language_modeling": -log_probs(logits[: len(own)], own).sum(),
                "response": apart[: len(own)].sum(),
                "visual": apart[len(own) :].sum(),
            }

        weights = {name: weight for name, weight in self.weights.items() if name != "relation"}
        return head(rows, score, scales=self.scales(batch, weights))

    def relate(self, head: Head, rows: Tensor, teacher_head: Head, teacher_rows: Tensor, batch: Batch) -> Tensor:
        """The relation term, summed over samples; 0 where it is off or nothing is seen."""
        seen = [count for count in batch["seen"] if count]
        if not self.weights["relation"] or not seen:
            return 0.0 * rows.sum()
        with torch.autocast(rows.device.type, enabled=False):
            grams = self._gram(0, head), self._gram(1, teacher_head)
            pairs = list(zip(rows.split(seen), teacher_rows.split(seen), strict=True))
            groups = [pairs] if self.relation_over == "batch" else [[pair] for pair in pairs]
            found = [gram_distance(*zip(*group, strict=True), grams, self.relation_center) for group in groups]
        return torch.stack(found).sum()

    def _gram(self, index: int, head: Head) -> Tensor:
        """The head's Gram matrix; computed once for one that does not learn."""
        if head.weight.requires_grad and torch.is_grad_enabled():
            return head()
        if index not in self._grams:
            with torch.no_grad():
                self._grams[index] = head()
        return self._grams[index]


def _rows(model: MMLLMForConditionalGeneration, batch: Batch, looks: bool) -> tuple[Tensor, Tensor]:
    """Hidden states before each scored token and, if it `looks`, at each visual token; the scored tokens [N]."""
    inputs, wanted = model.embed(batch), batch["labels"][:, 1:]
    (hidden, kept), scored = model.run(inputs), wanted != -100
    if looks and kept is not None:
        raise UserError("objective distillation", "compares visual tokens, and a reducer dropped some", hint="visual=0")
    rows = [hidden[:, :-1][scored], *([hidden[inputs.visual]] if looks else [])]
    return torch.cat(rows), wanted[scored]
