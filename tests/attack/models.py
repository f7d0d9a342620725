"""Model folders that are broken or hostile, opened by `mmllm ask` and `mmllm.load`."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack import zoo
from attack.bench import Bench
from attack.case import Case, Expect, Ran, Write

ASK, LOAD, EVAL = "ask", "load", "eval"
CONFIGS = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")
TEXTS = (*CONFIGS, "tokenizer.json", "recipe.yaml")
WEIGHTS = "model.safetensors"
Change = Callable[[Path], Any]


def prepare(here: Path, bench: Bench) -> None:
    """A copy of the good model."""
    shutil.copytree(bench.model, here / "m")


def fixed(bench: Bench) -> list[Write]:
    """Folders that are wrong in a known way, and good ones."""
    return [*_hostile(), *_good(), *_files(), *_weights(), *_keys()]


def drawn(draw: random.Random, here: Path, bench: Bench) -> Case:
    """A random change of a config, or of the bytes of a file."""
    there = [name for name in TEXTS if (here / "m" / name).is_file()]
    name = draw.choice([*there, WEIGHTS, "config.json", "processor_config.json"])
    file = here / "m" / name
    if name.endswith("config.json") and draw.random() < 0.8:
        data, note = zoo.mutated(json.loads(file.read_text()), draw, zoo.JSON)
        file.write_text(zoo.text(json.dumps(data)))
    else:
        data = bytearray(file.read_bytes())
        place = draw.randrange(min(len(data), draw.choice([8, 200, len(data)])))
        how = draw.choice(["cut", "byte"])
        if how == "cut":
            del data[place:]
        else:
            data[place] = draw.randrange(256)
        file.write_bytes(data)
        note = f"{how} at {place}"
    return _run(draw.choice([ASK, ASK, LOAD]), bench, f"{name}: {note}", "either")


def _run(verb: str, bench: Bench, note: str, expect: Expect, **kinds: Any) -> Case:
    """Open the folder `m`."""
    note = f"{note} [{verb}]"
    if verb == LOAD:
        return Case(["(mmllm.load)", "m"], note, expect, call=_load, **kinds)
    if verb == EVAL:
        flags = ["--tasks", "mvbench", "--limit", "1", "--baselines", "none", "--quiet", "--out", "out"]
        return Case(["eval", "--model", "m", *flags], note, expect, **kinds)
    clip = str(bench.root / "media/front.mp4")
    return Case(["ask", "--model", "m", "--video", clip, "--max-new-tokens", "2", "What?"], note, expect, **kinds)


def _load() -> int:
    """`mmllm.load` and `mmllm.generate`, as a program calls them; what is not a UserError is a traceback."""
    import sys

    import mmllm

    try:
        model, processor = mmllm.load("m")
        mmllm.generate(model, processor, "What?", max_new_tokens=2)
    except mmllm.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _changed(note: str, change: Change, expect: Expect, verb: str = ASK, **kinds: Any) -> Write:
    def write(here: Path, bench: Bench) -> Case:
        change(here / "m")
        return _run(verb, bench, note, expect, **kinds)

    return write


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        data = change(data) or data
        (folder / name).write_text(zoo.text(json.dumps(data)))

    return edit


def _good() -> list[Write]:
    return [_changed("as it is", lambda folder: None, "answer", verb) for verb in (ASK, LOAD, EVAL)]


CANARY = "import pathlib\npathlib.Path({path!r}).touch()\n"


def _hostile() -> list[Write]:
    """A Python file that a config asks to be run; it must not, whatever is answered at the prompt."""

    def write(note: str, name: str, keys: dict[str, Any], expect: Expect, verb: str) -> Write:
        def make_it(here: Path, bench: Bench) -> Case:
            marker = here.parent / "marker"
            code = CANARY.format(path=str(marker)) + "class X: pass\n"
            for stem in ("evil", "configuration_evil", "modeling_evil", "__init__", "sitecustomize"):
                (here / "m" / f"{stem}.py").write_text(code)
            _edit(name, lambda data: data.update(keys))(here / "m")

            def check(ran: Ran) -> str | None:
                return "canary: the Python file of the model folder ran" if marker.exists() else None

            return _run(verb, bench, note, expect, yes=True, check=check)

        return make_it

    made = []
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoProcessor",
        "AutoTokenizer",
        "AutoVideoProcessor",
    )
    single = dict.fromkeys(classes, "evil.X") | {"AutoTokenizer": ["evil.X", "evil.X"]}
    for verb in (ASK, LOAD):
        for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
            made.append(write(f"auto_map in {name}", name, {"auto_map": single}, "either", verb))
            unknown = {"auto_map": single, "model_type": "evil", "tokenizer_class": "X", "processor_class": "X"}
            made.append(write(f"auto_map and unknown classes in {name}", name, unknown, "either", verb))
        text = {"text_config": {"model_type": "evil", "auto_map": single, "hidden_size": 64}}
        made.append(write("auto_map in text_config", "config.json", text, "refuse", verb))
        for kernel in ("nobody/kernel", "nobody/kernel:forward", "./evil", "evil:X", "paged|nobody/kernel"):
            for key in ("attn_implementation", "_attn_implementation"):
                made.append(write(f"{key}: {kernel}", "config.json", {key: kernel}, "either", verb))
        trust = {"trust_remote_code": True, "auto_map": single}
        made.append(write("trust_remote_code", "config.json", trust, "either", verb))
        custom = {"custom_generate": "./m", "auto_map": single}
        made.append(write("custom_generate", "generation_config.json", custom, "either", verb))
        template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        made.append(write("template that climbs", "tokenizer_config.json", {"chat_template": template}, "either", verb))
    return made


def _files() -> list[Write]:
    made = []
    broken: list[tuple[str, bytes]] = [
        ("empty", b""),
        ("not JSON", b"{broken"),
        ("a list", b"[1]"),
        ("null", b"null"),
        ("a number", b"5"),
        ("not UTF-8", b'{"a": "\xff"}'),
        ("deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("empty map", b"{}"),
        ("zeroes", bytes(1000)),
    ]
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        for place, (note, data) in enumerate(broken):
            soft = name == "tokenizer_config.json" and note == "empty map"
            expect: Expect = "either" if soft else "refuse"
            made.append(_changed(f"{name} {note}", _replaced(name, data), expect, (ASK, LOAD)[place % 2]))
        made.append(_changed(f"{name} a folder", _folder(name), "refuse"))
    for name in ("config.json", "processor_config.json", "tokenizer.json", WEIGHTS):
        for verb in (ASK, LOAD):
            made.append(_changed(f"no {name}", lambda folder, name=name: (folder / name).unlink(), "refuse", verb))
    for note, data in broken[:8]:
        made.append(_changed(f"generation_config.json {note}", _replaced("generation_config.json", data), "either"))
        made.append(_changed(f"recipe.yaml {note}", _replaced("recipe.yaml", data), "refuse", EVAL))
    loop = "a: &a {b: *a}\n"
    made.append(_changed("recipe.yaml of itself", _replaced("recipe.yaml", loop.encode()), "refuse", EVAL))
    return made


def _replaced(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def _folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def _weights() -> list[Write]:
    from safetensors.torch import load_file, save_file

    def cut(share: float) -> Change:
        def change(folder: Path) -> None:
            data = (folder / WEIGHTS).read_bytes()
            (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])

        return change

    def states(edit: Callable[[dict[str, Any], str], Any], which: str = "layers") -> Change:
        def change(folder: Path) -> None:
            state = load_file(folder / WEIGHTS)
            state = {key: value.clone() for key, value in state.items()}
            name = next(key for key in state if which in key)
            edit(state, name)
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

        return change

    def length(value: int) -> Change:
        def change(folder: Path) -> None:
            data = (folder / WEIGHTS).read_bytes()
            (folder / WEIGHTS).write_bytes(value.to_bytes(8, "little") + data[8:])

        return change

    def pickled(folder: Path) -> None:
        import pickle

        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))

    def fill(value: float) -> Callable[[dict[str, Any], str], Any]:
        return lambda state, name: state[name].view(-1)[:1].fill_(value)

    rows: list[tuple[str, Change]] = [
        *((f"weights cut at {share:.0%}", cut(share)) for share in (0, 0.00002, 0.001, 0.1, 0.5, 0.99)),
        *((f"weights whose header has {value} bytes", length(value)) for value in (0, 1, 10**6, 2**40, 2**63)),
        ("weights that are no file of weights", _replaced(WEIGHTS, b"x" * 1000)),
        ("weights of another shape", states(lambda state, name: state.update({name: state[name].flatten()[:1]}))),
        ("weights of another name", states(lambda state, name: state.update({name + "x": state.pop(name)}))),
        ("weights too many", states(lambda state, name: state.update({"other": state[name].clone()}))),
        ("weights too few", states(lambda state, name: state.pop(name))),
        ("pickled weights", pickled),
    ]
    poisoned = [
        ("weights with a NaN", states(fill(float("nan")))),
        ("weights with an infinity", states(fill(float("inf")))),
        ("front end with a NaN", states(fill(float("nan")), "front_end.parts")),
        ("encoder with a NaN", states(fill(float("nan")), "encoders")),
    ]
    made = [_changed(note, change, "either", ASK, check=_says_not_finite) for note, change in poisoned]
    whole = states(lambda state, name: state.update({name: state[name].long()}))
    made += [_changed(note, change, "refuse", verb) for note, change in rows for verb in (ASK, LOAD)]
    return [*made, *(_changed("weights of whole numbers", whole, "either", verb) for verb in (ASK, LOAD))]


def _says_not_finite(ran: Ran) -> str | None:
    """Weights that are no numbers may be asked, not without a word."""
    return None if ran.code == 2 or "not finite" in ran.err else "answered without a word on its weights"


def _keys() -> list[Write]:
    """One key of a config of a wrong type, or not as in the other config."""
    made = []

    def add(name: str, path: str, values: list[Any], expect: Expect = "refuse") -> None:
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        for place, value in enumerate(values):
            change = _edit(name, lambda data, keys=keys, value=value: zoo.put(data, keys, value))
            made.append(_changed(f"{name} {path} = {zoo.short(value)}", change, expect, (ASK, LOAD)[place % 2]))

    section = "model_section"
    for name in ("config.json", "processor_config.json"):
        add(name, section, [None, 5, "x", [], {}, True])
        add(name, f"{section}.connector", [None, 5, "x", [], {}, [None]])
        add(name, f"{section}.encoders", [None, 5, "x", [], {}])
        add(name, f"{section}.encoders.nano.channels", [None, 5, [], [2**40]])
        add(name, f"{section}.media.frames", [0, -1, "x", 10**9, zoo.DIGITS_400, 7])
    add("config.json", "text_config", [None, 5, "x", [], {}, True])
    add("config.json", "text_config.model_type", [None, 5, "t5", "nobody", [], "qwen3"])
    for key in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"):
        add("config.json", f"text_config.{key}", [0, -1, 2**40, 1.5, "x", None, [], zoo.DIGITS_400, 3])
    add("config.json", "model_type", [None, 5, "llama", "nobody", [], {}])
    add("config.json", "architectures", [5, "x", {}, ["Nobody"], [5]], "either")
    for key in ("torch_dtype", "dtype"):
        add("config.json", key, ["nobody", 5, [], {}, "int8"], "either")
    add("config.json", "transformers_version", [5, None, "x", []], "either")
    add("config.json", "quantization_config", [5, "x", "nobody", [1]])
    add(
        "config.json",
        "quantization_config",
        [{}, {"quant_method": "nobody"}, {"quant_method": "bitsandbytes"}],
        "either",
    )
    add("config.json", "tie_word_embeddings", [5, "x", [], None], "either")
    add("tokenizer_config.json", "tokenizer_class", [5, None, "Nobody", [], "LlamaTokenizer", "os.system"], "either")
    add("tokenizer_config.json", "chat_template", [5, [], {}, "{% for", "{{ 1/0 }}", "no messages"], "either")
    loops = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
    climbs = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for place, text in enumerate(
        (loops, climbs, "{{ 'x' * 10**11 }}", "{% for", "{{ 1/0 }}", "no messages", "", "{{ x.y }}")
    ):
        change = _replaced("chat_template.jinja", text.encode())
        made.append(_changed(f"template {zoo.short(text)}", change, "refuse", (ASK, LOAD)[place % 2]))
    add("tokenizer_config.json", "model_max_length", [0, -1, "x", [], None], "either")
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        add("generation_config.json", key, [-1, 10**9, "x", [], {}, 1.5, [5, -1], zoo.DIGITS_400], "either")
    add("generation_config.json", "max_length", [0, -1, "x", 10**12], "either")
    add("generation_config.json", "temperature", [0, -1, "x", float("nan")], "either")
    add("generation_config.json", "num_beams", [0, -1, "x", 10**6], "either")
    add("processor_config.json", "processor_class", [5, None, "Nobody", []], "either")
    add("processor_config.json", "max_length", [0, -1, "x", [], 5], "either")
    add("processor_config.json", "hidden_size", [0, -1, "x", [], 5, 2**40], "either")
    return made
