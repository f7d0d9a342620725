"""Benchmarks whose annotation files or clips are damaged, looked at by `mmllm eval check` and `mmllm eval`."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack import zoo
from attack.bench import Bench
from attack.case import Case, Expect, Write

STEMS = {"mvbench": ("action_sequence", "state_change", "episodic_reasoning"), "mlvu": ("1_plotQA", "4_count")}
Rows = list[dict[str, Any]]


def fixed(bench: Bench) -> list[Write]:
    """Benchmarks that are wrong in a known way, and good ones."""
    return [*_good(), *_texts(), *_fields(), *_clips()]


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """A random change of one item, or of the bytes of a file."""
    name = draw.choice(list(STEMS))
    file = _benchmark(here, bench, name) / "json" / f"{draw.choice(STEMS[name])}.json"
    rows = json.loads(file.read_text())
    how = draw.choice(["tree", "tree", "tree", "cut", "flip"])
    if how == "tree":
        rows[:1], note = zoo.mutated(rows[:1], draw, zoo.JSON)
        file.write_text(zoo.text(json.dumps(rows)))
    else:
        data = bytearray(file.read_bytes())
        place = draw.randrange(len(data))
        if how == "cut":
            del data[place:]
        else:
            data[place] = draw.randrange(256)
        file.write_bytes(data)
        note = f"{how} at byte {place}"
    return _run(draw.choice(["check", "eval", "skip"]), bench, name, f"{file.name}: {note}", "either")


def _benchmark(here: Path, bench: Bench, name: str) -> Path:
    """A copy of the annotations beside the clips of the world."""
    root = here / name
    shutil.copytree(bench.world / name / "json", root / "json")
    (root / "video").symlink_to(bench.world / name / "video")
    return root


def _run(verb: str, bench: Bench, name: str, note: str, expect: Expect) -> Case:
    """Look at a benchmark, or evaluate one item a task."""
    note, where = f"{name} {note} [{verb}]", ["--tasks", name, "--root", f"{name}={name}"]
    if verb == "check":
        return Case(["eval", "check", *where], note, expect, reports=True)
    flags = ["--limit", "1", "--baselines", "none", "--out", "out", "--quiet", "--time-limit", "20"]
    flags += ["--missing", "skip"] if verb == "skip" else []
    return Case(["eval", "--model", str(bench.model), *where, *flags], note, expect)


def _file(note: str, text: str | bytes | Callable[[str], str | bytes], expect: Expect, verb: str, name: str) -> Write:
    """One annotation file replaced by a text."""

    def write(here: Path, bench: Bench) -> Case:
        file = _benchmark(here, bench, name) / "json" / f"{STEMS[name][0]}.json"
        made = text(file.read_text()) if callable(text) else text
        file.write_bytes(made if isinstance(made, bytes) else made.encode())
        return _run(verb, bench, name, note, expect)

    return write


def _good() -> list[Write]:
    return [_file("as it is", lambda text: text, "answer", verb, name) for name in STEMS for verb in ("check", "eval")]


def _texts() -> list[Write]:
    depth = 100_000
    rows: list[tuple[str, Any, Expect]] = [
        ("empty", "", "refuse"),
        ("half of it", lambda text: text[: len(text) // 2], "refuse"),
        ("BOM", lambda text: b"\xef\xbb\xbf" + text.encode(), "either"),
        ("UTF-16", lambda text: text.encode("utf-16"), "refuse"),
        ("not UTF-8", b"[\xff\xfe]", "refuse"),
        ("lists in one another", "[" * depth + "]" * depth, "refuse"),
        ("maps in one another", '[{"video": ' + '{"a":' * depth + "1" + "}" * depth + "}]", "refuse"),
        ("null", "null", "refuse"),
        ("a number of 5,000 digits", f'[{{"video": {"7" * 5000}}}]', "refuse"),
        ("a map", "{}", "refuse"),
        ("a text", '"x"', "refuse"),
        ("no items", "[]", "either"),
        ("items of no type", "[1, null, []]", "refuse"),
        ("JSON lines", '{"a": 1}\n{"a": 2}\n', "refuse"),
        ("NaN", "NaN", "refuse"),
        ("zero bytes", bytes(1000), "refuse"),
    ]
    verbs = ("check", "eval")
    return [
        _file(note, text, expect, verbs[place % 2], name)
        for name in STEMS
        for place, (note, text, expect) in enumerate(rows)
    ]


def _fields() -> list[Write]:
    """One field of every item of a file set to something else."""
    nothing = [None, [], {}, True, [1], {"x": 1}]
    rows: list[tuple[str, Any, Expect]] = []
    for key in ("video", "question", "answer", "candidates"):
        rows += [(key, value, "either" if (key, value) == ("candidates", [1]) else "refuse") for value in nothing]
    rows += [("candidates", value, "refuse") for value in ("x", 5, [None], [[]], ["x"] * 27, [{}])]
    rows += [("candidates", value, "either") for value in ([], [""], ["x"], [5, 6], ["same", "same"], ["\ud800", "x"])]
    rows += [("answer", value, "either") for value in (5, "", "nobody", "\ud800", "x" * 10**6)]
    rows += [("question", value, "either") for value in ("", "\ud800", "<video>", "<image>", "x" * 10**6, "\x00", 5)]
    rows += [("question", value, "either") for value in ("<|im_end|>", "<s>", "</s>" * 99, "{{ 1/0 }}")]
    outside = ["../../../../../../../../etc/passwd", "/etc/passwd", "../x.mp4", "/dev/zero", "/proc/self/mem"]
    rows += [("video", value, "refuse") for value in [*outside, "", ".", "x" * 5000, "\x00", "\ud800", "/", "a\nb"]]
    made: list[Write] = []
    verbs = ("check", "eval")
    for place, (key, value, expect) in enumerate(rows):
        name = ("mvbench", "mlvu")[place % 2]
        verb = "eval" if key == "video" and isinstance(value, str) else verbs[place // 2 % 2]
        made.append(_file(f"{key} = {zoo.short(value)}", _setting({key: value}), expect, verb, name))
    bounds: list[tuple[Any, Any, Expect]] = [
        (2.0, 1.0, "refuse"),
        (float("nan"), 1.0, "refuse"),
        (5000.0, 5001.0, "refuse"),
    ]
    bounds += [(float("inf"), 1.0, "refuse"), (-5.0, 1.0, "refuse"), (None, 1.0, "refuse"), ("0", "1", "refuse")]
    bounds += [(True, False, "refuse"), ([], {}, "refuse"), (0.0, 1e308, "either"), (0.0, 0.0, "refuse")]
    bounds += [
        (0.0, float("nan"), "refuse"),
        (10**400, 10**401, "refuse"),
        (0, 1, "either"),
        (1e-300, 2e-300, "either"),
    ]
    for start, end, expect in bounds:
        change = _setting({"start": start, "end": end})
        made.append(_file(f"{zoo.short(start)} to {zoo.short(end)}", change, expect, "eval", "mvbench"))
    return made


def _setting(values: dict[str, Any]) -> Callable[[str], str]:
    return lambda text: json.dumps([{**row, **values} for row in json.loads(text)])


def _clips() -> list[Write]:
    """The clip of the first item replaced by something else; `skip` leaves it out and counts it."""

    def remove(path: Path) -> None:
        path.unlink()

    def replaced(write: Callable[[Path], Any]) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            write(path)

        return change

    changes: list[tuple[str, Callable[[Path], Any], Expect]] = [
        ("missing", remove, "refuse"),
        ("empty", replaced(lambda path: path.write_bytes(b"")), "refuse"),
        ("text", replaced(lambda path: path.write_text("no video" * 99)), "refuse"),
        ("half", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "refuse"),
        ("a folder", replaced(lambda path: path.mkdir()), "refuse"),
        ("a FIFO", replaced(os.mkfifo), "refuse"),
        ("a link to itself", replaced(lambda path: path.symlink_to(path)), "refuse"),
        ("/dev/zero", replaced(lambda path: path.symlink_to("/dev/zero")), "refuse"),
    ]

    def clip(note: str, change: Callable[[Path], Any], expect: Expect, verb: str) -> Write:
        def write(here: Path, bench: Bench) -> Case:
            root = _benchmark(here, bench, "mlvu")
            (root / "video").unlink()
            shutil.copytree(bench.world / "mlvu/video", root / "video")
            row = json.loads((root / "json/4_count.json").read_text())[0]
            change(next((root / "video").glob(f"*count/{row['video']}")))
            return _run(verb, bench, "mlvu", f"clip: {note}", expect)

        return write

    return [
        clip(note, change, "either" if verb == "skip" else expect, verb)
        for note, change, expect in changes
        for verb in ("eval", "skip")
    ]
