"""`mmllm ask` over every kind of file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import frames, image, save_model, write_video

from mmllm.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved tiny model."""
    return save_model(tmp_path_factory.mktemp("model"))


def answer(capsys: pytest.CaptureFixture, *words: object) -> dict:
    """The JSON that asking prints."""
    assert main(["ask", "--json", *map(str, words), "What moves?"]) == 0
    return json.loads(capsys.readouterr().out)


def test_several_media_in_their_order(capsys, model, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames(0, 16))
    image(1).save(tmp_path / "a.png")
    found = answer(capsys, "--model", model, "--image", tmp_path / "a.png", "--video", f"{clip}#t=0.5,1.5")
    assert found["visual_tokens"] == 9 + 4 * 9
    assert main(["ask", "--model", str(model), "--image", str(tmp_path / "a.png"), "--video", str(clip), "Q?"]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "1 image" and second.startswith("4 frames from ")
    assert main(["ask", "--model", str(model), "--video", str(clip), "--image", str(tmp_path / "a.png"), "Q?"]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("4 frames from ") and second == "1 image"
    more = answer(capsys, "--model", model, "--frames", 6, "--video", clip, "--video", clip)
    assert more["visual_tokens"] == 2 * 6 * 9


def test_text_alone_and_streamed_output(capsys, model):
    assert main(["ask", "--model", str(model), "--quiet", "--max-new-tokens", "4", "What moves?"]) == 0
    streamed = capsys.readouterr().out.strip()
    found = answer(capsys, "--model", model, "--max-new-tokens", 4)
    assert found["answer"] == streamed
    assert found["visual_tokens"] == 0


@pytest.mark.shared
def test_every_shared_file_is_answered(capsys, model, shared):
    files = sorted(path for path in (shared / "data" / "videos").iterdir() if path.suffix in (".mp4", ".avi", ".jpg"))
    assert len(files) == 12
    for path in files:
        kind = "--image" if path.suffix == ".jpg" else "--video"
        found = answer(capsys, "--model", model, kind, path)
        assert found["visual_tokens"] == (9 if kind == "--image" else 36)


def test_the_committed_clip_is_answered(capsys, model):
    clip = Path(__file__).parents[1] / "assets" / "tablet_drawing.mp4"
    assert answer(capsys, "--model", model, "--video", clip)["visual_tokens"] == 36


def test_an_answer_that_nobody_takes_ends(tmp_path):
    from helpers.tiny import save_model

    folder = save_model(tmp_path / "model")
    command = [
        sys.executable,
        "-P",
        "-m",
        "mmllm",
        "ask",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--quiet",
        "What?",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 2 and "no space left on device" in done.stderr
    assert "terminate called" not in done.stderr


def test_a_stream_that_is_closed_stops_generating(tmp_path):
    import threading

    from helpers.tiny import save_model

    import mmllm

    model, processor = mmllm.load(save_model(tmp_path / "model"))
    before = threading.active_count()
    pieces = mmllm.generate(model, processor, "What?", max_new_tokens=400, min_new_tokens=400, stream=True)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_several_reducers_and_models_are_a_table(capsys, model, tmp_path):
    clip, ways = write_video(tmp_path / "clip.mp4", frames(0, 16)), ["--reduce", "none", "--reduce", "random"]
    asked = ["ask", "--model", str(model), "--video", str(clip), "--quiet", "--max-new-tokens", "4", "--keep", "0.5"]
    assert main([*asked, *ways, "What moves?"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["reduce", "visual", "tokens"] and len(rows) == 2
    assert rows[0].split()[:6] == ["none", "36", "/", "36", "/", "36"]
    assert rows[1].split()[:6] == ["random-0.5", "18", "/", "18", "/", "18"]
    other = save_model(tmp_path / "other")
    assert main([*asked, *ways, "--model", str(other), "--json", "What moves?"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["model"], one["reduce"]) for one in found] == [
        (str(path), name) for path in (model, other) for name in ("none", "random-0.5")
    ]
    assert all(one["first_word_seconds"] > 0 and one["peak_bytes"] > 0 for one in found)


def test_a_schedule_by_file(capsys, model, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames(0, 16))
    (tmp_path / "mine.yaml").write_text("type: aim\nrates: [0.5, 0]\n")
    found = answer(capsys, "--model", model, "--video", clip, "--reduce", tmp_path / "mine.yaml")
    assert found["visual_tokens_by_layer"] == [36, 18]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--keep", "0.5"], "nothing to keep less of"),
        (["--reduce", "aim"], "no budget"),
        (["--reduce", "aim", "--reduce", "aim", "--keep", "0.5"], "given twice"),
        (["--reduce", "nothing", "--keep", "0.5"], "no reducer is called"),
        (["--reduce", "missing.yaml"], "no such file"),
        (["--reduce", "WORDS.yaml"], "reduce.aim.keep: wrong type"),
    ],
)
def test_what_cannot_be_reduced_is_said_in_one_line(capsys, model, flags, said, tmp_path):
    (tmp_path / "WORDS.yaml").write_text("type: aim\nkeep: half\n")
    flags = [str(tmp_path / flag) if flag == "WORDS.yaml" else flag for flag in flags]
    assert main(["ask", "--model", str(model), *flags, "What moves?"]) == 2
    assert said in capsys.readouterr().err
