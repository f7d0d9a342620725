"""Recipes that are wrong: by hand what is known to be dangerous, then changes drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from attack import zoo
from attack.bench import Bench
from attack.case import Case, Expect, Ran, Write

SHOW, CHECK, DRY, TRAIN = "show", "check", "dry", "train"
Change = Callable[[dict[str, Any]], Any]


def fixed(bench: Bench) -> list[Write]:
    """Recipes that are wrong in a known way, and good ones."""
    return [*_texts(), *_values(), *_good(bench)]


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """One to three random changes of a shipped nano recipe."""
    names = sorted(bench.recipes())
    name, count = draw.choice(["llava", *names]), draw.choice([1, 1, 1, 2, 3])
    data, notes = bench.recipe(name), []
    for _ in range(count):
        data, note = zoo.mutated(data, draw)
        notes.append(note)
    verb = draw.choice([SHOW, CHECK, DRY, DRY, TRAIN])
    (here / "mine.yaml").write_text(dump(data))
    return run(verb, "mine.yaml", f"{name}: {'; '.join(notes)}", "either")


def dump(data: Any) -> str:
    """A recipe or a mix as YAML, with equal values written out: nothing but the change is unusual in it."""
    return zoo.text(yaml.dump(data, Dumper=_Plain, sort_keys=False, allow_unicode=True))


class _Plain(yaml.SafeDumper):
    """Writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value is written out again."""
        return True


def run(verb: str, file: str, note: str, expect: Expect, *more: str, **kinds: Any) -> Case:
    """Give a recipe to a verb; what is really trained takes one step, whatever the recipe says."""
    argv = {
        SHOW: ["recipe", "show", file],
        CHECK: ["recipe", "check", file],
        DRY: ["train", file, "--dry-run", "--device", "cpu"],
        TRAIN: ["train", file, "--out", "out", "--jobs", "0", "--device", "cpu", "--quiet"],
    }[verb]
    more = (*more, "stages.instruct.steps=1", "stages.instruct.epochs=null") if verb == TRAIN else more
    return Case([*argv, *more], note, expect, **kinds)


def _written(note: str, text: str | Callable[[Bench], str], expect: Expect, verb: str = SHOW, **kinds: Any) -> Write:
    def write(here: Path, bench: Bench) -> Case:
        content = text if isinstance(text, str) else text(bench)
        (here / "mine.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
        return run(verb, "mine.yaml", note, expect, **kinds)

    return write


def _changed(note: str, change: Change, expect: Expect, verb: str, name: str = "llava") -> Write:
    def text(bench: Bench) -> str:
        data = bench.recipe(name)
        return dump(change(data) or data)

    return _written(f"{note} [{verb}]", text, expect, verb)


def _good(bench: Bench) -> list[Write]:
    """Every recipe as it is."""

    def good(name: str, verb: str) -> Write:
        return _written(f"good {name} [{verb}]", lambda bench: dump(bench.recipe(name)), "answer", verb)

    return [good(name, verb) for name in bench.recipes() for verb in (SHOW, CHECK, DRY, TRAIN)]


def _texts() -> list[Write]:
    """What is wrong with the file itself, or with its bases."""

    def chain(here: Path, bench: Bench) -> Case:
        for number in range(1200):
            (here / f"r{number}.yaml").write_text(f"base: r{number + 1}.yaml\n")
        (here / "r1200.yaml").write_text(dump(bench.recipe()))
        return run(SHOW, "r0.yaml", "a chain of 1,200 bases", "either")

    def circle(here: Path, bench: Bench) -> Case:
        for number in range(3):
            (here / f"r{number}.yaml").write_text(f"base: r{(number + 1) % 3}.yaml\n")
        return run(SHOW, "r0.yaml", "bases in a circle", "refuse")

    def fan(here: Path, bench: Bench) -> Case:
        for number in range(26):
            (here / f"r{number}.yaml").write_text(f"base: [r{number + 1}.yaml, r{number + 1}.yaml]\n")
        (here / "r26.yaml").write_text(dump(bench.recipe()))
        return run(SHOW, "r0.yaml", "bases that double 26 times", "either")

    def victim(verb: str) -> Write:
        def write(here: Path, bench: Bench) -> Case:
            data = bench.recipe()
            data["stages"] = {"x/../../victim": data["stages"]["instruct"]}
            (here / "mine.yaml").write_text(dump(data))

            def check(ran: Ran) -> str | None:
                found = [path for path in here.parent.rglob("*victim*") if "out" not in path.relative_to(here).parts]
                return f"canary: wrote {found[0]}" if found else None

            case = run(verb, "mine.yaml", f"a stage called x/../../victim [{verb}]", "refuse", check=check)
            case.argv = [word for word in case.argv if not word.startswith("stages.")]
            return case

        return write

    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    bomb = "a0: &a0 [x, x]\n" + "\n".join(levels) + "\n"
    maps = ["m0: &m0 {x: 1}", *(f"m{n}: &m{n} {{a: *m{n - 1}, b: *m{n - 1}, c: *m{n - 1}}}" for n in range(1, 26))]
    wrong = [
        ("empty file", ""),
        ("only a comment", "# nothing\n"),
        ("a list", "[1, 2]\n"),
        ("a text", "nano/llava\n"),
        ("not YAML", "model: [unclosed\n"),
        ("tabs", "model:\n\t- x\n"),
        ("binary", "\x00\x01\x02"),
        ("not UTF-8", "summary: \udcff\udcfe\n"),
        ("two documents", "base: nano/llava\n---\nbase: nano/llava\n"),
        ("python object", "model: !!python/object/apply:os.system ['touch canary']\n"),
        ("unknown tag", "model: !x {a: 1}\n"),
        ("alias bomb", bomb + "base: nano/llava\nmodel: {llm: {config: *a11}}\n"),
        ("alias bomb of maps", "\n".join(maps) + "\nbase: nano/llava\nmodel: *m25\n"),
        ("alias bomb as base", bomb + "base: *a11\n"),
        ("alias of itself", "base: nano/llava\nmodel: &m {media: *m}\n"),
        ("alias of itself as list", "base: nano/llava\nmodel: {connector: &c [*c]}\n"),
        ("20,000 lists in one another", f"base: nano/llava\nsummary: {'[' * 20000}{']' * 20000}\n"),
        ("20,000 maps in one another", f"base: nano/llava\nmodel: {'{a: ' * 20000}1{'}' * 20000}\n"),
        ("a key twice", "base: nano/llava\nmodel: {media: {frames: 4}}\nmodel: 5\n"),
        ("a list as key", "base: nano/llava\n? [1, 2]\n: 3\n"),
        ("null as key", "base: nano/llava\nnull: 3\n"),
        ("base: itself", "base: mine.yaml\n"),
        ("base: nobody", "base: nano/nobody\n"),
        ("base: a folder", "base: .\n"),
        ("base: /dev/zero", "base: /dev/zero\n"),
        ("base: a path of 9,000 characters", f"base: {'x' * 9000}\n"),
        ("model: 1", "base: nano/llava\nmodel: 1\n"),
        ("model: null", "base: nano/llava\nmodel: null\n"),
        ("only a base of a base", "base: nano/base\nmodel: {encoders: null}\n"),
    ]
    bases = [(f"base: {zoo.short(value)}", yaml.safe_dump({"base": value, "summary": "x"})) for value in zoo.TYPES]
    cases = [chain, circle, fan, *(victim(verb) for verb in (SHOW, CHECK, DRY, TRAIN))]
    return cases + [_written(note, text, "refuse") for note, text in [*wrong, *bases]]


def _values() -> list[Write]:
    """A wrong value at a place where it is known what belongs there."""
    rows: list[Write] = []

    def add(verbs: str, path: str, values: list[Any], expect: Expect = "refuse", name: str = "llava") -> None:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        for place, value in enumerate(values):
            verb = verbs.split()[place % len(verbs.split())]
            change = _putting(keys, value)
            rows.append(_changed(f"{path} = {zoo.short(value)}", change, expect, verb, name))

    no_size = [0, -1, 2**40, zoo.DIGITS_400, zoo.DIGITS_5000, 1.5, float("nan"), "x", True, [], {}]
    no_rate = [-1, float("nan"), float("inf"), "x", [], {}, True, zoo.DIGITS_400]
    no_text = [5, -1.5, True, [], {}, [None]]
    add("show check", "model.connector.0.in", [5, [], {}, [5], [None], [[]], True, "mlp", ["nano", "nobody"]])
    add("show check dry", "model.connector.0.width", [0, -1, 2**40, zoo.DIGITS_400, 1.5, True, [], {}, "x"])
    add("show check dry", "model.connector", [None, 5, "mlp", {}, [], [None], [5], [[]], [{}], [{"type": None}]])
    add("show check", "model.connector.0.type", [None, 5, [], {}, True, "nobody", "os.system", ""])
    add("show check", "model.connector.0.name", [5, [], {}, True, "a.b", "", "x/../y", "nano"])
    add("show check", "model.encoders", [None, 5, "nano", [], {}, [None], True])
    add("show check", "model.encoders.nano", [5, "nano_conv", [], {}, True, {"type": "nobody"}, {"type": [1]}])
    add("show check", "model.encoders.nano.type", [None, 5, [], {}, True, "nobody", "mlp"])
    add("show check dry", "model.encoders.nano.channels", [None, 5, "x", {}, [], [0], [-1], [2**40], [None], [1.5]])
    add("show check dry", "model.encoders.nano.size", no_size)
    add("show check dry", "model.encoders.nano.grid", [None, 0, [], [0, 0], [3], [-1, -1], [2**40, 1], "x", {}])
    add("show check dry", "model.media.frames", [0, -1, 10**9, zoo.DIGITS_400, 1.5, "x", True, [], {}])
    add("show check dry", "model.media.fps", [0, -1, float("nan"), float("inf"), "x", True, [], {}])
    add("show check", "model.media", [5, "x", [], True, {"frame": 8}, {"frames": 8, "fps": 1}])
    add("show check", "model.media.tiles", [5, "x", True, {"x": 1}, {"grids": 5}])
    add("show check dry", "model.output", [5, -1.5, True, [], {}, [None], "nobody", ["mlp", "nobody"]])
    add("show check dry", "model.place", [5, "x", True, [], {"nobody": "start"}, {"mlp": "nowhere"}, {"mlp": 5}])
    add("show check dry", "model.text", [5, "x", True, [1], {"a": None}, {"a": 5}, {"a": {"type": "nobody"}}])
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        add("show dry check", f"model.llm.config.{key}", [0, -1, 2**40, zoo.DIGITS_400, 1.5, "x", None, [], {}])
    add("show dry check", "model.llm.config.num_hidden_layers", [100000])
    add("show dry check", "model.llm.config.num_attention_heads", [3, 5, 1000])
    add("show dry check", "model.llm.config.num_key_value_heads", [0, -1, 3, 2**40, 1.5, "x", [], {}])
    add("dry train", "model.llm.config.max_position_embeddings", [0, -1, 1, 1.5, "x", [], {}])
    add("dry train", "model.llm.config.vocab_size", [1, 10])
    add("check dry", "model.llm.config.rms_norm_eps", ["x", [], {}, True, float("nan")])
    add("check dry", "model.llm.config.hidden_act", ["nobody", 5, [], {}, True])
    add("check dry", "model.llm.config.initializer_range", ["x", [], {}, float("nan"), -1])
    add("check dry", "model.llm.config.rope_parameters", [5, "x", [1], {"rope_type": "nobody"}, {"rope_theta": "x"}])
    add("show check dry", "model.llm.config.model_type", ["t5", "bert", "nobody", "clip", 5, None, [], {}, True, ""])
    add("show check dry", "model.llm.config", [5, "x", [], [1], True])
    add("show check dry", "model.llm", [None, 5, [], {}, True, "nobody/nothing", "package:os", "package:..", "."])
    add(
        "dry train", "model.llm.tokenizer", [5, [], {}, True, "", "nobody", ".", "/dev/null", "nobody/nothing", "/proc"]
    )
    add("dry train", "model.llm.template", [5, [], {}, True])
    templates = ["{% for", "{{ 1 / 0 }}", "{{ nobody.x }}", "{% for i in range(10**9) %}{% for j in range(10**9) %}"]
    templates[-1] += "x{% endfor %}{% endfor %}"
    templates += [
        "",
        "no messages",
        "{{ messages[0].content * 10**9 }}",
        "{{ raise_exception('no') }}",
        "{{ [] | sum }}",
    ]
    templates += ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"]
    add("dry train", "model.llm.template", templates, "refuse")
    add("dry show train", "stages", [5, "x", True, [], [1], {"instruct": 5}, {"instruct": "x"}, {"instruct": []}])
    add("dry", "stages", [None, {}])
    add("dry train", "stages.instruct.batch", [0, -1, 1.5, "x", True, [], {}])
    add("dry train", "stages.instruct.micro_batch", [0, -1, 1.5, "x", True, [], {}, 3])
    add("dry", "stages.instruct.steps", [0, -1, 1.5, "x", True, [], {}, None])
    for value in (0, -1, float("nan"), float("inf"), "x", True, []):
        rows.append(_changed(f"epochs = {value!r}", _epochs(value), "refuse", DRY))
    for key in ("lr", "warmup", "weight_decay", "clip"):
        add("dry train", f"stages.instruct.{key}", no_rate)
    add("dry train", "stages.instruct.muon_lr", [-1, float("nan"), "x", []])
    add("dry train", "stages.instruct.optimizer", ["sgd", 5, None, [], {}, True])
    add("dry train", "stages.instruct.schedule", ["nobody", 5, None, [], {}, True])
    add("dry train", "stages.instruct.objective", [None, 5, [], {}, True, "nobody", {"type": "nobody"}, {"type": 5}])
    groups = [{"type": "language_modeling", "groups": value} for value in (0, -1, 1.5, "x", None, [])]
    add("dry train", "stages.instruct.objective", groups)
    add("dry train", "stages.instruct.trains", [None, 5, {}, True, [5], [None], ["nobody"], [[]], ["llm.x"], ["."]])
    add("train", "stages.instruct.trains", [[]], "refuse")
    add("dry train", "stages.instruct.data", [None, 5, True, {}, [], [5], [None], "", "nobody.jsonl", ".", "/dev/null"])
    add("dry train", "stages.instruct.init", [5, True, [], "nobody", {"llm": "nobody"}, {"nobody": "."}, {"llm": 5}])
    add("dry train", "stages.instruct.share", [5, "x", [], {}])
    add("dry train", "stages.instruct.checkpointing", [5, "x", [], {}])
    add("show dry", "roots", [5, "x", [1], True, {"x": 5}, {"x": []}, {"x": None}, {5: "x"}], "either")
    add("show dry", "eval", [5, "x", [1], True], "refuse")
    add("show", "eval", [{"nobody": "x"}, {"mvbench": 5}, {"mvbench": None}, {5: 5}], "either")
    add("show", "summary", no_text, "either")
    add("show", "paper", no_text, "either")
    add("show check", "nobody", [5, None, {}])
    add("show check", "model.nobody", [5, None, {}])
    add("show check dry", "model.connector.0.depth", [0, -1, 10**9, 1.5, "x", [], {}, True])
    add(
        "show check",
        "model.connector.4.grid",
        [0, [], [0, 0, 0], [-1, 3, 3], "x", {}, [8, 3], [2**40, 1, 1]],
        name="merv",
    )
    add("show check", "model.connector.6.in", [5, [], {}, "nobody", ["colour_stream"] * 3, [5, 5]], "either", "merv")
    return rows


def _putting(keys: tuple[Any, ...], value: Any) -> Change:
    def change(data: dict[str, Any]) -> Any:
        if keys[:3] == ("model", "media", "fps"):
            data["model"]["media"] = {}
        return zoo.put(data, keys, value)

    return change


def _epochs(value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        del data["stages"]["instruct"]["steps"]
        data["stages"]["instruct"]["epochs"] = value

    return change
