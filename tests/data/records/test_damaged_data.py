"""Damaged records, files and mixes are refused in one line that names file, line and key, and without much work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mmllm.contract.errors import UserError
from mmllm.data.records.check import scan
from mmllm.data.records.conversations import expand_braces, files_of, open_source
from mmllm.data.records.json_files import DEEPEST, parse_json, read_json, read_json_lines, take
from mmllm.data.records.mix import load_data, read_mix

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
GOOD = {"id": "good", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
TURNS = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "left"}]


def messages(entry: Any, role: Any = "user") -> dict[str, Any]:
    """A record of our own format around one content entry."""
    return {"messages": [{"role": role, "content": [entry]}, {"role": "assistant", "content": "left"}]}


def video(**keys: Any) -> dict[str, Any]:
    return messages({"type": "video", "path": "a.mp4", **keys})


def qa(**keys: Any) -> dict[str, Any]:
    return {"video": "a.mp4", "QA": [{"q": "What?", "a": "left", **keys}]}


RECORDS = {
    "start is a list": (video(start=[1]), "messages[0].start: of the wrong type, expected a number, got [1]"),
    "start is a text": (video(start="3"), "messages[0].start: of the wrong type, expected a number, got '3'"),
    "start is true": (video(start=True), "messages[0].start: of the wrong type"),
    "start is not finite": (video(start=float("nan")), "messages[0].start: of the wrong type"),
    "start is too large": (video(start=10**400), "messages[0].start: of the wrong type, expected a number"),
    "end is an object": (video(end={}), "messages[0].end: of the wrong type, expected a number, got {}"),
    "fps is a text": (video(fps="fast"), "messages[0].fps: of the wrong type, expected a number, got 'fast'"),
    "frames is no whole number": (video(frames=2.5), "messages[0].frames: of the wrong type, expected a whole number"),
    "path is a number": (messages({"type": "video", "path": 3}), "messages[0].path: of the wrong type"),
    "image is a list": (messages({"type": "image", "image": ["a.jpg"]}), "messages[0].image: of the wrong type"),
    "type is a list": (messages({"type": ["video"]}), "messages[0]: unknown type of entry"),
    "role is a list": (messages({"type": "text", "text": "x"}, ["user"]), "messages[0].role: of the wrong type"),
    "role is null": (messages({"type": "text", "text": "x"}, None), "messages[0].role: missing, expected a text"),
    "from is a list": (
        {"conversations": [{"from": ["human"], "value": "x"}]},
        "conversations[0].from: unknown speaker",
    ),
    "from is an object": ({"conversations": [{"from": {}, "value": "x"}]}, "conversations[0].from: unknown speaker"),
    "llava start is a list": ({"conversations": TURNS, "video": "a", "start": [1]}, "start: not a bound"),
    "llava start is true": ({"conversations": TURNS, "video": "a", "start": True}, "start: not a bound"),
    "llava end is infinite": ({"conversations": TURNS, "video": "a", "end": "inf"}, "end: not a bound"),
    "llava end is too large": ({"conversations": TURNS, "video": "a", "end": 10**400}, "end: not a bound"),
    "video is a number": ({"conversations": TURNS, "video": 7}, "video: not a video"),
    "video is a list of lists": ({"conversations": TURNS, "video": [["a.mp4"]]}, "video: not a video"),
    "video is an object": (
        {"conversations": TURNS, "video": {"path": 3}},
        "video: not a video, expected bytes and a path",
    ),
    "image is a text of bytes": ({"conversations": TURNS, "image": {"bytes": "aGk="}}, "image: not a image"),
    "chosen is a number": ({**GOOD, "chosen": 3}, "chosen: of the wrong type, expected a text, got 3"),
    "i is a number": (qa(i=3), "QA[0].i: of the wrong type, expected a text, got 3"),
    "q is a list": (qa(q=["What?"]), "QA[0].q: of the wrong type"),
    "hound's prompt": ({"video": "a", "prompt": 3, "chosen": "x", "rejected": "y"}, "prompt: of the wrong type"),
    "hound's answer": ({"video": "a", "prompt": "x", "chosen": {"a": 1}, "rejected": "y"}, "chosen: of the wrong type"),
}


def refusal(path: Path, number: int = 0) -> str:
    """The one line about a record."""
    with pytest.raises(UserError) as caught:
        open_source(path)[number]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("name", RECORDS)
def test_wrong_types_name_line_and_key(name: str, tmp_path: Path) -> None:
    record, says = RECORDS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    message = refusal(path)
    assert message.startswith(f"{path}:1:") and message.removeprefix(f"{path}:1:").startswith(says)


TEXTS = {
    "deep": ('{"conversations": ' + DEEP + "}", "nested too deeply"),
    "rather deep": ('{"conversations": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply"),
    "digits": ('{"conversations": [], "id": ' + DIGITS + "}", "not JSON (a number has too many digits)"),
    "surrogate": ('{"conversations": [{"from": "human", "value": "a \\ud83d b"}]}', "half a surrogate pair"),
    "surrogate in a key": ('{"conversations": [], "\\udc00": 1}', "half a surrogate pair"),
    "latin": (b'{"conversations": [], "id": "na\xefve"}', "not UTF-8"),
    "surrogate as bytes": (b'{"conversations": [], "id": "\xed\xa0\x80"}', "not UTF-8"),
    "cut": ('{"conversations": [', "not JSON"),
}


@pytest.mark.parametrize("place", ["first", "second", "in an array"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_records(name: str, place: str, tmp_path: Path) -> None:
    """As the first record, which tells the format, as a later one, and in an array."""
    text, says = TEXTS[name]
    bad, good = text if isinstance(text, bytes) else text.encode(), json.dumps(GOOD).encode()
    path, number = tmp_path / "data.json", int(place != "first")
    whole = {
        "first": bad + b"\n" + good,
        "second": good + b"\n" + bad,
        "in an array": b"[" + good + b",\n" + bad + b"]",
    }
    path.write_bytes(whole[place])
    message = refusal(path, number)
    assert says in message or (name == "cut" and "not JSON" in message)
    assert message.startswith(f"{path}:{number + 1}") or (place == "in an array" and message.startswith(f"{path}:"))


def test_what_looks_similar_is_read(tmp_path: Path) -> None:
    """Whole surrogate pairs, many brackets side by side, and numbers of many digits within reason."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": "\U0001f600 [[{{"} for n in range(200)]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": turns, "size": 10**400, "list": [[n] for n in range(300)]}))
    sample = open_source(path)[0]
    assert sample.messages[7]["content"] == "\U0001f600 [[{{" and sample.fields["size"] == 10**400


@pytest.mark.parametrize("style", ["lines", "array", "one line"])
def test_a_byte_order_mark_is_passed_over(style: str, tmp_path: Path) -> None:
    path, items = tmp_path / "data.json", [{**GOOD, "id": str(n)} for n in range(3)]
    text = (
        "\n".join(map(json.dumps, items))
        if style == "lines"
        else json.dumps(items, indent=2 if style == "array" else None)
    )
    path.write_text(text, encoding="utf-8-sig")
    assert [sample.id for sample in open_source(path)] == ["0", "1", "2"]


def test_a_check_lists_them_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good, bad = json.dumps(GOOD), [TEXTS[name][0] for name in ("deep", "digits", "surrogate")]
    path.write_text("\n".join([good, *bad, json.dumps(RECORDS["from is a list"][0]), good]))
    found = scan([path])
    assert (found.records, found.failed) == (6, 4)


# --- one reader for all


def test_whole_files_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, "x"]}', encoding="utf-8-sig")
    assert read_json(path) == {"a": [1, 2.5, "x"]}
    path.write_text('\ufeff{"a": 1}\n\n[2]\n', encoding="utf-8")
    assert list(read_json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", [2])]
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"a.json:2: not JSON"):
        list(read_json_lines(path))
    with pytest.raises(UserError, match=r"a.json: not JSON"):
        read_json(path)
    for missing, says in ((tmp_path / "none.json", "no such file"), (tmp_path, "not a regular file")):
        for read in (read_json, lambda path: list(read_json_lines(path))):
            with pytest.raises(UserError, match=says):
                read(missing)
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "here")
    with pytest.raises(UserError, match=f"here: nested too deeply, expected at most {DEEPEST} levels"):
        parse_json("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "here")


def test_fields_by_type() -> None:
    record = {"text": "x", "n": 3, "f": 2.5, "yes": True, "none": None, "list": [], "nan": float("nan")}
    assert [
        take(record, key, kind, "f:1") for key, kind in (("text", str), ("n", int), ("n", float), ("list", list))
    ] == [
        "x",
        3,
        3,
        [],
    ]
    assert take(record, "none", str, "f:1", "") == take(record, "gone", str, "f:1", "") == ""
    for key, kind, says in (
        ("gone", str, "f:1:gone: missing, expected a text"),
        ("none", str, "f:1:none: missing"),
        ("n", str, "f:1:n: of the wrong type, expected a text, got 3"),
        ("f", int, "f:1:f: of the wrong type, expected a whole number, got 2.5"),
        ("yes", int, "f:1:yes: of the wrong type"),
        ("yes", float, "f:1:yes: of the wrong type, expected a number, got True"),
        ("nan", float, "f:1:nan: of the wrong type"),
        ("list", dict, "f:1:list: of the wrong type, expected an object"),
    ):
        with pytest.raises(UserError) as caught:
            take(record, key, kind, "f:1")
        assert str(caught.value).startswith(says)


# --- mixes


@pytest.fixture
def mix(tmp_path: Path):
    """``mix(text)``: the refusal of a mix beside one data file, which must not take long."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(GOOD) for _ in range(10)))

    def refused(text: str) -> str:
        path = tmp_path / "mix.yaml"
        path.write_text(text)
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            load_data(path)
        assert time.monotonic() - start < 15
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))
        return str(caught.value)

    return refused


@pytest.mark.parametrize("weight", [".nan", ".inf", "-.inf", "-1", "0", "true", "'2'", "[1]"])
def test_weights_are_positive_numbers(weight: str, mix) -> None:
    text = f"datasets:\n- {{json_path: a.jsonl, weight: {weight}}}\n- {{json_path: a.jsonl, weight: 1}}\n"
    assert "mix.yaml:datasets[0].weight: bad weight, expected a positive number" in mix(text)


@pytest.mark.parametrize(
    "strategy",
    ["first:inf%", "first:-inf%", "first:nan%", "first:-5", "end:-10%", "random:0", "first:1e999%", "first:0x9"],
)
def test_strategies_take_something_finite(strategy: str, mix) -> None:
    message = mix(f"datasets:\n- {{json_path: a.jsonl, sampling_strategy: '{strategy}'}}\n")
    assert "mix.yaml:datasets[0].sampling_strategy: unknown" in message and f"got {strategy}" in message


@pytest.mark.parametrize(
    "name",
    [
        "s-{0..30000000}.json",
        "s-{0..9999}{0..9999}.json",
        "s-" + "{a,b}" * 30 + ".json",
        "s-{9..0}.json",
        "s-{0.." + DIGITS + "}.json",
    ],
    ids=["many", "product", "braces", "downwards", "digits"],
)
def test_braces_are_counted_before_they_are_written_out(name: str, mix) -> None:
    message = mix(f"datasets:\n- json_path: {name}\n")
    assert message.startswith("s-{") and ("too many files" in message or "for no file" in message)
    assert len(expand_braces("s-{00000..41455}.tar")) == 41456
    assert expand_braces("take..1234567890123456789{a,b}") == [
        "take..1234567890123456789a",
        "take..1234567890123456789b",
    ]


def alias_bomb(kind: str) -> str:
    """A mix whose nine lines stand for a milliard of values."""
    lines = ["x0: &x0 {json_path: a.jsonl}"]
    for level in range(1, 10):
        inside = ", ".join([f"*x{level - 1}"] * 10)
        lines.append(f"x{level}: &x{level} " + (f"{{<<: [{inside}]}}" if kind == "merged" else f"[{inside}]"))
    return "\n".join([*lines, "datasets: *x9" if kind == "datasets" else "datasets: [*x9]", ""])


@pytest.mark.parametrize("kind", ["datasets", "item", "merged"])
def test_alias_bombs_are_not_unfolded(kind: str, mix) -> None:
    assert "holds too many values, or repeats itself" in mix(alias_bomb(kind))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datasets: &a [*a]\n", "holds too many values, or repeats itself"),
        ("datasets: " + DEEP + "\n", "too deeply nested"),
        (f"seed: {DIGITS}\ndatasets: [a.jsonl]\n", "not YAML"),
        ("datasets: [a.jsonl]\nlength: " + "9" * 400 + "x\n", "bad number"),
        ("datasets: [[a.jsonl]]\n", "not a map"),
        ("", "not a map"),
    ],
    ids=["itself", "deep", "digits", "length", "list", "empty"],
)
def test_other_odd_mixes(text: str, says: str, mix) -> None:
    assert says in mix(text)


def test_aliases_and_marks_of_everyday_mixes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    text = "datasets:\n- &a {json_path: a.jsonl}\n- <<: *a\n  sampling_strategy: first:100%\n"
    (tmp_path / "mix.yaml").write_text(text, encoding="utf-8-sig")
    assert len(load_data(tmp_path / "mix.yaml")) == 2
    assert len(read_mix(tmp_path / "mix.yaml").entries) == 2


def test_a_folder_that_is_no_data_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    for read in (files_of, load_data):
        with pytest.raises(UserError, match=r"^/: "):
            read("/")
    assert time.monotonic() - start < 10
    monkeypatch.setattr("mmllm.data.records.conversations.ENTRIES", 20)
    (tmp_path / "deep" / "train").mkdir(parents=True)
    (tmp_path / "deep" / "train" / "0.parquet").touch()
    assert files_of(tmp_path) == [tmp_path / "deep" / "train" / "0.parquet"]
    for number in range(20):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(UserError, match="not a folder of data, it holds more than 20 entries"):
        files_of(tmp_path)
