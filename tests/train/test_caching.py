"""With caches a stage decodes a clip once and runs a frozen encoder on it once, to the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import frames, tiny_recipe, tokenizer_folder, write_video

from mmllm.config.recipe import Recipe
from mmllm.encoders.nano.conv import NanoConv
from mmllm.train.context import RunOptions
from mmllm.train.run import train

CLIPS, STEPS, BATCH = 6, 6, 4  # four epochs: six clips are one batch an epoch and two left over


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(CLIPS):
        write_video(folder / f"clips/{index}.mp4", frames(index, 8))
        content = [{"type": "video", "path": f"clips/{index}.mp4"}, {"type": "text", "text": f"What moves? {index}"}]
        answer = "A red square moves left." if index % 2 else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{index}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def recipe(data: Path, trains: tuple[str, ...] = ("connector", "llm")) -> Recipe:
    made = tiny_recipe()
    made.model["llm"]["tokenizer"] = tokenizer_folder()
    stage = {"data": str(data), "trains": list(trains), "steps": STEPS, "batch": BATCH, "lr": 1e-3}
    made.data["stages"] = {"instruct": stage}
    return made


def options(cache: Path, *keep: str, **changes: Any) -> RunOptions:
    settings = {"jobs": 0, "device": "cpu", "quiet": True, "log_steps": 1, "cache": cache, "keep": keep}
    return RunOptions(**{**settings, **changes})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many clips each call of the encoder had."""
    calls: list[int] = []
    real = NanoConv.forward

    def forward(self: NanoConv, pixels: torch.Tensor, *rest: Any) -> Any:
        if not pixels.is_meta:
            calls.append(pixels.shape[0])
        return real(self, pixels, *rest)

    monkeypatch.setattr(NanoConv, "forward", forward)
    return calls


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Which files were read."""
    from mmllm.data.media.guard import GuardedReader

    paths: list[str] = []
    real = GuardedReader.read

    def read(self: GuardedReader, ref: Any, *rest: Any, **named: Any) -> Any:
        paths.append(ref.path)
        return real(self, ref, *rest, **named)

    monkeypatch.setattr(GuardedReader, "read", read)
    return paths


def test_losses_are_the_same_with_and_without(data, tmp_path):
    train(recipe(data), tmp_path / "plain", options(tmp_path / "cache"))
    for keep in (("frames",), ("features",), ("frames", "features")):
        out = tmp_path / "-".join(keep)
        for turn in ("cold", "warm"):
            train(recipe(data), out / turn, options(tmp_path / "cache" / "-".join(keep), *keep))
            assert losses(out / turn) == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_a_frozen_encoder_runs_once_a_clip_and_never_in_a_second_run(data, tmp_path, encoded, opened):
    train(recipe(data), tmp_path / "cold", options(tmp_path / "cache", "features"))
    assert sum(encoded) == len(set(opened)) == len(opened)
    assert 0 < len(opened) <= CLIPS
    encoded.clear(), opened.clear()
    train(recipe(data), tmp_path / "warm", options(tmp_path / "cache", "features"))
    assert encoded == [] and opened == []
    events = (tmp_path / "warm" / "events.txt").read_text()
    assert f"features cached: {STEPS * BATCH} of {STEPS * BATCH} (100%)" in events


def test_hits_and_misses_of_all_batches_are_counted():
    from mmllm.train.caching import LookUps

    found = LookUps()
    for counts in ({"frames": (1, 3)}, {"frames": (2, 0), "features": (0, 4)}, {}):
        found.add(counts)
    assert found.facts() == {"frames cached": "3 of 6 (50%)", "features cached": "0 of 4 (0%)"}


def test_frames_are_decoded_once(data, tmp_path, encoded, opened):
    train(recipe(data), tmp_path / "cold", options(tmp_path / "cache", "frames"))
    assert len(opened) == len(set(opened))
    assert sum(encoded) == STEPS * BATCH
    opened.clear()
    train(recipe(data), tmp_path / "warm", options(tmp_path / "cache", "frames", jobs=1))
    assert opened == []


def test_an_encoder_that_trains_is_never_kept(data, tmp_path, encoded):
    stage = recipe(data, ("encoders", "connector", "llm"))
    train(stage, tmp_path / "run", options(tmp_path / "cache", "features"))
    assert sum(encoded) == STEPS * BATCH
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_other_weights_are_other_features(data, tmp_path, encoded):
    train(recipe(data), tmp_path / "one", options(tmp_path / "cache", "features"))
    first = sum(encoded)
    train(recipe(data), tmp_path / "two", options(tmp_path / "cache", "features", seed=1))
    assert sum(encoded) > first


def test_a_changed_clip_is_read_again(data, tmp_path, opened):
    train(recipe(data), tmp_path / "one", options(tmp_path / "cache", "frames"))
    path = Path(opened[0])
    opened.clear()
    before = path.read_bytes()
    write_video(path, frames(99, 8))
    train(recipe(data), tmp_path / "two", options(tmp_path / "cache", "frames"))
    assert opened == [str(path)]
    path.write_bytes(before)
