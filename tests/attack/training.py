"""Training data and mixes that are damaged, given to `mmllm data check` and to one step of `mmllm train`."""

from __future__ import annotations

import copy
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
from attack.recipes import DRY, TRAIN, dump, run

CHECK = "data check"


def prepare(here: Path, bench: Bench) -> None:
    """A copy of the good data with its media."""
    shutil.copytree(bench.data.parent, here / "d")


def fixed(bench: Bench) -> list[Write]:
    """Data that are wrong in a known way, and good ones."""
    return [*_good(), *_texts(), *_messages(), *_llava(), *_mixes()]


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """A random change of one record, of the bytes of a file, or of a mix."""
    verb = draw.choice([CHECK, CHECK, TRAIN])
    how = draw.choice(["tree", "tree", "tree", "llava", "bytes", "mix"])
    if how == "bytes":
        data = bytearray(bench.data.read_bytes())
        place = draw.randrange(len(data))
        data[place : place + draw.choice([1, 1, 20])] = draw.choice([b"", draw.randbytes(1), b"\xff", b"{", b'"'])
        (here / "d/data.jsonl").write_bytes(data)
        return _run(verb, here, bench, f"bytes changed at {place}", "either")
    if how == "mix":
        mix, note = zoo.mutated(_mix(), draw)
        (here / "d/mix.yaml").write_text(dump(mix))
        return _run(verb, here, bench, f"mix: {note}", "either", "d/mix.yaml")
    records = _as_llava() if how == "llava" else bench.conversations()
    place = draw.choice([1, 2, 5, 0])
    records[place : place + 1], note = zoo.mutated(records[place : place + 1], draw, zoo.JSON)
    _write(here, records)
    return _run(verb, here, bench, f"{how}: record {note}", "either")


def _write(here: Path, records: list[Any]) -> None:
    (here / "d/data.jsonl").write_text("".join(zoo.text(json.dumps(record)) + "\n" for record in records))


def _run(verb: str, here: Path, bench: Bench, note: str, expect: Expect, data: str = "d/data.jsonl") -> Case:
    note = f"{note} [{verb}]"
    if verb == CHECK:
        return Case(["data", "check", data, "--quiet", "--jobs", "1"], note, expect, reports=True)
    recipe = bench.recipe()
    recipe["stages"]["instruct"] |= {"data": data, "batch": 8}
    (here / "mine.yaml").write_text(dump(recipe))
    return run(verb, "mine.yaml", note, expect, "--time-limit", "20")


def _file(note: str, text: str | bytes, expect: Expect, verb: str, name: str = "data.jsonl") -> Write:
    def write(here: Path, bench: Bench) -> Case:
        (here / "d" / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return _run(verb, here, bench, note, expect, f"d/{name}")

    return write


def _good() -> list[Write]:
    def whole(verb: str) -> Write:
        return lambda here, bench: _run(verb, here, bench, "as it is", "answer")

    def llava(verb: str) -> Write:
        def write(here: Path, bench: Bench) -> Case:
            _write(here, _as_llava())
            return _run(verb, here, bench, "as LLaVA writes it", "answer")

        return write

    def mix(verb: str) -> Write:
        def write(here: Path, bench: Bench) -> Case:
            (here / "d/mix.yaml").write_text(dump(_mix()))
            return _run(verb, here, bench, "a mix", "answer", "d/mix.yaml")

        return write

    return [make_it(verb) for make_it in (whole, llava, mix) for verb in (CHECK, TRAIN)]


def _as_llava() -> list[dict[str, Any]]:
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "left"}
    video = {**human, "value": "<video>\nWhat moves?"}
    return [
        {"id": "a", "image": "2.png", "conversations": [human, gpt]},
        {"id": "b", "video": "clips/1.mp4", "conversations": [video, gpt]},
        {"id": "c", "conversations": [{"from": "human", "value": "What?"}, gpt]},
        {"id": "d", "image": ["2.png", "6.png"], "conversations": [{**human, "value": "<image><image>?"}, gpt]},
        *({"id": f"e{number}", "conversations": [{"from": "human", "value": "Why?"}, gpt]} for number in range(4)),
    ]


def _mix() -> dict[str, Any]:
    return {
        "datasets": [
            {"json_path": "data.jsonl", "sampling_strategy": "first:50%", "weight": 1.0},
            {"json_path": "data.jsonl", "sampling_strategy": "random:4", "weight": 2, "start": 1, "root": "."},
        ],
        "seed": 3,
        "length": 16,
    }


def _texts() -> list[Write]:
    depth, one = 100_000, '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    rows: list[tuple[str, str | bytes, Expect]] = [
        ("empty", "", "refuse"),
        ("white space", "\n \n\n", "refuse"),
        ("BOM", "\ufeff" + one * 8, "either"),
        ("UTF-16", one.encode("utf-16"), "refuse"),
        ("not UTF-8", one.encode() + b'{"messages": "\xff"}\n', "refuse"),
        ("lists in one another", "[" * depth + "]" * depth + "\n", "refuse"),
        ("maps in one another", '{"messages": ' * depth + "1" + "}" * depth + "\n", "refuse"),
        ("an unclosed array", "[" + one.strip() + ",", "refuse"),
        ("an array", "[" + ",".join([one.strip()] * 8) + "]", "answer"),
        ("an empty array", "[]", "refuse"),
        ("null", "null\n", "refuse"),
        ("a number", "5\n", "refuse"),
        ("a number of 5,000 digits", "7" * 5000 + "\n", "refuse"),
        ("a number of 5,000 digits inside", one + '{"id": ' + "7" * 5000 + ', "messages": []}\n', "refuse"),
        ("a text", '"x"\n', "refuse"),
        ("zero bytes", bytes(5000), "refuse"),
        ("torn last line", one * 7 + one[:40], "refuse"),
        ("lone surrogate", one.replace('"a"', '"\\ud800"') * 8, "either"),
        ("zero character", one.replace('"a"', '"\\u0000"') * 8, "either"),
        ("separators of lines in a text", one.replace('"a"', '"a\u2028b\x85c"') * 8, "answer"),
        ("a line of 20 MB", one.replace('"a"', '"' + "x" * 20_000_000 + '"') * 2, "either"),
        ("Infinity", one.replace('"a"', "Infinity"), "refuse"),
    ]
    return [_file(note, text, expect, verb) for note, text, expect in rows for verb in (CHECK, TRAIN)]


def _messages() -> list[Write]:
    """One place of a conversation set to something else."""
    rows: list[tuple[str, Any, Expect]] = []

    def add(path: str, values: list[Any], expect: Expect = "refuse") -> None:
        rows.extend((path, value, expect) for value in values)

    numbers = [-1, float("nan"), float("inf"), "x", [], {}, True, 10**400, 5000.0]
    add("messages", [None, 5, "x", {}, [], [5], [None], [[]], True])
    add("messages.0", [None, 5, "x", {}, [], True])
    add("messages.0.role", [None, 5, [], {}, True, "", "nobody", "assistant"])
    add("messages.0.content", [None, 5, {}, True, [5], [None], [[]], [{}], [{"type": 5}], [{"type": "nobody"}]])
    add(
        "messages.0.content",
        ["", [], "<video>", "<image>", [{"type": "text"}], [{"type": "text", "text": 5}]],
        "either",
    )
    add("messages.1.content", [None, 5, {}, True, [5], [None]])
    add("messages.1.content", ["", [], " "], "either")
    add("messages.0.content.0.type", [None, 5, [], {}, "nobody", "image", "audio"])
    add("messages.0.content.0.path", [None, 5, [], {}, True, "", ".", "nobody.mp4", "/dev/zero", "\x00", "x" * 5000])
    add("messages.0.content.0.path", ["https://example.org/a.mp4", "\ud800", "data.jsonl", ["clips/1.mp4"]])
    add("messages.0.content.0.start", numbers)
    add("messages.0.content.0.end", [value for value in numbers if value != 5000.0])
    add("messages.0.content.0.end", [5000.0, None], "either")
    add("messages.0.content.0.fps", [0, *numbers[:-1]])
    add("messages.0.content.0.frames", [0, 1.5, 10**9, *numbers[:-1]])
    add("messages.0.content.1.text", [None, 5, [], {}, True])
    add("id", [None, 5, [], {}, True, "x" * 10**6, "\ud800"], "either")

    def write(path: str, value: Any, expect: Expect, verb: str) -> Write:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))

        def make_it(here: Path, bench: Bench) -> Case:
            records = bench.conversations()
            records[1] = zoo.put(records[1], keys, value)
            _write(here, records)
            return _run(verb, here, bench, f"{path} = {zoo.short(value)}", expect)

        return make_it

    verbs = (TRAIN, CHECK)
    made = [write(path, value, expect, verbs[place % 2]) for place, (path, value, expect) in enumerate(rows)]

    def clip(note: str, change: Callable[[Path], Any], verb: str) -> Write:
        def make_it(here: Path, bench: Bench) -> Case:
            path = here / "d/clips/1.mp4"
            path.unlink()
            change(path)
            return _run(verb, here, bench, f"clip: {note}", "either" if verb == CHECK else "refuse")

        return make_it

    clips: list[tuple[str, Callable[[Path], Any]]] = [
        ("missing", lambda path: None),
        ("empty", lambda path: path.write_bytes(b"")),
        ("text", lambda path: path.write_text("no video" * 99)),
        ("a folder", lambda path: path.mkdir()),
        ("a FIFO", os.mkfifo),
        ("a link to itself", lambda path: path.symlink_to(path)),
    ]
    return made + [clip(note, change, verb) for note, change in clips for verb in verbs]


def _llava() -> list[Write]:
    """The same in the form of LLaVA."""
    rows: list[tuple[str, Any]] = []
    for key in ("image", "conversations"):
        rows += [(key, value) for value in (5, True, {}, [5], [None], [[]])]
    rows += [("conversations", value) for value in (None, "x", [])]
    rows += [
        (f"conversations.{place}.{key}", v) for place in (0, 1) for key in ("from", "value") for v in zoo.TYPES[:4]
    ]
    rows += [("conversations.0.from", "nobody"), ("conversations.0.value", "<image>" * 50), ("image", "nobody.png")]
    rows += [("conversations.0.value", {}), ("conversations.0.value", []), ("conversations.0.from", {})]

    def write(path: str, value: Any, verb: str) -> Write:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))

        def make_it(here: Path, bench: Bench) -> Case:
            records = _as_llava()
            records[0] = zoo.put(records[0], keys, value)
            _write(here, records)
            note, hole = f"llava {path} = {zoo.short(value)}", (path, value) == ("image", "nobody.png")
            return _run(verb, here, bench, note, "either" if hole else "refuse")

        return make_it

    return [write(path, value, (CHECK, TRAIN)[place % 2]) for place, (path, value) in enumerate(rows)]


def _mixes() -> list[Write]:
    """A mix with one place set to something else."""
    rows: list[tuple[str, Any, Expect]] = []

    def add(path: str, values: list[Any], expect: Expect = "refuse") -> None:
        rows.extend((path, value, expect) for value in values)

    nan, inf = float("nan"), float("inf")
    add("datasets.0.weight", [nan, inf, -inf, -1, 0, "x", [], {}, True, zoo.DIGITS_400, zoo.DIGITS_5000, None])
    add("datasets.0.weight", [1e308, 1e-308], "either")
    strategies = [
        "first:inf%",
        "first:nan%",
        "first:-5%",
        "first:0",
        "first:-1",
        "first:x",
        "first:",
        "nobody:5",
        "all:5",
    ]
    strategies += [
        "first:1e400%",
        "random:inf",
        "random:5.5",
        "end:%",
        "first:5%%",
        "",
        ":",
        "random:" + "9" * 5000,
        "٣",
    ]
    add("datasets.0.sampling_strategy", [*strategies, 5, None, [], {}, True])
    add("datasets.0.sampling_strategy", ["first:1000%", "end:" + "9" * 400, "all:", "first:0.0001%"], "either")
    add("datasets.0.start", [-1, 10**9, 1.5, nan, "x", [], True, zoo.DIGITS_400])
    add("datasets.0.root", [5, None, [], {}, True])
    add("datasets.0.root", ["nobody", "", "/", "/dev/null"], "either")
    add("datasets.0.format", ["nobody", 5, [], {}, True, "parquet", "webdataset", "llava"])
    add("datasets.0.json_path", [5, None, [], {}, True, "", ".", "/", "nobody.json", "mix.yaml", "/dev/zero", "\x00"])
    add("datasets.0.nobody", [1])
    add("datasets.0", [None, 5, [], True, {}, "nobody.json"])
    add("datasets", [None, 5, "x", {}, [], [None]])
    add("seed", [-1, 1.5, nan, "x", [], {}, True])
    add("seed", [zoo.DIGITS_400, 2**63], "either")
    add("length", [0, -1, 1.5, nan, "x", [], {}, True])
    add("length", [10**12, zoo.DIGITS_400], "either")
    add("root", [[], {}, "nobody", True, ""], "either")
    add("nobody", [1])

    def write(path: str, value: Any, expect: Expect, verb: str) -> Write:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))

        def make_it(here: Path, bench: Bench) -> Case:
            mix = zoo.put(copy.deepcopy(_mix()), keys, value)
            (here / "d/mix.yaml").write_text(dump(mix))
            return _run(verb, here, bench, f"mix {path} = {zoo.short(value)}", expect, "d/mix.yaml")

        return make_it

    verbs = (CHECK, DRY)
    made = [write(path, value, expect, verbs[place % 2]) for place, (path, value, expect) in enumerate(rows)]
    texts = [
        "",
        "[1]",
        "x",
        "datasets: [",
        "datasets: &d [*d]",
        "datasets: !!python/object/apply:os.system [x]",
        "\x00",
    ]
    return made + [_file(f"mix {zoo.short(text)}", text, "refuse", CHECK, "mix.yaml") for text in texts]
