"""Every format becomes the same conversations, and mistakes are named with file, line and key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers.samples import llava

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import expand_braces, files_of, open_source
from mmllm.data.records.formats import records


def lines(path: Path, *items: Any) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def asked(path: Path, record: dict[str, Any]) -> Any:
    """Content of the first message of a file with one record."""
    return open_source(lines(path / "data.jsonl", record), path)[0].messages[0]["content"]


# --- JSON


@pytest.mark.parametrize("style", ["array", "indented", "lines", "tabs"])
def test_an_array_and_lines_give_the_same_samples(tmp_path, style):
    items = [llava(number, video=f"v/{number}.mp4", note='naïve [{"}]\\ \U0001f600') for number in range(7)]
    path = tmp_path / "data.json"
    if style == "lines":
        lines(path, *items)
    else:
        indent = {"indented": 2, "tabs": "\t"}.get(style)
        path.write_text(json.dumps(items, indent=indent, ensure_ascii=style != "indented"), encoding="utf-8")
    source = open_source(path)
    assert source.registered_name == "llava"
    assert len(source) == 7
    for number in (6, 0, 3):
        sample = source[number]
        video, text = sample.messages[0]["content"]
        assert video == {"type": "video", "path": str(tmp_path / f"v/{number}.mp4"), "placeholder": "<image>"}
        assert text == {"type": "text", "text": "What moves?"}
        assert sample.messages[1] == {"role": "assistant", "content": f"Answer {number}."}
        assert (sample.id, sample.fields) == (f"s{number}", {"note": 'naïve [{"}]\\ \U0001f600'})
    assert source[-1].id == "s6"
    with pytest.raises(IndexError):
        source[7]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 24])
def test_an_array_is_cut_at_its_records_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(records, "BLOCK", block)
    items = [{"a": 'é\\"{', "b": [number, {"c": "]"}], "conversations": []} for number in range(20)]
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(items, ensure_ascii=False, indent=1).encode())
    found = records.JsonRecords(path)
    assert [found[number][0] for number in range(20)] == items
    text = path.read_bytes()
    assert [text[start : start + 1] for start in found.starts] == [b"{"] * 20
    assert found[3][1] == f"{path}:{found.lines[3]}"
    assert text.decode("utf-8-sig").splitlines()[found.lines[3] - 1].strip() == "{"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"messages": []},\n{"a": tru}]', ":2: not JSON"),
        ('[{"messages": []}\n{"a": 1}]', ":2: not JSON: '{' after a record"),
        ('[{"messages": []},\n{"a": "x', ":2: not JSON"),
        ('[{"messages": []},\n{"a": 1}', "the array does not end, it is cut off"),
        ("[]", "the data file is empty"),
        (" \n", "the data file is empty"),
        ('{\n  "a": 1\n}', ":1: not JSON"),
        ('{"id": 1, "text": "x"}', "messages, parquet"),
        ("[1, 2]", "missing, and the record fits no other format"),
    ],
)
def test_files_that_are_no_data(tmp_path, text, says):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        open_source(path)
    assert says in str(error.value)
    assert "data.json" in str(error.value)


def test_a_record_that_is_none_is_named_by_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(llava(0, "Hello")) + "\n\n[1]\n{oops}\n")
    source = open_source(path)
    for index, says in ((1, f"{path}:3: not a record"), (2, f"{path}:4: not JSON")):
        with pytest.raises(UserError, match=r"record|JSON") as error:
            source[index]
        assert str(error.value).startswith(says)


def test_a_worker_gets_offsets_not_records(tmp_path):
    short = open_source(lines(tmp_path / "short.jsonl", *[llava(number, "x") for number in range(50)]))
    long = open_source(lines(tmp_path / "long.jsonl", *[llava(number, "x" * 9999) for number in range(50)]))
    assert abs(len(pickle.dumps(long)) - len(pickle.dumps(short))) < 20
    assert pickle.loads(pickle.dumps(long))[7] == long[7]


# --- LLaVA


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ("<video>\nWhat?", {"video": "a.mp4"}, ["video a.mp4", "What?"]),
        ("<image>\nWhat?", {"video": "a.mp4"}, ["video a.mp4 <image>", "What?"]),
        ("What?", {"video": "a.mp4"}, ["video a.mp4", "What?"]),
        ("What?\n<image>", {"image": "a.jpg"}, ["What?", "image a.jpg"]),
        ("<image>\n<image>\nWhich?", {"image": ["a.jpg", "b.jpg"]}, ["image a.jpg", "image b.jpg", "Which?"]),
        ("Which?", {"image": ["a.jpg", "b.jpg"]}, ["image a.jpg", "image b.jpg", "Which?"]),
        (
            "A <image> b <video>.",
            {"video": ["a.mp4"], "image": "a.jpg"},
            ["A ", "image a.jpg", " b ", "video a.mp4", "."],
        ),
        ("<image><image>", {"image": "a.jpg", "video": "a.mp4"}, ["image a.jpg", "video a.mp4 <image>"]),
        ("<video>\n", {"videos": ["a.mp4"]}, ["video a.mp4"]),
        ("<image>", {"image": {"path": "a.jpg"}}, ["image a.jpg"]),
    ],
)
def test_media_stand_where_their_placeholders_do(tmp_path, text, keys, expected):
    shown = [
        entry["text"]
        if entry["type"] == "text"
        else f"{entry['type']} {Path(entry['path']).relative_to(tmp_path)} {entry.get('placeholder', '')}".strip()
        for entry in asked(tmp_path, llava(0, text, **keys))
    ]
    assert shown == expected


def test_text_alone_stays_a_text(tmp_path):
    assert asked(tmp_path, llava(0, "Hello", image="", video=None)) == "Hello"


def test_later_turns_have_their_media_too(tmp_path):
    record = llava(0, "<image>\nOne?", image=["a.jpg", "b.jpg"], start=3)
    record["conversations"] += [{"from": "human", "value": "<image>\nTwo?"}, {"role": "assistant", "content": "2"}]
    sample = open_source(lines(tmp_path / "data.jsonl", record))[0]
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert sample.messages[2]["content"][0]["path"] == str(tmp_path / "b.jpg")
    assert sample.fields == {"start": 3}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            llava(0, "<image><image>", image="a.jpg"),
            ":2:image: more placeholders than media: nothing is left for <image>",
        ),
        (llava(0, "<video>", image="a.jpg"), ":2:video: more placeholders than media"),
        (llava(0, "<image>", image=["a", "b", "c"]), ":2:image: more media than placeholders: 2 of 3 left over"),
        (llava(0, "<video>", video="a.mp4", image="b.jpg"), ":2:image: more media than placeholders"),
        (llava(0, "x", video=5), ":2:video: not a video, expected a path, or bytes, got 5"),
        (llava(0, "x", image=["a.jpg", ""]), ":2:image[1]: not a image"),
        (llava(0, "x", video="a.mp4", start="soon"), ":2:start: not a bound, expected seconds, got soon"),
        (llava(0, "x", video=["a.mp4", "b.mp4"], end=4), ":2:end: one bound for 2 videos"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, ":2:conversations[0].from: unknown speaker, got robot"),
        ({"conversations": [{"from": "human"}]}, ":2:conversations[0]: has no text"),
        ({"conversations": "x"}, ":2:conversations: not a list of turns"),
        ({"id": 1}, ":2:conversations: missing"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "video": "a.mp4"}, ":2: media, but no question"),
    ],
)
def test_what_is_wrong_is_said_by_file_line_and_key(tmp_path, record, says):
    path = lines(tmp_path / "data.jsonl", llava(0, "Hello"), record)
    source = open_source(path)
    with pytest.raises(UserError) as error:
        source[1]
    assert str(error.value).startswith(f"{path}{says}")


def test_messages_of_plain_texts_beside_media_are_read_the_same(tmp_path):
    record = {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["a.jpg"]}
    assert asked(tmp_path, record)[0] == {"type": "image", "path": str(tmp_path / "a.jpg")}


# --- our own, VideoChat2, LLaVA-Hound


def test_our_own_format_is_as_it_was(tmp_path):
    content = [{"type": "video", "path": "a.mp4", "start": 1.5, "frames": 4}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]
    path = lines(tmp_path / "data.jsonl", {"id": 7, "messages": messages, "chosen": "x"}, {"messages": messages})
    first, second = open_source(path)
    assert (first.id, first.fields, second.id) == ("7", {"chosen": "x"}, f"{path}:2")
    assert first.messages[0]["content"][0] == {**content[0], "path": str(tmp_path / "a.mp4")}
    elsewhere = open_source(path, tmp_path / "root")[0].messages[0]["content"][0]["path"]
    assert elsewhere == str(tmp_path / "root" / "a.mp4")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<video>What?", "a text contains <video>"),
        ([{"type": "video"}], "a video names no file"),
        ([{"type": "vidoe", "path": "x"}], "unknown type of entry"),
        ([{"type": "text"}], "has no text"),
        (3, "expected a text or a list of entries"),
    ],
)
def test_our_own_format_names_the_message(tmp_path, content, says):
    path = lines(tmp_path / "data.jsonl", {"messages": [{"role": "user", "content": content}]})
    with pytest.raises(UserError) as error:
        open_source(path)[0]
    assert str(error.value).startswith(f"{path}:1:messages[0]: ")
    assert says in str(error.value)


def test_videochat2(tmp_path):
    pairs = [{"i": "Choose.", "q": "Which?", "a": "(A)"}, {"i": "Choose.", "q": "And now?", "a": "(B)"}]
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(
            [
                {"video": "a.mp4", "QA": pairs, "start": 2, "end": "4.5"},
                {"image": "b.jpg", "QA": [{"i": "", "q": "", "a": "A dog."}]},
                {"video": "a.mp4", "QA": [{"q": "x"}]},
            ]
        )
    )
    source = open_source(path, tmp_path / "videos")
    first, second = source[0], source[1]
    assert source.registered_name == "videochat2"
    video = {"type": "video", "path": str(tmp_path / "videos" / "a.mp4"), "start": 2.0, "end": 4.5}
    assert first.messages[0]["content"] == [video, {"type": "text", "text": "Choose.\nWhich?"}]
    assert [message["content"] for message in first.messages[1:]] == ["(A)", "And now?", "(B)"]
    assert [entry["type"] for entry in second.messages[0]["content"]] == ["image"]
    assert second.messages[1]["content"] == "A dog."
    with pytest.raises(UserError, match=r"record 3:QA\[0\].a: has no text"):
        source[2]


def test_llava_hound(tmp_path):
    (tmp_path / "frames" / "v1").mkdir(parents=True)
    (tmp_path / "v2.mp4").touch()
    pair = {"prompt": "<video>\nWhat?", "rejected": "a cat", "chosen_score": 5}
    path = lines(
        tmp_path / "dpo.jsonl",
        {**pair, "id": "a", "video": "frames/v1", "answer": "a dog", "chosen": "a small dog"},
        {**pair, "id": "b", "video": "v2", "answer": "a dog"},
        {**pair, "id": "c", "video": "v3", "chosen": "x", "rejected": ""},
    )
    source = open_source(path)
    assert source.registered_name == "llava_hound"
    assert source[0].messages == [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(tmp_path / "frames/v1")}, {"type": "text", "text": "What?"}],
        }
    ]
    fields = {"rejected": "a cat", "chosen_score": 5, "answer": "a dog"}
    assert source[0].fields == {**fields, "chosen": "a small dog"}
    assert source[1].fields == {**fields, "chosen": "a dog"}
    assert source[1].messages[0]["content"][0]["path"] == str(tmp_path / "v2.mp4")
    with pytest.raises(UserError, match=r":3:rejected: missing"):
        source[2]


# --- finding the format, names of files


def test_an_unknown_format_lists_the_known_ones_and_the_keys(tmp_path):
    path = lines(tmp_path / "data.jsonl", {"question": "x", "solution": "y"})
    with pytest.raises(UserError, match=r"expected one of llava, .*webdataset, got question, solution"):
        open_source(path)
    with pytest.raises(UserError, match=r"no such format\. Try: llava"):
        open_source(path, name="lava")
    assert open_source(path, name="llava").registered_name == "llava"
    (tmp_path / "data.bin").write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match="no format recognises this file"):
        open_source(tmp_path / "data.bin")


def test_braces_and_folders_stand_for_files(tmp_path):
    assert expand_braces("a_{x, yy}.json") == ["a_x.json", "a_yy.json"]
    assert expand_braces("s{08..11}-{a,b}")[:3] == ["s08-a", "s08-b", "s09-a"]
    assert len(expand_braces("s{08..11}-{a,b}")) == 8
    for name in ("train-0.parquet", "train-1.parquet", "test-0.parquet", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path)] == ["train-0.parquet", "train-1.parquet"]
    assert [file.name for file in files_of(tmp_path / "t{est,rain}-0.parquet")] == ["test-0.parquet", "train-0.parquet"]
    with pytest.raises(UserError, match=r"train-2\.parquet: no such data file"):
        files_of(tmp_path / "train-{1,2}.parquet")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What?", "chosen": "a dog", "rejected": "a cat"},
        {
            "prompt": [{"role": "user", "content": "What?"}],
            "chosen": [{"role": "assistant", "content": "a dog"}],
            "rejected": [{"role": "assistant", "content": "a cat"}],
        },
        {
            "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a dog"}],
            "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cat"}],
        },
    ],
)
def test_pairs_as_trl_writes_them(tmp_path, record):
    (sample,) = open_source(lines(tmp_path / "data.jsonl", record))
    assert sample.messages == [{"role": "user", "content": "What?"}]
    assert sample.fields == {"chosen": "a dog", "rejected": "a cat"}
