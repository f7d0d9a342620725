"""Learning from pairs of answers, one better than the other: DPO and its relatives.

Sources of the losses: `preference_losses`. Order of the work (a clip encoded once per pair, the shared prompt computed
once, only the answers scored): ours; PPLLaVA's own stage encodes each clip four times.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.batch import Batch
from mmllm.contract.errors import UserError
from mmllm.contract.objective import Objective
from mmllm.contract.registry import register
from mmllm.contract.types import Term
from mmllm.data.records.conversations import Sample
from mmllm.model.head import log_probs
from mmllm.processing.collate import Example
from mmllm.train.objectives.preference_losses import FREE, LOSSES, Pairs, Settings
from mmllm.train.reference import AdapterOff, FrozenCopy, Reference, StoredReference

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor
    from mmllm.train.context import StageContext

REFERENCES: dict[str, type[Reference]] = {"stored": StoredReference, "copy": FrozenCopy, "adapter": AdapterOff}


@register("objective", "preference")
class Preference(Objective):
    """Pairs of a chosen and a rejected answer to the same conversation; only the answers are scored.

    A sample is a conversation that ends with the user's turn, with the fields `chosen` and `rejected`.

    Args:
        loss: sigmoid (DPO), robust, sigmoid_norm, hinge (RSO's, and SLiC's without a reference), ipo, ipo_sum, simpo or
            orpo.
        beta: how sharply a margin counts.
        label_smoothing: share of pairs whose labels are taken to be swapped.
        gamma: SimPO's target margin.
        weight: of the loss over pairs.
        sft: weight of the chosen answers' cross-entropy beside it.
        reference: whose log-probabilities margins are measured against: "stored" (computed once before training and
            kept in the run folder), "copy" (a frozen copy of the starting model), "adapter" (the model with its
            adapter switched off) or "none".
    """

    def __init__(
        self,
        *,
        loss: Literal["sigmoid", "robust", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "simpo", "orpo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        weight: float = 1.0,
        sft: float = 0.0,
        reference: Literal["stored", "copy", "adapter", "none"] = "stored",
    ) -> None:
        super().__init__()
        where = "objective preference"
        if beta <= 0:
            raise UserError(f"{where}: beta", "must be above 0", got=beta)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"{where}: label_smoothing", "must be at least 0 and below 0.5", got=label_smoothing)
        self.loss, self.settings = loss, Settings(beta, label_smoothing, gamma)
        self.weights = {"preference": weight, "sft": sft}
        self.reference_kind = "none" if loss in FREE else reference
        self._reference: tuple[Reference, ...] = ()

    def prepare(self, samples: list[Sample], processor: MMLLMProcessor) -> Batch:
        """Pairs -> one row each: the conversation, then both answers as branches of it.

        Raises:
            UserError: a sample without both answers, or whose answers are equal or not scored.
        """
        pairs = [encode_pair(sample, processor) for sample in samples]
        batch = processor.collate([pair.example for pair in pairs], padding_side="right")
        length = batch["input_ids"].shape[1]
        positions, segments = torch.zeros_like(batch["input_ids"]), torch.full_like(batch["input_ids"], -1)
        for row, pair in enumerate(pairs):
            positions[row, : len(pair.positions)] = torch.tensor(pair.positions)
            segments[row, : len(pair.segments)] = torch.tensor(pair.segments)
        sources = [row * length + source for row, pair in enumerate(pairs) for source in pair.sources]
        return {
            **batch,
            "position_ids": positions,
            "segments": segments,
            "sources": torch.tensor(sources),
            "targets": torch.tensor([target for pair in pairs for target in pair.targets]),
            "lengths": [length for pair in pairs for length in pair.lengths],
            "keys": [pair.key for pair in pairs],
            "names": [sample.id for sample in samples],
        }

    def bind(self, context: StageContext) -> None:
        """Make or find what the reference says.

        Raises:
            UserError: `reference: adapter` without an adapter that trains alone.
        """
        if self.reference_kind != "none":
            self._reference = (REFERENCES[self.reference_kind](context, self),)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pairs, and tokens of the chosen answers."""
        pairs = len(batch["lengths"]) // 2
        counts = {"preference": pairs, "sft": sum(batch["lengths"][::2])}
        return counts | dict.fromkeys(("margin", "chosen_wins", "likelier", "chosen_reward", "rejected_reward"), pairs)

    def forward(self, model: MMLLMForConditionalGeneration, batch: Batch) -> dict[str, Term]:
        """Summed losses and statistics of the pairs."""
        model.model.front_end.eval()  # stochastic depth on one side alone would be a preference of its own
        hidden, _ = model.run(model.embed(batch))
        reference = self._reference[0].log_probs(model, batch) if self._reference else None
        rows = hidden.flatten(0, 1)[batch["sources"]]
        sums = self.score(model.lm_head, rows, batch, reference)
        counts = self.counts(batch)
        return {name: Term(value, counts[name], self.weights.get(name, 0.0)) for name, value in sums.items()}

    def score(self, head: nn.Module, rows: Tensor, batch: Batch, reference: Tensor | None = None) -> dict[str, Tensor]:
        """{term: sum over pairs} from the hidden states before each answer's tokens.

        Args:
            head: gives logits of rows, as `mmllm.model.head.Head`.
            rows: [M, D], pair by pair, the chosen answer first.
            batch: its `targets` [M] and `lengths` of the answers.
            reference: [2 * pairs] log-probabilities of the answers; None = zeros.
        """
        lengths = torch.tensor(batch["lengths"], device=rows.device)
        owners = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
        if reference is None:
            reference = torch.zeros(len(lengths), device=rows.device)
        targets = batch["targets"]

        def score(logits: Tensor, which: slice) -> dict[str, Tensor]:
            tokens, own = log_probs(logits, targets[which]), owners[which]
            first = int(own[0]) if len(own) else 0
            count = int(own[-1]) + 1 - first if len(own) else 0  # whole pairs, since they are the groups
            answers = tokens.new_zeros(count).index_add(0, own - first, tokens)
            mine = slice(first, first + count)
            pairs = _pairs(answers, reference[mine].to(answers.dtype), lengths[mine])
            loss = LOSSES[self.loss](pairs, self.settings).sum()
            return {"preference": loss, "sft": -answers[::2].sum(), **_statistics(pairs, self.settings)}

        groups = [sum(batch["lengths"][index : index + 2]) for index in range(0, len(batch["lengths"]), 2)]
        return head(rows, score, scales=self.scales(batch, self.weights), groups=groups)


def _pairs(answers: Tensor, reference: Tensor, lengths: Tensor) -> Pairs:
    """Answers in turn, chosen first."""
    return Pairs(answers[::2], answers[1::2], reference[::2], reference[1::2], lengths[::2], lengths[1::2])


@torch.no_grad()
def _statistics(pairs: Pairs, settings: Settings) -> dict[str, Tensor]:
    """Rewards in DPO's sense, their difference, and how often the chosen answer has the higher one; summed.

    `likelier`: how often the policy itself finds the chosen answer likelier, token by token, whatever the reference.
    """
    chosen = settings.beta * (pairs.chosen - pairs.reference_chosen)
    rejected = settings.beta * (pairs.rejected - pairs.reference_rejected)
    wins = (chosen > rejected).to(chosen.dtype)
    means = pairs.chosen / pairs.chosen_length.clamp_min(1), pairs.rejected / pairs.rejected_length.clamp_min(1)
    return {
        "margin": (chosen - rejected).sum(),
        "chosen_wins": wins.sum(),
        "likelier": (means[0] > means[1]).to(chosen.dtype).sum(),
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
    }


@dataclass(frozen=True)
class EncodedPair:
    """A conversation with two answers, as one row.

    Attributes:
        example: the row: the prompt, the chosen answer, the rejected one.
        positions: of every token; both answers begin where the prompt ends.
        segments: 0 = prompt, 1 = chosen, 2 = rejected.
        sources: the position that predicts each scored token, chosen answer first.
        targets: the scored tokens.
        lengths: scored tokens of the chosen and of the rejected answer.
        key: a digest of all of it, to keep the reference's log-probabilities under.
    """

    example: Example
    positions: list[int]
    segments: list[int]
    sources: list[int]
    targets: list[int]
    lengths: tuple[int, int]
    key: str


def encode_pair(sample: Sample, processor: MMLLMProcessor) -> EncodedPair:
    """One sample; its media are read once.

    Raises:
        UserError: an answer is missing or both are equal; the conversation ends with an answer already.
    """
    answers = [sample.fields.get(name) for name in ("chosen", "rejected")]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"sample {sample.id}: {name}", "missing", expected="a text")
    if answers[0] == answers[1]:
        raise UserError(f"sample {sample.id}", "its chosen answer is its rejected one")
    if sample.messages[-1]["role"] == "assistant":
        raise UserError(f"sample {sample.id}", "ends with an answer", expected="chosen and rejected in its place")
    read = processor.reader()
    rows = [
        processor.encode(
            [*sample.messages, {"role": "assistant", "content": answer}], answers="last", name=sample.id, read=read
        )
        for answer in answers
    ]
    return _joined(*rows)


def _joined(chosen: Example, rejected: Example) -> EncodedPair:
    """Two conversations that differ in their last answers, as one row."""
    starts = [next((i for i, label in enumerate(row.labels) if label != -100), 0) for row in (chosen, rejected)]
    prefix = starts[0]
    if prefix == 0 or starts[1] != prefix or chosen.ids[:prefix] != rejected.ids[:prefix]:
        raise UserError(f"sample {chosen.name}", "its answers do not follow the same prompt", hint="another template")
    own = len(chosen.ids)
    sources, targets, lengths = [], [], []
    for row, shift in ((chosen, 0), (rejected, own - prefix)):
        scored = [i for i in range(prefix, len(row.ids)) if row.labels[i] != -100]
        sources += [i - 1 if i == prefix else i - 1 + shift for i in scored]
        targets += [row.ids[i] for i in scored]
        lengths.append(len(scored))
    behind = len(rejected.ids) - prefix
    ids, labels = chosen.ids + rejected.ids[prefix:], chosen.labels + rejected.labels[prefix:]
    example = replace(chosen, ids=ids, labels=labels)
    facts = [ids, sources, targets, lengths, [repr(medium.key) for medium in chosen.media]]
    return EncodedPair(
        example,
        [*range(own), *range(prefix, prefix + behind)],
        [0] * prefix + [1] * (own - prefix) + [2] * behind,
        sources,
        targets,
        (lengths[0], lengths[1]),
        hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24],
    )
