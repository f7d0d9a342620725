"""Answers about when and where, drawn on the frames and said in seconds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.tiny import frames, tiny_model, tiny_processor, tiny_recipe, write_video
from PIL import Image

from mmllm.cli import main
from mmllm.cli.ask import _in_words, _places
from mmllm.contract.grounding import Box, TimeSpan, Tube
from mmllm.drawing import LONE, SPAN, TRACK, enlarged, marked
from mmllm.processing.grounding import Found, written


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny model that knows coordinates."""
    folder, recipe = tmp_path_factory.mktemp("model"), tiny_recipe("nano/llava_st")
    tiny_model(recipe).save_pretrained(folder)
    tiny_processor(recipe).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe.dump())
    return folder


def test_boxes_are_drawn_at_their_moments_and_spans_below():
    blank = np.zeros((5, 40, 40, 3), np.uint8)
    box = Box(0.25, 0.5, 0.75, 1.0)
    drawn = marked(blank, Found([TimeSpan(0.0, 0.5)], [Box(0, 0, 0.2, 0.2)], Tube(((0.5, box), (1.0, box)))))
    tracked = [(frame == TRACK).all(-1).any() for frame in drawn]
    assert tracked == [False, False, True, False, True]
    assert all((frame == LONE).all(-1).any() for frame in drawn)
    assert [(frame[-1, 0] == SPAN).all() for frame in drawn] == [True, True, True, False, False]
    rows, columns = np.nonzero((drawn[2] == TRACK).all(-1))
    assert (rows.min(), columns.min(), columns.max()) == (19, 9, 29)
    assert not marked(blank, Found()).any()


def test_frames_are_enlarged_to_even_sides():
    out = enlarged(torch.zeros(3, 3, 47, 61, dtype=torch.uint8))
    assert out.dtype == np.uint8 and out.shape[0] == 3 and out.shape[1] >= 190
    assert out.shape[1] % 2 == out.shape[2] % 2 == 0


def test_an_answer_in_seconds():
    processor = tiny_processor(tiny_recipe("nano/llava_st"))
    layout = processor.plan.vocabulary
    media = [{"times": torch.tensor([1.0, 2.0, 4.0])}, {"times": torch.zeros(1)}]
    batch = {"visual": {"media": media, "pairs": [(1, 0), (0, 0)], "spans": torch.tensor([[0, 3, 0, 0], [0, 9, 1, 0]])}}
    said = f"from {written(TimeSpan(0.0, 1.0), layout)} at {written(Tube(((1.0, Box(0, 0, 1, 1)),)), layout)}"
    places = _places(said, batch, processor)["places"]
    assert places == [{"type": "time", "time": [1.0, 4.0]}, {"type": "tube", "tube": [[4.0, 0.0, 0.0, 1.0, 1.0]]}]
    assert [_in_words(place) for place in places] == ["from 1.00 to 4.00 s", "track 4.00 s: 0.00 0.00 1.00 1.00"]
    assert _places("nothing", batch, processor) == {}


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_asking_writes_a_drawing(model, tmp_path, suffix, capsys):
    clip, out = write_video(tmp_path / "clip.mp4", frames(0, 16)), tmp_path / f"drawn{suffix}"
    assert main(["ask", "--model", str(model), "--video", str(clip), "--out", str(out), "--json", "Track it."]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)
    assert out.stat().st_size > 500
    if suffix == ".png":
        assert Image.open(out).size == (4 * 192, 192)


def test_nothing_to_draw_on_or_with(model, tmp_path, capsys):
    clip = str(write_video(tmp_path / "clip.mp4", frames(0, 16)))
    for words, said in (
        (["--video", clip, "--out", str(tmp_path / "a.gif"), "Q"], "neither a picture nor a clip"),
        (["--out", str(tmp_path / "a.png"), "Q"], "draws the answer of one model about a medium"),
        (
            ["--video", clip, "--reduce", "none", "--reduce", "random", "--keep", "0.5", "--out", "a.png", "Q"],
            "one model",
        ),
    ):
        assert main(["ask", "--model", str(model), *words]) == 2
        assert said in capsys.readouterr().err


def test_the_tokens_are_drawn_with_what_the_answer_says(model, tmp_path, monkeypatch):
    from mmllm.cli import inspect_tokens

    layout = tiny_processor(tiny_recipe("nano/llava_st")).plan.vocabulary
    said = written(Tube(((0.0, Box(0.2, 0.2, 0.8, 0.8)),)), layout)
    monkeypatch.setattr(inspect_tokens, "answer_of", lambda model, processor, batch: said)
    clip, out = write_video(tmp_path / "clip.mp4", frames(0, 16)), tmp_path / "seen.png"
    words = ["inspect", "tokens", "--model", str(model), "--video", str(clip), "--stream", "fast", "--out", str(out)]
    assert main(words) == 0
    drawn = (np.asarray(Image.open(out).convert("RGB")) == TRACK).all(-1)
    width = drawn.shape[1] // 4
    assert drawn[:, :width].any() and not drawn[:, width:].any()
