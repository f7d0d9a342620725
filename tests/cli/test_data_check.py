"""`mmllm data check`: what is missing, broken, short or uneven is found before a run starts, all of it, once."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.tiny import frames, image, write_video

from mmllm.cli import main
from mmllm.data.media import doctor

CLIP = Path(__file__).resolve().parents[1] / "assets" / "tablet_drawing.mp4"


def write_uneven(path: Path) -> None:
    """A clip whose frames come every 40 to 160 ms."""
    import av

    moments, now = [], 0
    for number in range(24):
        moments.append(now)
        now += 160 if number % 5 == 0 else 40
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for moment, picture in zip(moments, frames(3, 24), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_cut(path: Path) -> None:
    """A clip whose header is whole and whose end is gone."""
    import av

    whole = path.with_suffix(".whole.mp4")
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        for picture in frames(4, 60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    content = whole.read_bytes()
    whole.unlink()
    path.write_bytes(content[: len(content) * 6 // 10])


def record(name: str, text: str = "<video>\nWhat moves?", **keys: object) -> dict:
    """A record of LLaVA's."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "left"}]
    return {"id": name, "conversations": turns, **keys}


@pytest.fixture(scope="module")
def set_with_holes(tmp_path_factory) -> Path:
    """A set with one of everything; videos below `videos`."""
    folder = tmp_path_factory.mktemp("set")
    videos = folder / "videos"
    videos.mkdir()
    shutil.copy(CLIP, videos / "good.mp4")
    write_uneven(videos / "uneven.mp4")
    write_cut(videos / "cut.mp4")
    write_video(videos / "tiny.mp4", frames(1, 5))
    image(1).save(videos / "still.png")
    items = [
        record("good-1", video="good.mp4"),
        record("good-2", "<image>\nWhat?", video="good.mp4"),
        record("uneven", video="uneven.mp4"),
        record("cut", video="cut.mp4"),
        record("gone", video="god.mp4"),
        record("tiny", video="tiny.mp4"),
        record("still", "What?", image="still.png"),
        record("wrong", "What?", image="good.mp4"),
        record("empty", video="good.mp4", start=2, end=2),
    ]
    (folder / "data.json").write_text(json.dumps(items, indent=1))
    return folder


def check(out: Path, *words: object) -> tuple[int, dict]:
    """Exit code and check.json of the command."""
    code = main(["data", "check", *map(str, words), "--out", str(out), "--quiet", "--jobs", "2"])
    return code, json.loads(out.read_text())


def test_a_set_with_one_of_everything(set_with_holes, tmp_path, capsys):
    data, videos = set_with_holes / "data.json", set_with_holes / "videos"
    code, report = check(tmp_path / "check.json", data, "--root", videos)
    assert code == 3
    assert report["records"] == 9
    assert report["errors"] == {"count": 0, "first": []}
    assert report["videos"] == {"ok": 2, "missing": 1, "broken": 1, "out of bounds": 1, "variable rate": 1, "short": 1}
    assert report["images"] == {"ok": 1, "mixed up": 1}
    assert report["image_for_video"] == 1
    problems = {(row["problem"], Path(row["path"]).name) for row in report["problems"]}
    assert problems == {
        ("missing", "god.mp4"),
        ("broken", "cut.mp4"),
        ("mixed up", "good.mp4"),
        ("out of bounds", "good.mp4"),
        ("variable rate", "uneven.mp4"),
        ("short", "tiny.mp4"),
    }
    rows = {row["problem"]: row for row in report["problems"]}
    assert str(videos / "good.mp4") in rows["missing"]["what"]
    assert "40 to 160 ms" in rows["variable rate"]["what"]
    assert "5 frames, 8 are asked for" in rows["short"]["what"]
    assert (rows["out of bounds"]["ids"], rows["out of bounds"]["samples"]) == (["good-1", "good-2", "empty"], 3)
    out = capsys.readouterr().out
    last = "5 videos: 2 ok (1 short, 1 variable rate), 1 missing, 1 broken, 1 out of bounds -> "
    assert out.splitlines()[-1].startswith(last)
    assert out.endswith('check.json;  "<image>" for a video: 1, read as video\n')
    assert "2 images: 1 ok, 0 missing, 0 broken, 1 mixed up" in out
    assert report["seconds"]["shortest"] == pytest.approx(5 / 8, abs=0.01)


def test_a_second_look_is_only_at_what_changed(set_with_holes, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    shutil.copytree(set_with_holes, folder)
    seen = []
    inspect = doctor.inspect

    def counted(medium, *rest):
        seen.append(Path(medium.path).name)
        return inspect(medium, *rest)

    monkeypatch.setattr(doctor, "inspect", counted)
    command = (tmp_path / "check.json", folder / "data.json", "--root", folder / "videos")
    first = check(*command)[1]
    assert len(seen) == 7
    seen.clear()
    assert check(*command)[1] == first
    assert seen == ["god.mp4"]
    seen.clear()
    write_video(folder / "videos" / "tiny.mp4", frames(2, 9))
    shutil.copy(CLIP, folder / "videos" / "god.mp4")
    code, report = check(*command, "--frames", "9")
    assert sorted(seen) == ["god.mp4", "tiny.mp4"]
    assert (code, report["videos"]["ok"], report["videos"].get("short")) == (3, 3, None)
    seen.clear()
    assert check(*command, "--frames", "10")[1]["videos"]["short"] == 1
    assert seen == []


def test_quick_reads_headers_alone(set_with_holes, tmp_path):
    command = (set_with_holes / "data.json", "--root", set_with_holes / "videos")
    report = check(tmp_path / "quick.json", *command, "--quick")[1]
    assert "broken" not in report["videos"]
    assert report["videos"]["missing"] == 1
    # what was only looked at quickly is decoded when it is asked for
    assert check(tmp_path / "quick.json", *command)[1]["videos"]["broken"] == 1


def test_all_schema_errors_are_listed_and_the_rest_is_checked(tmp_path, capsys):
    shutil.copy(CLIP, tmp_path / "good.mp4")
    items = [
        record("a", video="good.mp4"),
        record("b", "<video><video>", video="good.mp4"),
        record("c", image=3),
        {"id": "d", "conversations": [{"from": "robot", "value": "x"}]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n{oops\n")
    code, report = check(tmp_path / "check.json", tmp_path / "data.jsonl")
    assert code == 2
    assert report["errors"]["count"] == 4
    places = [error.split("data.jsonl:")[1].split(": ")[0] for error in report["errors"]["first"]]
    assert places == ["2:video", "3:image", "4:conversations[0].from", "5"]
    assert report["videos"] == {"ok": 1}
    out = capsys.readouterr().out
    assert out.count("error: ") == 4
    assert "5 records: 4 errors" in out


def test_a_good_set_is_zero_and_json_is_one_object(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CLIP, "good.mp4")
    Path("a.json").write_text(json.dumps([record(f"a{number}", video="good.mp4") for number in range(600)]))
    Path("b.jsonl").write_text(json.dumps({"id": "b", "messages": [{"role": "user", "content": "x"}]}))
    Path("mix.yaml").write_text(
        "datasets:\n- {json_path: a.json, sampling_strategy: 'first:50%'}\n- json_path: b.jsonl\n"
    )
    assert main(["data", "check", "mix.yaml", "--quiet", "--json", "--jobs", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["records"], printed["videos"], printed["problems"]) == (301, {"ok": 1}, [])
    assert main(["data", "check", "mix.yaml", "--quiet", "--limit", "5"]) == 0
    assert capsys.readouterr().out.startswith("6 records: no errors\n")


def test_errors_of_whole_files_are_collected(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('[{"conversations": []}')
    (tmp_path / "mix.yaml").write_text("datasets:\n- json_path: bad.json\n- json_path: none.json\n")
    code, report = check(tmp_path / "check.json", tmp_path / "mix.yaml")
    assert code == 2
    first, second = report["errors"]["first"]
    assert "bad.json:1: the array does not end" in first
    assert "none.json: no such data file" in second
    (tmp_path / "mix.yaml").write_text("datasts: []\n")
    assert main(["data", "check", str(tmp_path / "mix.yaml")]) == 2
    assert "datasts: unknown key. Try: datasets" in capsys.readouterr().err


def test_nothing_that_can_be_read_is_two(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([record("a", video="none.mp4")]))
    assert check(tmp_path / "check.json", tmp_path / "data.json")[0] == 2


def test_a_file_of_another_origin_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([record("a", "Hello")]))
    assert main(["data", "check", str(tmp_path / "data.json"), "--out", str(tmp_path / "data.json"), "--quiet"]) == 2
    assert "not written by mmllm data check" in capsys.readouterr().err
    assert json.loads((tmp_path / "data.json").read_text())[0]["id"] == "a"


@pytest.mark.parametrize("text", ["", "5", "{}", '{"files": []}', '{"files": {"a.mp4": {}}}'])
def test_a_damaged_report_is_named(tmp_path, capsys, text):
    (tmp_path / "data.json").write_text(json.dumps([record("a", "Hello")]))
    (tmp_path / "check.json").write_text(text)
    command = ["data", "check", str(tmp_path / "data.json"), "--out", str(tmp_path / "check.json"), "--quiet"]
    assert main(command) == 2
    assert "check.json: not written by mmllm data check, or damaged" in capsys.readouterr().err


def test_pictures_in_memory_count(tmp_path):
    pytest.importorskip("datasets")
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    image(2).save(file, "png")
    turns = [{"user": "<image>Which?", "assistant": "one"}]
    rows = [{"images": [content], "texts": turns} for content in (file.getvalue(), file.getvalue()[:50])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    code, report = check(tmp_path / "check.json", tmp_path / "data.parquet", "--cache-dir", tmp_path / "cache")
    assert (code, report["images"], report["errors"]["count"]) == (2, {"ok": 1}, 1)
    assert "data.parquet:row 2:images" in report["errors"]["first"][0]


def test_an_interrupted_check_keeps_what_it_has(set_with_holes, tmp_path, monkeypatch):
    inspect, seen = doctor.inspect, []

    def interrupted(medium, *rest):
        seen.append(medium.path)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return inspect(medium, *rest)

    command = ["data", "check", str(set_with_holes / "data.json"), "--root", str(set_with_holes / "videos")]
    command += ["--out", str(tmp_path / "check.json"), "--quiet", "--jobs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "inspect", interrupted)
        assert main(command) == 130
    kept = json.loads((tmp_path / "check.json").read_text())["files"]
    assert 0 < len(kept) <= 3
    assert main(command) == 3
    assert len(json.loads((tmp_path / "check.json").read_text())["files"]) == 7
