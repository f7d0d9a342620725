"""Breaks one line at a time and sees whether the tests notice: see scripts/sabotage.sh.

The lines are data, in the .yaml files beside this one: `file`, `find` (a text that stands exactly once in it),
`replace`, `breaks` (what is broken then), `tests` (pytest targets, one of which must turn red) and perhaps `known` (why
nothing does). Each is made in a private copy of the tree, which is what Python then imports; the tree itself is only
read.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent
SHARE = 0.95
"""So many of the sabotages have to be caught."""
SECONDS = 600
"""Tests that a broken line makes hang are red after this time."""
NOT_COPIED = ("__pycache__", "runs", "build", "dist", "*.egg-info", ".*")
HOOK = '''\
"""Finds mmllm and the packages that setup.py puts into it in one tree, whatever else is installed."""

import sys
from importlib.machinery import PathFinder


class Tree:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parent, _, last = name.rpartition(".")
        if name == "mmllm" or (parent == "mmllm" and last in {folders}):
            return PathFinder.find_spec(name, [{tree!r}])


sys.meta_path.insert(0, Tree)
'''


@dataclass(frozen=True)
class Sabotage:
    """One broken line, as its list says."""

    file: str
    find: str
    replace: str
    breaks: str
    tests: tuple[str, ...]
    known: str = ""

    @property
    def folder(self) -> str:
        """Where the file lies."""
        return str(Path(self.file).parent)


@dataclass
class Outcome:
    """What a sabotage came to."""

    sabotage: Sabotage
    caught: bool
    seconds: float


@dataclass
class Tree:
    """A copy of the repository, and a process that runs tests in it."""

    path: Path
    process: subprocess.Popen

    @classmethod
    def copy(cls, root: Path, to: Path, python: str) -> Tree:
        """Copy a repository into a new folder; a hook beside it lets Python import what is ours from there."""
        tree = to / "tree"
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        folders = {path.parent.name for path in root.glob("*/__init__.py")} - {"mmllm"}
        (to / "hook").mkdir()
        (to / "hook" / "sitecustomize.py").write_text(HOOK.format(folders=sorted(folders), tree=str(tree)))
        # no compiled files: a file that is changed twice within a second would be taken for the same
        own = {"PYTHONPATH": str(to / "hook"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        words = [python, "-P", str(LISTS / "warm.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(tree, subprocess.Popen(words, cwd=tree, env={**os.environ, **own}, **pipes))

    @contextmanager
    def broken(self, sabotage: Sabotage) -> Iterator[None]:
        """The tree with one line broken."""
        path = self.path / sabotage.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(sabotage.find, sabotage.replace), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def run(self, tests: Iterable[str], *options: str) -> tuple[bool, str]:
        """(whether all tests are green, what pytest says)."""
        shared, said = (ROOT / "../shared").resolve(), self.path.parent / "said.txt"
        words = ["-q", "-p", "no:cacheprovider", "--shared", str(shared), *options, *tests]
        self.process.stdin.write(json.dumps({"words": words, "seconds": SECONDS, "said": str(said)}) + "\n")
        self.process.stdin.flush()
        code = json.loads(self.process.stdout.readline())
        return code == 0, said.read_text(errors="replace") + ("it hangs" if code == "hangs" else "")

    def close(self) -> None:
        """End the process that runs the tests."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def read(folder: Path = LISTS) -> list[Sabotage]:
    """All sabotages of the lists in a folder.

    Raises:
        ValueError: an entry without one of its fields, or with another one.
    """
    found = []
    for path in sorted(folder.glob("*.yaml")):
        for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")), start=1):
            try:
                found.append(Sabotage(**{**entry, "tests": tuple(entry["tests"])}))
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path.name}: entry {number}: {error}") from error
    return found


def faults(sabotages: list[Sabotage], root: Path = ROOT) -> list[str]:
    """What keeps sabotages from being made: a text that is absent or ambiguous, tests that are not there."""
    found = []
    for one in sabotages:
        where = f"{one.file}: {one.breaks}"
        path = root / one.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(one.find) != 1:
            found.append(f"{where}: stands {text.count(one.find)} times in it: {one.find!r}")
            continue
        if one.find == one.replace:
            found.append(f"{where}: nothing is changed")
        try:
            ast.parse(text.replace(one.find, one.replace))
        except SyntaxError as error:
            found.append(f"{where}: is no Python any more ({error.msg})")
        for test in one.tests:
            file, _, name = test.partition("::")
            test_file = root / file
            source = test_file.read_text(encoding="utf-8") if test_file.is_file() else ""
            if not source or (name and f"def {name.partition('[')[0]}(" not in source):
                found.append(f"{where}: no such test: {test}")
    return found


def red_unbroken(trees: list[Tree], sabotages: list[Sabotage]) -> list[str]:
    """What pytest says of the tests that are red although no line is broken; each distinct target runs once."""
    targets = sorted({test for one in sabotages for test in one.tests})
    shares = [targets[place :: len(trees)] for place in range(len(trees))]
    work = [(tree, share) for tree, share in zip(trees, shares, strict=True) if share]
    with ThreadPoolExecutor(len(trees)) as pool:
        results = list(pool.map(lambda job: job[0].run(job[1], "--tb=line"), work))
    return [said for green, said in results if not green]


def run_all(trees: list[Tree], sabotages: list[Sabotage]) -> list[Outcome]:
    """Every sabotage, as many at a time as there are trees, with progress on stderr."""
    free: SimpleQueue[Tree] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def run(one: Sabotage) -> Outcome:
        tree, start = free.get(), time.monotonic()
        try:
            with tree.broken(one):
                green, _ = tree.run(one.tests, "-x")
            return Outcome(one, not green, time.monotonic() - start)
        finally:
            free.put(tree)

    outcomes: list[Outcome] = []
    start = time.monotonic()
    with ThreadPoolExecutor(len(trees)) as pool:
        for future in as_completed([pool.submit(run, one) for one in sabotages]):
            outcomes.append(future.result())
            one, done = outcomes[-1], len(outcomes)
            left = (time.monotonic() - start) / done * (len(sabotages) - done)
            verdict = "caught" if one.caught else "NOT CAUGHT"
            text = f"{one.sabotage.file}: {one.sabotage.breaks}: {verdict} ({one.seconds:.0f} s)"
            print(f"[{done}/{len(sabotages)}] {text}  ETA {clock(left)}", file=sys.stderr, flush=True)
    place = {id(one): number for number, one in enumerate(sabotages)}
    return sorted(outcomes, key=lambda outcome: place[id(outcome.sabotage)])


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def table(outcomes: list[Outcome]) -> str:
    """Caught of tried, folder by folder, and what was not caught."""
    folders = sorted({outcome.sabotage.folder for outcome in outcomes})
    rows = [(name, [outcome.caught for outcome in outcomes if outcome.sabotage.folder == name]) for name in folders]
    rows.append(("all", [outcome.caught for outcome in outcomes]))
    lines = [f"{'folder':<24}{'tried':>7}{'caught':>8}"]
    lines += [f"{name:<24}{len(caught):>7}{sum(caught):>8}" for name, caught in rows]
    missed = [outcome.sabotage for outcome in outcomes if not outcome.caught]
    lines += ["", "not caught:"] if missed else []
    for one in missed:
        lines.append(f"  {one.file}: {one.breaks}" + (f" ({one.known})" if one.known else ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the lists; 0 = enough was caught, 1 = not, 2 = the lists do not fit the tree."""
    parser = argparse.ArgumentParser(description="Break one line at a time and see whether the tests notice.")
    parser.add_argument("--check", action="store_true", help="only whether each line is there to be broken")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the file or of what is broken")
    parser.add_argument("--jobs", type=int, default=2, help="sabotages at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcomes, too")
    options = parser.parse_args(arguments)
    sabotages = [one for one in read() if options.only in f"{one.file}: {one.breaks}"]
    wrong = faults(sabotages) or ([] if sabotages else ["no sabotage is called so"])
    if wrong or options.check:
        print("\n".join(wrong) or f"{len(sabotages)} sabotages fit the tree")
        return 2 if wrong else 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmllm-sabotage-") as folder:
        places = [Path(folder) / str(number) for number in range(max(1, options.jobs))]
        trees = [Tree.copy(ROOT, place, sys.executable) for place in places]
        try:
            print("the tests, with no line broken", file=sys.stderr, flush=True)
            if red := red_unbroken(trees, sabotages):
                print("\n".join(red))
                print("these tests are red although no line is broken")
                return 1
            outcomes = run_all(trees, sabotages)
        finally:
            for tree in trees:
                tree.close()
    share = sum(outcome.caught for outcome in outcomes) / len(outcomes)
    print(table(outcomes))
    print(f"\n{share:.1%} caught in {clock(time.monotonic() - start)} min")
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
