"""How a trained run is evaluated: with which reducer, on which budget, under which protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from mmllm.contract.arguments import Within
from mmllm.contract.errors import UserError
from mmllm.eval.protocol import CANONICAL
from mmllm.eval.report_files import place_of
from mmllm.model.reduction.setting import build_reducer, label, read_setting


@dataclass(frozen=True)
class Setting:
    """One evaluation of every run; a curve over `keep` costs no training.

    Args:
        reduce: a reducer by name, or a file beside the study; "none" reads everything.
        keep: the budget beside a name.
        protocol: how questions are put and read.
    """

    reduce: str = "none"
    keep: Annotated[float, Within(above=0, most=1)] | None = None
    protocol: str = CANONICAL.name

    @cached_property
    def way(self) -> str:
        """The reducer's name with its budget."""
        return label(read_setting(self.reduce, self.keep))

    @property
    def title(self) -> str:
        """Its name in a table."""
        return self.way if self.protocol == CANONICAL.name else f"{self.way}, {self.protocol}"

    def place(self, out: Path) -> Path:
        """Where the reports of a run's evaluation go."""
        return place_of(out, self.way, self.protocol)

    def check(self, where: str, layers: list[int]) -> None:
        """Refuse what an evaluation would only find out after the training.

        Args:
            layers: of the LLMs of the arms.

        Raises:
            UserError: no such reducer or protocol, or a budget for nothing.
        """
        from mmllm.eval.answerer import find_protocol

        section = read_setting(self.reduce, self.keep)
        if section is None and self.keep not in (None, 1.0):
            raise UserError(f"{where}: keep", "nothing to keep less of", expected="a reduce beside it")
        if self.keep is not None and Path(self.reduce).suffix in (".yaml", ".yml"):
            raise UserError(f"{where}: keep", "the reducer's file says what it keeps", expected="one of the two")
        for count in layers if section is not None else ():
            try:
                build_reducer(section).schedule(count)
            except ValueError as error:
                raise UserError(f"{where}: {self.title}", str(error)) from error
        find_protocol(self.protocol)


def expanded(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A section in which a value may be a list: every combination of its values, reducers of a budget side by side."""
    section = dict(sorted(section.items(), key=lambda item: item[0] == "reduce"))
    values = [value if isinstance(value, list) else [value] for value in section.values()]
    for combination in product(*values):
        yield dict(zip(section, combination, strict=True))


def commands(settings: tuple[Setting, ...], base: list[str]) -> list[list[str]]:
    """The `eval` commands of some settings: those that differ in the reducer alone load the model once."""
    groups: dict[tuple[str, float | None], list[str]] = {}
    for setting in settings:
        keep = None if setting.reduce == "none" else setting.keep
        groups.setdefault((setting.protocol, keep), []).append(setting.reduce)
    found = []
    for (protocol, keep), reducers in groups.items():
        words = [*base, "--protocol", protocol] if protocol != CANONICAL.name else [*base]
        if reducers != ["none"]:
            words += [word for name in reducers for word in ("--reduce", name)]
        found.append([*words, *(["--keep", str(keep)] if keep is not None else [])])
    return found
