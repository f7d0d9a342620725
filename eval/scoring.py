"""From answers to numbers: accuracy per task and the averages, along with the floors."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mmllm.eval.benchmarks import Benchmark
from mmllm.eval.grounding_scores import recalls
from mmllm.eval.items import Item
from mmllm.eval.kinds import KINDS, Layout, Verdict
from mmllm.eval.option_text import by_words
from mmllm.eval.predictions import Predictions
from mmllm.eval.protocol import Protocol
from mmllm.eval.report import Report, TaskScore
from mmllm.eval.selection import Selection

logger = logging.getLogger(__name__)
EMPTY_SHARE = 0.01  # a working model returns something: more empty answers mean a broken run


def verdict_of(protocol: Protocol, response: str, item: Item, layout: Layout = None) -> Verdict:
    """What a response is worth.

    Args:
        layout: of the coordinates that the model writes, if it writes any.
    """
    return KINDS[item.kind].judge(protocol.parser, response, item, layout)


def score(
    benchmark: Benchmark,
    protocol: Protocol,
    chosen: Selection,
    predictions: Predictions,
    conditions: tuple[str, ...],
    layout: Layout = None,
) -> Report:
    """The report of a finished run. Empty and unparsable answers are wrong; missing and unsound items do not count.

    Args:
        benchmark: provides the name and the kind of average.
        protocol: its parser reads the answers.
        chosen: the items; `chosen.scored` must be answered under each condition.
        predictions: raw responses by (item id, condition).
        conditions: "model" and the baselines that were run.
        layout: see `verdict_of`.
    """
    verdicts = {
        condition: {i.id: verdict_of(protocol, predictions[i.id, condition], i, layout) for i in chosen.scored}
        for condition in conditions
    }
    right = {condition: {key: verdict.score for key, verdict in own.items()} for condition, own in verdicts.items()}
    choices = [item for item in chosen.scored if item.kind == "choice"]
    said = {i.id: by_words(predictions[i.id, "model"], list(i.options)) for i in choices}
    if any(said.values()):  # otherwise the model answers by letter alone
        right["words"] = {i.id: float(i.is_right(said[i.id])) for i in choices}
    empty = sum(not predictions[item.id, "model"].strip() for item in chosen.scored)
    aside = [item for item, _ in [*chosen.excluded, *chosen.broken]]
    names = dict.fromkeys(item.task for item in [*chosen.scored, *chosen.missing, *aside])
    tasks = {name: _task_score(name, chosen, right, verdicts["model"]) for name in names}
    report = Report(
        benchmark=benchmark.name,
        protocol=protocol.name,
        protocol_hash=protocol.hash,
        headline=benchmark.average,
        tasks=tasks,
        empty=empty,
        damaged=sum(item.id in predictions.damaged for item in chosen.scored),
        excluded=[{"id": item.id, "task": item.task, "reason": reason} for item, reason in chosen.excluded],
        broken=[{"id": item.id, "task": item.task, "reason": reason} for item, reason in chosen.broken],
        not_scored=dict(chosen.not_scored),
    )
    read = [predictions.visual_tokens.get((item.id, "model")) for item in chosen.scored]
    if read and None not in read:
        report.visual_tokens = sum(read) / len(read)
    report.warnings = _warnings(report)
    for warning in report.warnings:
        logger.warning("%s: %s", benchmark.name, warning)
    return report


def _task_score(
    name: str, chosen: Selection, right: dict[str, dict[str, float]], verdicts: dict[str, Verdict]
) -> TaskScore:
    items = [item for item in chosen.scored if item.task == name]
    missing = sum(item.task == name for item in chosen.missing)
    excluded = sum(item.task == name for item, _ in chosen.excluded)
    broken = sum(item.task == name for item, _ in chosen.broken)

    def percent(condition: str) -> float | None:
        own = right.get(condition)
        known = own is not None and all(item.id in own for item in items)
        return mean(items, lambda item: 100.0 * own[item.id]) if known else None

    return TaskScore(
        score=percent("model"),
        chance=mean(items, lambda item: 100.0 / len(item.options)) if all(item.options for item in items) else None,
        blind=percent("blind"),
        single_frame=percent("single_frame"),
        items=len(items),
        total=len(items) + missing + excluded + broken,
        missing=missing,
        broken=broken,
        words=percent("words"),
        unparsed=sum(not verdicts[item.id].parsed for item in items),
        measures=_measures([verdicts[item.id] for item in items if item.kind == "grounding"]),
    )


def _measures(verdicts: list[Verdict]) -> dict[str, float] | None:
    """What else is known of a grounding task: means of its measures, and how many scores reach some thresholds."""
    if not verdicts:
        return None
    means = {}
    for name in dict.fromkeys(name for verdict in verdicts for name in verdict.measures):
        own = [verdict.measures[name] for verdict in verdicts if name in verdict.measures]
        means[name] = 100 * sum(own) / len(own)
    return {**means, **recalls([verdict.score for verdict in verdicts])}


def mean(items: list[Item], value: Callable[[Item], float]) -> float | None:
    """Mean of a value over items, or None over no items."""
    return sum(value(item) for item in items) / len(items) if items else None


def _warnings(report: Report) -> list[str]:
    found = []
    if report.empty > EMPTY_SHARE * report.scored:
        found.append(
            f"{report.empty} of {report.scored} responses are EMPTY and count as wrong: "
            "the model or its generation settings are broken, do not use this score"
        )
    if report.damaged:
        found.append(
            f"{report.damaged} of {report.scored} items were answered from clips with damaged frames; "
            "--corrupt error --missing skip --out NEW leaves them out"
        )
    bare = [name for name, task in report.tasks.items() if task.score is None]
    if bare:
        found.append(f"no item scored in {', '.join(bare)}: averages leave {'it' if len(bare) == 1 else 'them'} out")
    return found
