"""Commands that are killed, or run out of disk, and are then run again: what they leave must be what they leave alone.

Real processes, as a person starts them. Each kill has a folder of its own; the uninterrupted runs are made once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attack.bench import Bench
from attack.case import ERROR_LINE, Name, Ran, Verdict
from attack.processes import Place, mount, wait_until
from attack.recipes import dump

ORDER = ("last", "train", "disk", "eval", "train", "last", "train", "last", "train", "eval", "train", "last")
"""Kinds of kills, in turn; "last": at once after the last checkpoint of a stage."""
STAGES, STEPS = ("first", "second"), 11
"""The trained recipe: the log has the losses of steps 1 and 10 of each stage."""


@dataclass
class Straight:
    """An uninterrupted run.

    Attributes:
        result: what must come out again. seconds: how long it took, from its first file to its end.
        largest: bytes of its largest file. whole: of all of them together.
    """

    result: dict[str, Any]
    seconds: float
    largest: int
    whole: int


@dataclass(frozen=True)
class Kind:
    """One command that is killed.

    Attributes:
        argv: its words. starts: how often it has begun to work on a folder. result: what must come out again.
    """

    argv: Callable[[Place], list[str]]
    starts: Callable[[Path], int]
    result: Callable[[Path], dict[str, Any]]


def _train(place: Place, *, text: bool = False) -> list[str]:
    recipe = place.bench.recipe()
    data = place.bench.data
    if text:  # nothing is read but lines: only the run's own files are in question
        lines = [line for line in data.read_text().splitlines() if '"path"' not in line]
        data = place.folder / "text.jsonl"
        place.folder.mkdir(parents=True, exist_ok=True)
        data.write_text("\n".join(lines * 2) + "\n")
    stage = {**recipe["stages"]["instruct"], "data": str(data) if not text else "text.jsonl", "steps": STEPS}
    recipe["stages"] = {name: dict(stage) for name in STAGES}
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "mine.yaml").write_text(dump(recipe))
    flags = ["--out", "out", "--save-steps", "2", "--device", "cpu", "--jobs", "0" if text else "1"]
    return ["train", "mine.yaml", *flags, "--cache-dir", "cache"]


def _eval(place: Place) -> list[str]:
    root = f"mvbench={place.bench.world / 'mvbench'}"
    flags = ["--limit", "2", "--batch", "4", "--out", "out", "--device", "cpu"]
    return ["eval", "--model", str(place.bench.model), "--tasks", "mvbench", "--root", root, *flags]


def _trained(out: Path) -> dict[str, Any]:
    """Weights and losses of a run; {"missing": ...} where there are none."""
    from safetensors.numpy import load_file

    file = out / "model/model.safetensors"
    if not file.is_file():
        return {"missing": "model/model.safetensors"}
    losses = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            losses[f"loss of {record['stage']} step {record['step']}"] = record["loss"]
    weights = {f"weights {key}": value.tobytes() for key, value in load_file(file).items()}
    stages = {"finished stages": sorted(json.loads((out / "status.json").read_text())["stages"])}
    return {**losses, **stages, **weights}


def _answered(out: Path) -> dict[str, Any]:
    """The lines of predictions.jsonl, and how many of them there are."""
    files = list(out.rglob("predictions.jsonl"))
    lines = files[0].read_bytes().splitlines() if files else []
    found: dict[str, Any] = {"number of answers": len(lines)}
    for place, line in enumerate(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            key = f"answer {row['id']} {row['condition']}"
            found[f"{key} (doubled)" if key in found else key] = line
            found[f"line {place}"] = line
    reports = [json.loads(path.read_text()) for path in sorted(out.rglob("report.json"))]
    return {**found, "scores": [report.get("average") for report in reports if isinstance(report, dict)]}


def _commands(out: Path) -> int:
    """How many commands a run folder has seen."""
    path = out / "command.txt"
    return len(path.read_text().splitlines()) if path.is_file() else 0


KINDS = {
    "train": Kind(_train, _commands, _trained),
    "last": Kind(_train, _commands, _trained),
    "disk": Kind(partial(_train, text=True), _commands, _trained),
    "eval": Kind(_eval, lambda out: int((out / "eval").exists()), _answered),
}


def run(
    number: int, seed: int, bench: Bench, scratch: Path, workers: int, told: Callable[[Verdict], None]
) -> list[Verdict]:
    """The verdicts of so many kills."""
    names = [Name("kills", place, seed) for place in range(number)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        straight = _straight_runs({kind_of(name) for name in names}, bench, scratch, pool)

        def one(name: Name) -> Verdict:
            verdict = _judged(name, straight[kind_of(name)], Place(scratch / str(name), bench))
            shutil.rmtree(scratch / str(name), ignore_errors=True)
            told(verdict)
            return verdict

        return list(pool.map(one, names))


def run_one(number: int, seed: int, bench: Bench, scratch: Path) -> list[Verdict]:
    """One kill again, with all that is said."""
    name = Name("kills", number, seed)
    place = Place(scratch / str(name), bench)
    with ThreadPoolExecutor(1) as pool:
        straight = _straight_runs({kind_of(name)}, bench, scratch, pool)
    verdict = _judged(name, straight[kind_of(name)], place)
    for ran in place.runs:
        print(f"--- exit code {ran.code} after {ran.seconds:.1f} s\n{ran.out}{ran.err}")
    print("---", *(sorted(str(path.relative_to(place.out)) for path in place.out.rglob("*"))), sep="\n")
    return [verdict]


def kind_of(name: Name) -> str:
    """What is killed under a name."""
    return ORDER[name.number % len(ORDER)]


def _straight_runs(kinds: set[str], bench: Bench, scratch: Path, pool: ThreadPoolExecutor) -> dict[str, Straight]:
    """The uninterrupted runs that are needed."""
    same = {"last": "train"}

    def straight(kind: str) -> Straight:
        place = Place(scratch / f"straight-{kind}", bench)
        argv = KINDS[kind].argv(place)
        process, began = place.start(argv), time.monotonic()
        wait_until(lambda: KINDS[kind].starts(place.out) > 0, process)
        seen = time.monotonic()
        ran = place.end(process, began)
        if ran.code:
            raise RuntimeError(f"mmllm {' '.join(argv)} fails without any attack: {ran.err}")
        files = [path for path in place.out.rglob("*") if path.is_file()]
        sizes = [path.stat().st_size for path in files]
        return Straight(KINDS[kind].result(place.out), time.monotonic() - seen, max(sizes), sum(sizes))

    needed = sorted({same.get(kind, kind) for kind in kinds})
    made = dict(zip(needed, pool.map(straight, needed), strict=True))
    return {kind: made[same.get(kind, kind)] for kind in kinds}


def _judged(name: Name, straight: Straight, place: Place) -> Verdict:
    """Kill, run again, compare."""
    kind, draw = kind_of(name), name.draw()
    argv = KINDS[kind].argv(place)
    began = time.monotonic()
    with ExitStack() as disks:
        if kind == "disk":
            note = _filled(argv, straight, place, draw, disks)
        else:
            note = _killed(kind, argv, straight, place, draw)
        last = place.run(argv)
        column, why = compare(kind, straight, place, last)
    shown = place.runs[0] if kind == "disk" and place.runs[0].code not in (0, 2) else last
    lines = [line for line in shown.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return Verdict(
        name=str(name),
        generator="kills",
        seed=name.seed,
        column=column,
        why=why,
        note=f"{kind}: {note}",
        argv=argv,
        code=shown.code,
        seconds=round(time.monotonic() - began, 2),
        last=(errors or lines or [""])[-1][:300],
    )


def _killed(kind: str, argv: list[str], straight: Straight, place: Place, draw: random.Random) -> str:
    """Start a command and kill it, one in three twice; says when."""
    notes = []
    for _ in range(draw.choice([1, 1, 2]) if kind == "train" else 1):
        process, began = place.start(argv), time.monotonic()
        stage = draw.randrange(len(STAGES))
        if kind == "last":
            marker = place.out / f"stages/{stage + 1}-{STAGES[stage]}/checkpoint-{STEPS}/complete"
            wait_until(marker.exists, process)
            notes.append(f"killed right after the last checkpoint of stage {STAGES[stage]}")
        else:
            before = KINDS[kind].starts(place.out)
            wait_until(lambda before=before: KINDS[kind].starts(place.out) > before, process)
            wait = draw.uniform(0, straight.seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            notes.append(
                f"killed {wait:.2f} s after the start of the work" if process.poll() is None else "it was done"
            )
        if draw.random() < 0.5:
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        place.end(process, began)
    return ", ".join(notes)


def _filled(argv: list[str], straight: Straight, place: Place, draw: random.Random, disks: ExitStack) -> str:
    """Run a command on a small disk, then give it room; says how small it was.

    Where nothing can be mounted the size of each file is limited instead.
    """
    small = draw.randrange(64 << 10, straight.whole)
    place.out.mkdir()
    if not mount(place.out, small):
        limit = draw.randrange(2 << 10, straight.largest)
        ran = place.run(argv, limit)
        return f"no file larger than {limit} bytes could be written; it ended with {ran.code}"
    disks.callback(subprocess.run, ["umount", "--lazy", str(place.out)], check=False)
    ran = place.run(argv)
    subprocess.run(["mount", "-o", "remount,size=1g", str(place.out)], check=True)
    return f"a disk of {small >> 10} of {straight.whole >> 10} kB; it ended with {ran.code}"


def compare(kind: str, straight: Straight, place: Place, last: Ran) -> tuple[str, str]:
    """(column, why): what came out of the last run against the uninterrupted one."""
    first = place.runs[0]
    for ran in (first, last) if kind == "disk" else (last,):
        if ran.late:
            return "hang", f"stopped after {ran.seconds:.0f} s"
        if "Traceback (most recent call last)" in ran.err:
            return "traceback", f"exit code {ran.code}"
        if ran.code not in (0, 2):
            return "exit 1", f"exit code {ran.code} of the {'full disk' if ran is first else 'last run'}"
    if last.code == 2:
        named = "out" in last.err and len(ERROR_LINE.findall(last.err)) == 1
        return ("refused", "") if kind == "disk" and named else ("silent", "does not go on after it")
    try:
        found = KINDS[kind].result(place.out)
    except (OSError, ValueError, KeyError) as error:
        return "silent", f"what the last run left cannot be read: {error!r}"
    keys = [key for key in {**straight.result, **found} if straight.result.get(key) != found.get(key)]
    if keys:
        shown = [
            f"{key} ({straight.result.get(key)} -> {found.get(key)})" for key in keys if "loss" in key or "num" in key
        ]
        return "silent", f"{len(keys)} differ from the uninterrupted run: {', '.join([*shown, *keys][:4])}"
    return "answered", ""
