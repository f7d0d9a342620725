"""The report of one benchmark and of a whole run: numbers, tables and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmllm.contract.errors import UserError
from mmllm.contract.files import read_record

SCHEMA = "mmllm.eval.report/1"
FLOORS = ("chance", "blind", "single_frame")


@dataclass(frozen=True)
class TaskScore:
    """One task: accuracies in percent (None where nothing was answered) and counts of items.

    `items` were scored; `total` also counts missing, broken and excluded ones. `unparsed` answers (empty ones included)
    count in `items`, as wrong. `broken`: the clip exists but cannot be read as the item requires. `words`: answers that
    contain the text of the right option, whatever letter goes with it; None, and left out of files, where the model
    answers by letter alone. `measures` of a grounding task: means of its overlaps, and `recall@0.5`, the share of items
    whose score reaches that; None, and left out of files, elsewhere.
    """

    score: float | None
    chance: float | None
    blind: float | None
    single_frame: float | None
    items: int
    total: int
    missing: int
    unparsed: int
    words: float | None = None
    broken: int = 0
    measures: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As part of ``report.json``."""
        absent = ("words", "measures")
        return {key: value for key, value in asdict(self).items() if key not in absent or value is not None}


@dataclass
class Report:
    """Result of one benchmark under one protocol; all scores in percent.

    Attributes:
        benchmark: its name.
        protocol: name of the protocol.
        protocol_hash: its digest.
        headline: kind of mean of `average`, `chance`, `blind` and `single_frame`: "micro" or "macro".
        tasks: scores by task.
        empty: empty responses, counted as wrong.
        damaged: items answered from clips with damaged frames.
        excluded: unsound items, each with id, task and reason.
        broken: items whose clip cannot be read, likewise.
        not_scored: tasks left out as a whole, with the reason.
        warnings: sentences that a reader must see.
        root: the benchmark's folder.
        limit: most items asked per task, None = all.
        subject: what else the answers depend on: weights, frames, template, ...
        visual_tokens: per question, averaged over the LLM's layers, where the answerer says so.
        folder: where the report is written.
    """

    benchmark: str
    protocol: str
    protocol_hash: str
    headline: Literal["micro", "macro"]
    tasks: dict[str, TaskScore]
    empty: int = 0
    damaged: int = 0
    excluded: list[dict[str, str]] = field(default_factory=list)
    not_scored: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)
    root: str = ""
    limit: int | None = None
    subject: dict[str, Any] = field(default_factory=dict)
    visual_tokens: float | None = None
    folder: Path | None = None

    def mean(self, key: str, how: str | None = None) -> float | None:
        """Mean over tasks of one of score, words, chance, blind, single_frame: "micro" weights tasks by their items.

        None where the condition was not run. `how` defaults to the headline's mean.
        """
        pairs = [(getattr(task, key), task.items) for task in self.tasks.values() if task.items]
        if not pairs or any(value is None for value, _ in pairs):
            return None
        if (how or self.headline) == "macro":
            return sum(value for value, _ in pairs) / len(pairs)
        return sum(value * items for value, items in pairs) / sum(items for _, items in pairs)

    @property
    def average(self) -> float | None:
        """The headline score in percent."""
        return self.mean("score")

    @property
    def measured(self) -> tuple[str, ...]:
        """The columns of the tables, floors last."""
        return ("score", *(() if self.mean("words") is None else ("words",)), *FLOORS)

    @property
    def scored(self) -> int:
        """Number of items that the scores are over."""
        return sum(task.items for task in self.tasks.values())

    @property
    def total(self) -> int:
        """Number of multiple-choice items, including missing and excluded ones."""
        return sum(task.total for task in self.tasks.values())

    @property
    def missing(self) -> int:
        """Number of items left out because their clip is absent."""
        return sum(task.missing for task in self.tasks.values())

    @property
    def unreadable(self) -> int:
        """Number of items left out because their clip cannot be read as they require."""
        return sum(task.broken for task in self.tasks.values())

    @property
    def unparsed(self) -> int:
        """Number of answers from which no letter could be read; they are wrong."""
        return sum(task.unparsed for task in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "headline": self.headline,
            "average": self.average,
            "micro": self.mean("score", "micro"),
            "macro": self.mean("score", "macro"),
            **{key: self.mean(key) for key in self.measured[1:]},
            "items": self.scored,
            "total": self.total,
            "missing": self.missing,
            "broken": self.broken,
            "unparsed": self.unparsed,
            "empty": self.empty,
            "damaged": self.damaged,
            "root": self.root,
            "limit": self.limit,
            "subject": self.subject,
            "visual_tokens": self.visual_tokens,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "excluded": self.excluded,
            "not_scored": self.not_scored,
            "warnings": self.warnings,
        }

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Read the report in a folder.

        Raises:
            UserError: it is damaged.
        """
        data = read_record(folder / "report.json")
        plain = ("benchmark", "protocol", "protocol_hash", "headline", "empty", "excluded", "not_scored", "warnings")
        try:
            tasks = {name: TaskScore(**task) for name, task in data["tasks"].items()}
            later = ("broken", "damaged", "root", "limit", "subject", "visual_tokens")
            rest = {key: data[key] for key in later if key in data}
            return cls(**{key: data[key] for key in plain}, **rest, tasks=tasks, folder=folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(folder / "report.json", "damaged", hint="delete it and evaluate again") from error


def percent(value: float | None) -> str:
    """One decimal, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.1f}"


def summary(report: Report) -> str:
    """One line: the headline score, its floors and its denominator."""
    chance, blind, single = (percent(report.mean(floor)) for floor in FLOORS)
    return (
        f"{report.benchmark} {percent(report.average)} %  chance {chance}  blind {blind}  single frame {single}  "
        f"({report.scored}/{report.total} items)"
    )
