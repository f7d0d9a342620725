"""One input of the attack: what is run, what must come of it, and what came of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Expect = Literal["refuse", "answer", "either"]
HARNESS = "the attack itself failed"
"""Column of a case that could not be made or looked at; no fault of what is attacked, and in no table."""
UNTOLD = "untold"
"""How the complaint begins about what nobody can tell from the file alone; counted beside the table."""
COLUMNS = ("answered", "refused", "exit 1", "traceback", "hang", "silent")
BAD = COLUMNS[2:]
ERROR_LINE = re.compile(r"^(mmllm[\w -]*: )?error: ", re.MULTILINE)
"""The one line of a refusal; argparse puts the command's name before it."""


@dataclass
class Ran:
    """What came of a command.

    Attributes:
        code: exit code; negative = killed by that signal.
        out, err: what it wrote.
        seconds: how long it took.
        late: it was stopped at the limit.
    """

    code: int
    out: str
    err: str
    seconds: float = 0.0
    late: bool = False


@dataclass
class Case:
    """One input.

    Attributes:
        argv: what follows `mmllm` on the command line.
        note: what was done to the input, for a person.
        expect: "refuse" = exit 2 and one `error:` line, "answer" = exit 0 or 3, "either" = one of the two.
        yes: stdin is a file full of "y" instead of empty.
        reports: exit 2 may also come with a report on stdout instead of the `error:` line, and 3 refuses too.
        call: run instead of the command line; returns an exit code.
        check: looks at what came of it; returns what is wrong, or None.
    """

    argv: list[str]
    note: str
    expect: Expect = "either"
    yes: bool = False
    reports: bool = False
    call: Callable[[], int] | None = None
    check: Callable[[Ran], str | None] | None = None


Write = Callable[[Path, Any], Case]
"""write(empty folder, bench): writes the files of a case."""


@dataclass(frozen=True)
class Name:
    """Which case: enough to make it again."""

    generator: str
    number: int
    seed: int

    def __str__(self) -> str:
        return f"{self.generator}-{self.number:04d}"

    def draw(self) -> random.Random:
        """Every draw of the case; it depends on nothing but the name."""
        return random.Random(f"{self.seed}/{self.generator}/{self.number}")


@dataclass(frozen=True)
class Generator:
    """Makes cases of one kind.

    Attributes:
        fixed: the cases that are known by hand.
        drawn: drawn(draw, folder, bench) is a random one.
        prepare: prepare(folder, bench) writes what all of them have.
    """

    fixed: Callable[[Any], list[Write]]
    drawn: Callable[[random.Random, Path, Any], Case]
    prepare: Callable[[Path, Any], object] = lambda folder, bench: None

    def case(self, name: Name, folder: Path, bench: Any) -> Case:
        """Write the case of a name: three of five are known by hand, in the seed's own order, the others drawn."""
        self.prepare(folder, bench)
        known = self.fixed(bench)
        random.Random(f"{name.seed}/{name.generator}").shuffle(known)
        rounds, place = divmod(name.number, 5)
        number = 3 * rounds + place
        if place < 3 and number < len(known):
            return known[number](folder, bench)
        return self.drawn(name.draw(), folder, bench)


@dataclass
class Verdict:
    """In which column a case belongs, and what a person needs to repeat it."""

    name: str
    generator: str
    seed: int
    column: str
    why: str = ""
    note: str = ""
    argv: list[str] = field(default_factory=list)
    code: int = 0
    seconds: float = 0.0
    last: str = ""


def judge(case: Case, ran: Ran, complaint: str | None) -> tuple[str, str]:
    """(column, why) of what came of a case; `complaint` is what its own check says."""
    lines = len(ERROR_LINE.findall(ran.err))
    if complaint and complaint.startswith("canary"):
        return "silent", complaint
    if ran.late:
        return "hang", f"stopped after {ran.seconds:.0f} s"
    if "Traceback (most recent call last)" in ran.err:
        return "traceback", f"exit code {ran.code}"
    if ran.code not in (0, 2, 3):
        return "exit 1", f"exit code {ran.code}"
    if complaint and not complaint.startswith(UNTOLD):
        return "silent", complaint
    holes = case.reports and ran.code == 3
    if ran.code == 2 or holes:
        if not holes and lines != 1 and not (case.reports and not lines and ran.out.strip()):
            return "silent", f"exit 2 with {lines} error lines on stderr"
        if case.expect == "answer":
            return "silent", "refused, although it is good"
        return "refused", ""
    if case.expect == "refuse":
        return "silent", "answered, although it must be refused"
    return "answered", complaint or ""
