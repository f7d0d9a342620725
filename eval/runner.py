"""Running a benchmark: ask, record, continue after a kill, and score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

from mmllm.contract.errors import UserError
from mmllm.eval.benchmarks import Benchmark
from mmllm.eval.items import LETTERS, Item
from mmllm.eval.kinds import KINDS, Layout
from mmllm.eval.option_text import option_texts
from mmllm.eval.predictions import Predictions, clip_size
from mmllm.eval.protocol import Protocol, asked, messages
from mmllm.eval.report import Report
from mmllm.eval.report_files import write_report
from mmllm.eval.scoring import score, verdict_of
from mmllm.eval.selection import Selection, select, settle_broken, settle_missing

Conversation = list[dict[str, Any]]


class Answerer(Interface):
    """What is evaluated: anything that answers conversations."""

    def __call__(self, conversations: list[Conversation], *, frames: int | None, max_new_tokens: int) -> list[str]:
        """One raw response per conversation, greedily decoded.

        Args:
            conversations: chat messages; a video entry has `path` and may have `start`, `end` (seconds) and `fps`.
            frames: frames per clip; None means the model's own setting.
            max_new_tokens: longest response.

        An answerer may have a method `prefetch(conversations, *, frames)`, told what is asked after the next call, and
        an attribute `damaged`: the set of files in which damaged frames were found. For protocols that compare the
        likelihood of options it has `score_options(conversations, options, *, frames)`. Its attribute `vocabulary` says
        which coordinates it writes, if it writes any; `visual_tokens`, how many were read of each conversation of the
        last call.
        """


@dataclass(frozen=True)
class Condition:
    """How the clip is shown: `blind` leaves it out, `frames` overrides the model's number of frames."""

    blind: bool = False
    frames: int | None = None


CONDITIONS = {"model": Condition(), "blind": Condition(blind=True), "single_frame": Condition(frames=1)}


def run_benchmark(
    benchmark: Benchmark,
    root: Path,
    answer: Answerer,
    out: Path,
    protocol: Protocol,
    *,
    baselines: tuple[str, ...] = ("blind", "single_frame"),
    limit: int | None = None,
    tasks: tuple[str, ...] = (),
    missing: Literal["error", "skip"] = "error",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    subject: dict[str, Any] | None = None,
) -> Report:
    """Answer the items of a benchmark that earlier runs left unanswered, and write the report.

    Args:
        benchmark: one of `mmllm.eval.benchmarks.BENCHMARKS`.
        root: its folder on disk.
        answer: the model.
        out: folder of this benchmark and protocol (``.../mvbench/canonical-<hash>``): gets ``predictions.jsonl``,
            ``report.json``, ``report.md``, ``tasks.png`` and, where clips are absent, ``missing.txt``; with a `limit`
            all but the predictions go into ``limit-N/``.
        protocol: how questions are put and read.
        baselines: conditions besides "model": any of "blind", "single_frame"; those answered earlier are reported too.
        limit: only the first items of each task.
        tasks: only these tasks; () = all. Their report goes into ``tasks-NAMES/``.
        missing: "error" stops before the first answer where clips are missing, and at one that cannot be read; "skip"
            leaves their items out and counts them.
        batch_size: conversations per call of `answer`.
        progress: called with (answers done, answers in total), the first time with those of earlier runs.
        subject: what the answers depend on besides the items, for the report.

    Raises:
        UserError: unknown baseline, broken annotation file, clips missing, or one raised by `answer`; earlier answers
            stay in ``predictions.jsonl``.
    """
    conditions = _conditions(baselines)
    chosen = select(benchmark.load(Path(root)), limit, tasks)
    part = [*([f"limit-{limit}"] if limit is not None else []), *(["-".join(["tasks", *tasks])] if tasks else [])]
    reports = out.joinpath("-".join(part)) if part else out
    settle_missing(chosen, benchmark.name, reports, missing)
    settle_broken(chosen, benchmark.name, missing)
    predictions = Predictions(out / "predictions.jsonl")
    predictions.forget_changed(chosen.scored)
    _answer_all(chosen, conditions, answer, predictions, protocol, batch_size, missing == "skip", progress)
    if not chosen.scored:
        item, reason = chosen.broken[0]
        raise UserError(f"{benchmark.name} {item.id}", f"no clip can be read; the first: {reason}")
    known = [name for name in CONDITIONS if all((item.id, name) in predictions for item in chosen.scored)]
    layout = getattr(answer, "vocabulary", None)
    report = score(benchmark, protocol, chosen, predictions, tuple(known), layout)
    report.root, report.limit, report.subject = str(root), limit, subject or {}
    write_report(report, reports)
    return report


def _answer_all(
    chosen: Selection,
    conditions: tuple[str, ...],
    answer: Answerer,
    predictions: Predictions,
    protocol: Protocol,
    batch_size: int,
    skip: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Answer what an earlier run left, condition by condition; under `skip`, unreadable items are set aside."""
    show = progress or (lambda done, total: None)
    for condition in conditions:
        batches = _batches(_pending(chosen.scored, condition, predictions, protocol), batch_size)
        done, total = _count(chosen, conditions, predictions)
        show(done, total)
        for batch, following in zip(batches, [*batches[1:], []], strict=False):
            if following and hasattr(answer, "prefetch"):
                answer.prefetch(_asked(following, condition, protocol), frames=CONDITIONS[condition].frames)
            before = len(predictions)
            broken = _answer_batch(batch, condition, answer, predictions, protocol, skip)
            done += len(predictions) - before
            if broken:
                chosen.set_aside(broken)
                done, total = _count(chosen, conditions, predictions)
            show(done, total)


def _count(chosen: Selection, conditions: tuple[str, ...], predictions: Predictions) -> tuple[int, int]:
    """(answers that exist, answers in total)."""
    keys = [(item.id, condition) for condition in conditions for item in chosen.scored]
    return sum(key in predictions for key in keys), len(keys)


def _conditions(baselines: tuple[str, ...]) -> tuple[str, ...]:
    for name in baselines:
        if name not in CONDITIONS or name == "model":
            raise UserError("--baselines", f"unknown baseline {name!r}", expected=", ".join(list(CONDITIONS)[1:]))
    return ("model", *dict.fromkeys(baselines))


def _pending(items: list[Item], condition: str, predictions: Predictions, protocol: Protocol) -> list[Group]:
    """Groups of unanswered items that share one answer, with that answer where an earlier run has it.

    Without the clip, items with the same prompt are one question; with it, each item is its own.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        key = asked(item, protocol) if CONDITIONS[condition].blind else item.id
        groups.setdefault(key, []).append(item)
    pending = []
    for group in groups.values():
        known = [predictions[item.id, condition] for item in group if (item.id, condition) in predictions]
        todo = [item for item in group if (item.id, condition) not in predictions]
        if todo:
            pending.append((todo, known[0] if known else None))
    return pending


Group = tuple[list[Item], str | None]
"""Items that share an answer, and that answer where it is known."""
Answer = tuple[str, float | None]
"""A response, and the visual tokens that were read for it where the answerer says so."""


def _batches(groups: list[Group], size: int) -> list[list[Group]]:
    """Runs of at most `size` groups whose items are of one kind."""
    found = []
    for kind in dict.fromkeys(items[0].kind for items, _ in groups):
        own = [group for group in groups if group[0][0].kind == kind]
        found += [own[start : start + size] for start in range(0, len(own), size)]
    return found


def _asked(batch: list[Group], condition: str, protocol: Protocol) -> list[Conversation]:
    """The conversations of a batch that have no answer yet."""
    blind = CONDITIONS[condition].blind
    return [messages(items[0], blind, protocol) for items, known in batch if known is None]


def _answer_batch(
    batch: list[Group],
    condition: str,
    answer: Answerer,
    predictions: Predictions,
    protocol: Protocol,
    skip: bool,
) -> list[tuple[Item, str]]:
    """Answer one batch of groups and write its lines.

    Args:
        skip: whether to leave out items that cannot be read.

    Returns:
        what was left out: (item, reason).
    """
    frames, coming = CONDITIONS[condition].frames, _asked(batch, condition, protocol)
    options = {id(one): items[0].options for one, items in zip(coming, _first(batch), strict=True)}
    kind = batch[0][0][0].kind
    longest = KINDS[kind].max_new_tokens or protocol.max_new_tokens

    def ask(conversations: list[Conversation]) -> list[Answer]:
        if not conversations:
            return []
        if protocol.decoding == "likelihood" and kind == "choice":
            given = [option_texts(list(options[id(one)])) for one in conversations]
            fresh = [_likeliest(scores) for scores in answer.score_options(conversations, given, frames=frames)]
        else:
            fresh = answer(conversations, frames=frames, max_new_tokens=longest)
        if len(fresh) != len(conversations):
            raise ValueError(f"the answerer returned {len(fresh)} responses to {len(conversations)} conversations")
        return list(zip(fresh, getattr(answer, "visual_tokens", None) or [None] * len(fresh), strict=True))

    try:
        responses: Iterator[Answer | UserError] = iter(ask(coming))
    except UserError:
        if not skip:
            raise
        responses = iter([_one(ask, conversation) for conversation in coming])
    rows, broken, layout = [], [], getattr(answer, "vocabulary", None)
    for items, known in batch:
        found = next(responses) if known is None else (known, None)
        if isinstance(found, UserError):
            broken += [(item, str(found)) for item in items]
        else:
            response, tokens = found
            seen = set() if CONDITIONS[condition].blind else getattr(answer, "damaged", set())
            rows += [_row(item, condition, response, protocol, seen, layout, tokens) for item in items]
    predictions.add(rows)
    return broken


def _first(batch: list[Group]) -> list[list[Item]]:
    """The groups of a batch that have no answer yet."""
    return [items for items, known in batch if known is None]


def _likeliest(scores: list[float]) -> str:
    """The letter of the option that scored highest, the first among equals."""
    return f"({LETTERS[scores.index(max(scores))]})"


def _one(ask: Callable[[list[Conversation]], list[Answer]], conversation: Conversation) -> Answer | UserError:
    """The answer to one conversation, or why there is none."""
    try:
        return ask([conversation])[0]
    except UserError as error:
        return error


def _row(
    item: Item,
    condition: str,
    response: str,
    protocol: Protocol,
    damaged: set[str],
    layout: Layout,
    tokens: float | None,
) -> dict[str, Any]:
    verdict = verdict_of(protocol, response, item, layout)
    flag: dict[str, Any] = {"damaged": True} if str(item.media_path) in damaged else {}
    if item.kind != "choice":
        flag |= {"score": verdict.score, "measures": verdict.measures}
    if not CONDITIONS[condition].blind:
        flag["clip"] = clip_size(item)
        flag |= {} if tokens is None else {"visual_tokens": tokens}
    return {
        "id": item.id,
        "task": item.task,
        "condition": condition,
        "response": response,
        "letter": verdict.letter,
        "gold": item.gold,
        "correct": verdict.score == 1,
        **flag,
    }
