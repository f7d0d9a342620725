"""Overrides and flags out of range, of a wrong type, or without any sense."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from attack import zoo
from attack.bench import Bench
from attack.case import Case, Expect, Write
from attack.recipes import DRY, SHOW, TRAIN, dump, run

CLIP = "media/real.mp4"


def prepare(here: Path, bench: Bench) -> None:
    """A good recipe."""
    (here / "good.yaml").write_text(dump(bench.recipe()))


def fixed(bench: Bench) -> list[Write]:
    """Command lines that are wrong in a known way."""
    return [*_flags(), *_overrides(), *_brace_patterns()]


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """One or two random overrides of a shipped nano recipe."""
    name = draw.choice(sorted(bench.recipes()))
    data = bench.recipe(name)
    (here / "mine.yaml").write_text(dump(data))
    lines = []
    for _ in range(draw.choice([1, 1, 2])):
        path = [str(key) for key in draw.choice(zoo.places(data))]
        nodes = data["model"]["connector"]
        if path[:2] == ["model", "connector"] and len(path) > 2:  # nodes are addressed by name
            path[2] = nodes[int(path[2])]["name"]
        if draw.random() < 0.15:
            path[draw.randrange(len(path))] = draw.choice(["nobody", "", "0", "x" * 3000, "é", "__class__"])
        lines.append(f"{'.'.join(path)}={written(draw.choice(zoo.ALL))}")
    lines = [line.replace("\x00", "") for line in lines]
    verb = draw.choice([SHOW, DRY, DRY, TRAIN])
    return run(verb, "mine.yaml", f"{name}: {'; '.join(map(zoo.short, lines))}", "either", *lines)


def written(value: Any) -> str:
    """A value as a person writes it behind the `=`."""
    if isinstance(value, str):
        return zoo.text(value)
    return zoo.text(yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip())


def _case(note: str, argv: Callable[[Path, Bench], list[str]], expect: Expect, **kinds: Any) -> Write:
    return lambda here, bench: Case(argv(here, bench), note, expect, **kinds)


def _ask(*flags: str) -> Callable[[Path, Bench], list[str]]:
    def argv(here: Path, bench: Bench) -> list[str]:
        short = [] if "--max-new-tokens" in flags else ["--max-new-tokens", "2"]
        return ["ask", "--model", str(bench.model), "--video", str(bench.root / CLIP), *short, *flags, "What?"]

    return argv


def _train(*words: str) -> Callable[[Path, Bench], list[str]]:
    def argv(here: Path, bench: Bench) -> list[str]:
        flags = {"--out": "out", "--jobs": "0", "--device": "cpu"}
        own = [word for flag, value in flags.items() if flag not in words for word in (flag, value)]
        return ["train", "good.yaml", *own, "--quiet", "stages.instruct.steps=1", *words]

    return argv


def _dry(*words: str) -> Callable[[Path, Bench], list[str]]:
    return lambda here, bench: ["train", "good.yaml", "--dry-run", *words]


def _eval(*words: str) -> Callable[[Path, Bench], list[str]]:
    def argv(here: Path, bench: Bench) -> list[str]:
        tasks = [] if "--tasks" in words else ["--tasks", "mvbench"]
        limit = [] if "--limit" in words else ["--limit", "1"]
        floors = [] if "--baselines" in words else ["--baselines", "none"]
        own = [*tasks, *limit, *floors, "--root", f"mvbench={bench.world / 'mvbench'}"]
        out = [] if "--out" in words else ["--out", "out"]
        return ["eval", "--model", str(bench.model), *own, *out, *words]

    return argv


def _data(*words: str) -> Callable[[Path, Bench], list[str]]:
    return lambda here, bench: ["data", "check", str(bench.data), "--quiet", *words]


def _flags() -> list[Write]:
    rows: list[Write] = []

    def add(argv: Callable[..., Any], flag: str, values: list[str], expect: Expect, **kinds: Any) -> None:
        verb = argv.__name__.strip("_")
        rows.extend(_case(f"{verb} {flag} {value!r}", argv(flag, value), expect, **kinds) for value in values)

    no_count = ["-1", "1.5", "x", "", "nan", "9" * 5000]
    add(_train, "--jobs", [*no_count], "refuse")
    add(_dry, "--jobs", ["-1", "1000000"], "either")
    add(_data, "--jobs", ["0", "-1", "x", "1.5"], "refuse", reports=False)
    add(_data, "--jobs", ["500"], "answer")
    add(_train, "--seed", ["-1", "1.5", "x", "", str(2**64), "9" * 400], "refuse")
    add(_train, "--seed", [str(2**31), str(2**40)], "either")
    add(_train, "--report-to", ["nobody", "", "none,nobody", "None", "all", "tensorboard"], "either")
    add(_train, "--report-to", ["nobody", "x y"], "refuse")
    for argv in (_train, _ask, _eval):
        add(argv, "--device", ["gpu", "cuda:99", "", "cpu:x", "nobody", "cuda:-1", "tpu"], "refuse")
        add(argv, "--device", ["meta", "cpu:7", "mps"], "either")
        add(argv, "--dtype", ["float8", "", "int8"], "refuse")
        add(argv, "--time-limit", ["0", "-1", "nan", "inf", "x", "", "-inf"], "refuse")
        add(argv, "--time-limit", ["1e-9", "1e30", "1e308"], "either")
        add(argv, "--backend", ["nobody", "", "../x", "os"], "refuse")
        add(argv, "--plugin", ["nobody.py", ".", "", "/dev/null"], "either")
    sizes = ["0GB", "-1GB", "nanGB", "infGB", "GB", "", "x", "5", "1e400GB", "5PB", "0.0000000000001MB", "-infTB"]
    rows += [_case(f"--cache-size {s!r}", _train("--cache", "frames", "--cache-size", s), "refuse") for s in sizes]
    add(_train, "--cache", ["nobody", "frames,nobody", "/"], "refuse")
    add(_train, "--cache-dir", ["/dev/null", "good.yaml"], "either")
    rows.append(_case("kept in /dev/null", _train("--cache", "frames", "--cache-dir", "/dev/null"), "refuse"))
    rows.append(_case("kept in a file", _train("--cache", "frames", "--cache-dir", "good.yaml"), "refuse"))
    add(_ask, "--max-new-tokens", ["0", "-1", "x", "1.5", "9" * 400], "refuse")
    add(_ask, "--max-new-tokens", ["1000000000", "5000", str(2**63)], "either")
    for argv in (_ask, _eval):
        add(argv, "--frames", ["0", "-1", "1000000000", "4097", "x", "1.5", "9" * 400], "refuse")
    add(_ask, "--fps", ["0", "-1", "nan", "inf", "1e9", "x", "", "-inf"], "refuse")
    add(_ask, "--fps", ["1e-9", "1e-300", "30"], "either")
    rows.append(_case("frames and fps", _ask("--frames", "3", "--fps", "1"), "refuse"))
    add(_eval, "--batch", ["0", "-1", "x", "1.5"], "refuse")
    add(_eval, "--batch", ["1000000000000"], "answer")
    add(_eval, "--limit", ["0", "-1", "x", "1.5"], "refuse")
    add(_eval, "--limit", [str(10**18)], "either")
    add(_data, "--limit", ["0", "-1", "x"], "refuse")
    add(_data, "--frames", ["0", "-1", "x"], "refuse")
    add(_eval, "--tasks", ["", ",", " ", "nobody", "mvbench,nobody", ".."], "refuse")
    add(_eval, "--tasks", ["mvbench,mvbench"], "either")
    add(_eval, "--protocol", ["nobody", "", "../x", "."], "refuse")
    add(_eval, "--baselines", ["nobody", ",", "blind,nobody", ""], "either")
    add(_eval, "--root", ["mvbench", "mvbench=", "mvbench=nowhere", "=x", "mvbench=/dev/null"], "refuse")
    add(_eval, "--root", ["nobody=x"], "either")
    add(_eval, "--model", ["", "nowhere", "/dev/null", "."], "refuse")
    add(_train, "--save-steps", ["0", "-1", "x", "1.5", "", "nan"], "refuse")
    add(_train, "--save-steps", [str(10**18)], "either")
    add(_train, "--stages", [",", "nobody", "instruct,nobody", " ", "instruct,instruct,nobody"], "refuse")
    add(_train, "--stages", ["", "instruct,"], "refuse")
    add(_train, "--stages", ["instruct,instruct"], "either")
    add(_train, "--deepspeed", ["nobody", "zero3", "", "zero9", ".", "good.yaml", "/dev/null"], "refuse")
    for argv in (_train, _eval):
        add(argv, "--out", ["/dev/null", "/dev/null/x", "good.yaml", "good.yaml/x", "x" * 5000], "refuse")
        add(argv, "--out", ["", "a\nb", "\udcff", "-"], "either")
    add(_data, "--out", ["/dev/null/x", ".", "good.yaml/x"], "refuse")
    add(_data, "--root", ["nowhere", "/dev/null", ""], "either", reports=True)
    sheets = ["0x0", "-1x5", "5", "x", "1e9x1e9", "99999999999x99999999999", "5x5x5", "٣x٣", "²x²"]
    rows += [
        _case(f"--size {s}", lambda h, b, s=s: ["recipe", "show", "nano/llava_onevision", "--image", "--size", s], e)
        for s in sheets
        for e in ["either" if s in (sheets[5], sheets[7]) else "refuse"]
    ]
    words = [[], ["nobody"], ["recipe"], ["recipe", "nobody"], ["train"], ["ask"], ["--nobody"], ["eval", "nobody"]]
    words += [["train", name] for name in ("", ".", "/", "/dev/null", "../..", "x" * 5000, "nano", "\udcff", "a\nb")]
    words += [["recipe", "show", name] for name in ("", ".", "/dev/zero", "nano/", "nano/../nano/llava", "\x00")]
    words += [["lab", name] for name in ("", ".", "nobody.yaml", "/dev/null")]
    words += [
        ["inspect", "--model", "nowhere"],
        ["world", "make", "--level", "nobody"],
        ["world", "make", "--jobs", "x"],
    ]
    words += [["world", "show", "--out", "nowhere"], ["world", "make", "--level", "tiny", "--out", "/dev/null"]]
    words += [["world", "make", "--level", "tiny", "--out", "good.yaml"], ["world", "show", "--out", "."]]
    words += [["world", "make", "--level", "tiny", "--out", "w", "--seed", seed] for seed in ("-1", "x", "1.5")]
    soft = {"nano/../nano/llava", "/dev/zero", "-1"}
    for word in words:
        expect: Expect = "either" if soft & set(word) else "refuse"
        rows.append(_case(f"mmllm {' '.join(map(zoo.short, word))}", lambda h, b, w=word: list(w), expect))
    return rows


def _overrides() -> list[Write]:
    """Overrides by hand."""
    refused = [
        "data=/",
        "nobody=1",
        "=1",
        "x",
        "model=1",
        "model=",
        "stages=1",
        "stages.instruct=1",
        "stages.nobody.lr=1",
    ]
    refused += ["model.connector=1", "model.connector.mlp=1", "model.connector.nobody.x=1", "model.encoders=1"]
    refused += [
        "model.llm.config=1",
        "model.media=1",
        "model.media.frames=1e9",
        "model.media.frames=",
        "base=nano/merv",
    ]
    refused += ["stages.instruct.lr=nan", "stages.instruct.lr=inf", "stages.instruct.lr=-1", "stages.instruct.lr=abc"]
    refused += ["stages.instruct.lr=[", "stages.instruct.lr={", "stages.instruct.lr=!!python/object:x", "a..b=1", ".=1"]
    refused += ["stages.instruct.steps=0", "stages.instruct.steps=-1", "stages.instruct.steps=1.5"]
    refused += ["stages.instruct.batch=0", "stages.instruct.batch=-1", "stages.instruct.batch=x"]
    refused += ["stages.instruct.data=/", "stages.instruct.data=", "stages.instruct.data=nobody.jsonl", "roots=1"]
    refused += [
        "stages.instruct.data=/dev/zero",
        "stages.instruct.data=/proc/self/mem",
        "stages.instruct.trains=nobody",
    ]
    refused += ["stages.instruct.warmup=-1", "stages.instruct.warmup=nan", "stages.instruct.clip=-1", "summary.x=1"]
    refused += ["model.connector.mlp.width=0", "model.connector.mlp.width=-5", "model.connector.mlp.depth=1e9"]
    refused += [f"model.connector.mlp.width={'9' * 5000}", f"stages.instruct.lr={'9' * 5000}", "model.output=nobody"]
    refused += ["model.connector.mlp.name=a.b", "model.connector.mlp.type=nobody", "stages.a/../../b.lr=1", "eval=1"]
    refused += [f"model.llm.config.x={'[' * 5000}{']' * 5000}", f"{'a.' * 20000}a=1", "model.llm.config.vocab_size=1"]
    refused += ["model.llm.template={% for", "model.llm.template={{ 1/0 }}", "model.llm.config.model_type=t5"]
    good = ["stages.instruct.lr=1e-5", "model.media.frames=2", "stages.instruct.batch=2", "roots.x=/", "summary=x"]

    def override(line: str, expect: Expect) -> Write:
        return lambda here, bench: run(DRY, "good.yaml", f"override {zoo.short(line)}", expect, line)

    return [*(override(line, "refuse") for line in refused), *(override(line, "answer") for line in good)]


def _brace_patterns() -> list[Write]:
    """Names with braces that stand for millions of files, in a mix."""
    patterns = [
        "d_{0..29999999}.json",
        "d_{00000000..30000000}.jsonl",
        "{0..9999}/{0..2999}.json",
        "{a,b}" * 25 + ".json",
    ]
    patterns += [
        "s-{000000..30000000}.tar",
        "{" * 3000 + "a,b" + "}" * 3000,
        "{0..99999999999999999999}.json",
        "{5..1}.json",
    ]
    patterns += ["{-1..3}.json", "{a..}.json", "{}.json", "{,}.json", "{0..9" * 2000, "{1..x}.json", "{٣..٤}.json"]

    def in_mix(pattern: str, verb: str) -> Write:
        def write(here: Path, bench: Bench) -> Case:
            (here / "mix.yaml").write_text(yaml.safe_dump({"datasets": [{"json_path": pattern}]}))
            if verb == "check":
                return Case(
                    ["data", "check", "mix.yaml", "--quiet"], f"check {zoo.short(pattern)}", "refuse", reports=True
                )
            note = f"train {zoo.short(pattern)}"
            return run(DRY, "good.yaml", note, "refuse", f"stages.instruct.data={verb or 'mix.yaml'}")

        return write

    return [in_mix(pattern, verb) for pattern in patterns for verb in ("check", "mix.yaml", pattern)]
