"""Looking inside: what the streams of a fusion are called, and what becomes of patches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import frames, tiny_model, tiny_processor, tiny_recipe, write_video

from mmllm.cli import main
from mmllm.cli.inspect import _encoder


def test_a_stream_is_called_by_the_encoder_that_its_first_inputs_lead_to():
    """A bridge reads an encoder and, beside it, plain tokens that may come from anywhere."""
    inputs = {"bridge": ("clip", "plain"), "plain": ("pool",), "pool": ("dino",), "linear": ("bridge",)}
    assert [_encoder(name, inputs) for name in ("linear", "plain", "dino")] == ["clip", "dino", "dino"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A saved tiny model of nano/aim: patches are merged before the LLM."""
    folder, recipe = tmp_path_factory.mktemp("model"), tiny_recipe("nano/aim")
    recipe.model["llm"]["config"]["num_hidden_layers"] = 4
    tiny_model(recipe).save_pretrained(folder)
    tiny_processor(recipe).save_pretrained(folder)
    return folder


def test_every_patch_is_in_a_token_and_every_token_ends_somewhere(merged, tmp_path, capsys):
    clip = write_video(tmp_path / "clip.mp4", frames(0, 16))
    words = ["inspect", "tokens", "--model", str(merged), "--video", str(clip), "--question", "What moves?"]
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    tokens = torch.tensor(plain["token"])
    assert tokens.shape == (4, 6, 6) and plain["entering"] == [4 * 9 + 1] * 4
    for number, frame in enumerate(tokens):  # merged within frames, into consecutive tokens
        assert frame.unique().tolist() == list(range(9 * number, 9 * number + 9))
    assert (torch.tensor(plain["dropped"]) == 4).all()
    outs = [tmp_path / "seen.png", tmp_path / "seen.mp4"]
    flags = ["--reduce", "aim", "--keep", "0.3", *(word for out in outs for word in ("--out", str(out)))]
    assert main([*words, *flags, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    dropped, token = torch.tensor(seen["dropped"]), torch.tensor(seen["token"])
    assert seen["entering"][0] < 37 and seen["entering"] == sorted(seen["entering"], reverse=True)
    for layer in range(4):  # the tokens that a layer reads are those not dropped before it; the newline may be one
        alive = len(token[dropped >= layer].unique())
        assert seen["entering"][layer] - 1 <= alive <= seen["entering"][layer]
    assert all(out.stat().st_size > 500 for out in outs)
    assert main([*words, "--out", "seen.gif"]) == 2
    assert "neither a picture nor a clip" in capsys.readouterr().err


def test_a_part_that_does_not_say_its_sources_is_named(tmp_path, capsys):
    recipe = tiny_recipe("nano/video_chatgpt")
    tiny_model(recipe).save_pretrained(tmp_path)
    tiny_processor(recipe).save_pretrained(tmp_path)
    clip = write_video(tmp_path / "clip.mp4", frames(0, 16))
    assert main(["inspect", "tokens", "--model", str(tmp_path), "--video", str(clip)]) == 2
    assert "does not say what its tokens are made of" in capsys.readouterr().err


def test_streams_are_looked_at_one_at_a_time(tmp_path, capsys):
    recipe = tiny_recipe("nano/llava_st")
    tiny_model(recipe).save_pretrained(tmp_path)
    tiny_processor(recipe).save_pretrained(tmp_path)
    clip = write_video(tmp_path / "clip.mp4", frames(0, 16))
    words = ["inspect", "tokens", "--model", str(tmp_path), "--video", str(clip), "--json"]
    held = {}
    for stream in (None, "slow", "fast"):
        assert main([*words, *(["--stream", stream] if stream else [])]) == 0
        token = json.loads(capsys.readouterr().out)["token"]
        held[stream] = {place for frame in token for row in frame for place in row}
    assert held[None] == held["slow"] == set(range(2 * 9)) and held["fast"] == set(range(4))
    assert main([*words, "--stream", "slwo"]) == 2
    assert "--stream slwo: no such stream. Try: slow" in capsys.readouterr().err
