"""`python -m attack`: see scripts/attack.sh."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from attack import kills, table
from attack.bench import Bench, build, start_world, wait_for
from attack.case import UNTOLD, Name, Verdict
from attack.generators import GENERATORS, names
from attack.processes import unmount
from attack.server import FORK, end, forked, import_everything, run_cases, verdict_rows

EPILOG = """\
examples:
  scripts/attack.sh                                      1,500 inputs and 60 kills
  scripts/attack.sh --inputs 200 --kills 0 --only recipes,media
  scripts/attack.sh --case recipes-0017 --seed 3         one input again, with all that it says
  scripts/attack.sh --seed 7 --json attack.json --keep bad

Columns: answered and refused are right; exit 1 also counts crashes and memory that ran out; silent is an answer where
there must be none, a refusal of a good input, or a difference after a kill.
exit codes: 0 the last four columns are all 0, 1 they are not
"""


def main() -> int:
    """Attack, and say what came of it."""
    options = _options()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # leaves nothing behind either
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is asked for nowhere
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmllm-attack-")))
        stack.callback(unmount, scratch)
        print("attack: imports, a tiny model and a tiny world first", file=sys.stderr)
        bench = _bench(scratch / "bench", stack)
        if options.case:
            return _one(options, bench, scratch)
        verdicts = _attack(options, bench, scratch, stack)
    _report(verdicts, options, time.monotonic() - began)
    return 1 if table.bad(verdicts) else 0


def _bench(root: Path, stack: ExitStack) -> Bench:
    """The good things, made while everything is imported."""
    bench = Bench(root)
    root.mkdir()
    world = start_world(bench)
    stack.callback(world.kill)
    import_everything()
    forked(build, root)
    wait_for(world)
    return bench


def _attack(options: argparse.Namespace, bench: Bench, scratch: Path, stack: ExitStack) -> list[Verdict]:
    """All inputs, and beside them the kills in a process of their own."""
    only = options.only.split(",") if options.only else None
    number = options.kills if only is None or "kills" in only else 0
    inputs = names(options.inputs, options.seed, only)
    found = scratch / "kills.json"
    beside = FORK.Process(target=_kills, args=(number, options, bench, scratch / "kills", found))
    beside.start()
    stack.callback(end, beside)
    verdicts = run_cases(
        inputs,
        bench,
        options.keep or scratch / "cases",
        workers=options.workers,
        limit=options.limit,
        keep=options.keep is not None,
        told=_Progress("inputs", len(inputs)),
    )
    beside.join()
    if beside.exitcode:
        raise RuntimeError(f"the kills ended with {beside.exitcode}")
    return [*verdicts, *(Verdict(**row) for row in json.loads(found.read_text()))]


def _kills(number: int, options: argparse.Namespace, bench: Bench, scratch: Path, found: Path) -> None:
    verdicts = kills.run(number, options.seed, bench, scratch, options.workers, _Progress("kills", number))
    found.write_text(json.dumps(verdict_rows(verdicts)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/attack.sh",
        description="Give mmllm what nobody should give it, and count what comes of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=1500, help="how many inputs (default 1500)")
    parser.add_argument("--kills", type=int, default=60, help="how many kills of running commands (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")
    parser.add_argument("--only", help=f"some of {', '.join([*GENERATORS, 'kills'])}, separated by commas")
    parser.add_argument("--case", metavar="NAME", help="run one case again and show what it says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and all verdicts there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the folders of the bad cases there")
    parser.add_argument("--workers", type=int, default=2, help="inputs at a time (default 2)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which one hangs (default 60)")
    options = parser.parse_args()
    known = [*GENERATORS, "kills"]
    for name in options.only.split(",") if options.only else ():
        if name not in known:
            parser.error(f"--only {name}: unknown, expected some of {', '.join(known)}")
    options.keep = options.keep and options.keep.resolve()
    return options


def _one(options: argparse.Namespace, bench: Bench, scratch: Path) -> int:
    """Run one case again."""
    generator, _, number = options.case.rpartition("-")
    if generator == "kills":
        verdicts = kills.run_one(int(number), options.seed, bench, scratch / "kills")
    else:
        folder = options.keep or scratch / "cases"
        name = Name(generator, int(number), options.seed)
        verdicts = run_cases([name], bench, folder, limit=options.limit, keep=True)
        for stream in ("stdout", "stderr"):
            path = folder / str(name) / stream
            print(f"--- {stream}\n{path.read_text(errors='replace') if path.is_file() else '(removed: it is good)'}")
        crash = folder / str(name) / "work/crash.txt"
        print(f"--- crash.txt\n{crash.read_text()}" if crash.is_file() else "---")
    print(table.describe(verdicts[0]))
    return 1 if table.bad(verdicts) else 0


class _Progress:
    """A line on stderr now and then, and each bad case as it comes."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.wrong, self.began, self.last = what, total, 0, 0, time.monotonic(), 0.0

    def __call__(self, verdict: Verdict) -> None:
        """One more."""
        self.done += 1
        if table.bad([verdict]):
            self.wrong += 1
            print(table.describe(verdict), file=sys.stderr)
        now = time.monotonic()
        if now - self.last > 5 or self.done == self.total:
            self.last = now
            left = (now - self.began) / self.done * (self.total - self.done)
            line = f"{self.what}: {self.done}/{self.total}, {self.wrong} bad, {left / 60:.1f} min left"
            print(line, file=sys.stderr)


def _report(verdicts: list[Verdict], options: argparse.Namespace, seconds: float) -> None:
    counted = table.counts(verdicts)
    for verdict in table.bad(verdicts):
        print(table.describe(verdict))
    untold = [verdict for verdict in verdicts if verdict.why.startswith(UNTOLD)]
    print(f"\n{table.render(counted)}\n\nseed {options.seed}, {seconds / 60:.1f} min")
    if untold:
        print(f"{len(untold)} of the answers are about frames with flipped bits that no decoder finds fault with")
    if options.json:
        facts = {"seed": options.seed, "seconds": round(seconds), "counts": counted, "untold": len(untold)}
        facts["cases"] = verdict_rows(verdicts)
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
