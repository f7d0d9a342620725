"""The good things that the attack damages: clips, a saved model, recipes, training data, a tiny NanoWorld."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
CLIP = REPOSITORY / "tests" / "assets" / "tablet_drawing.mp4"
CAPTIONS = "captions.jsonl"
"""The records of the training data that have a medium."""
LATE = 5000.0
"""Seconds at which the stamps of the late clips begin."""


@dataclass(frozen=True)
class Bench:
    """Where the good things lie; every one of them must be taken without an error.

    Attributes:
        root: the folder of all of them. Cases copy what they change.
    """

    root: Path

    @property
    def model(self) -> Path:
        """A saved tiny model."""
        return self.root / "model"

    @property
    def world(self) -> Path:
        """A tiny NanoWorld."""
        return self.root / "world"

    @property
    def videos(self) -> Path:
        """The clips that the makers of damaged files start from."""
        return self.root / "videos"

    @property
    def data(self) -> Path:
        """Training data: eight conversations."""
        return self.root / "data" / "data.jsonl"

    @property
    def tokenizer(self) -> Path:
        """NanoWorld's tokenizer."""
        return self.root / "tokenizer"

    def media(self) -> list[Path]:
        """One good file of each kind, and a folder of frames."""
        return sorted((self.root / "media").iterdir())

    def recipes(self) -> dict[str, dict[str, Any]]:
        """{name: a tiny recipe with one stage over `data`}."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.root / "recipes").glob("*.json"))}

    def recipe(self, name: str = "llava") -> dict[str, Any]:
        """One of the recipes."""
        return json.loads((self.root / "recipes" / f"{name}.json").read_text())

    def conversations(self) -> list[dict[str, Any]]:
        """The records of `data`."""
        return [json.loads(line) for line in self.data.read_text().splitlines()]


def start_world(bench: Bench) -> subprocess.Popen:
    """A process that makes the world, which takes longest; `wait_for` it."""
    command = [sys.executable, "-m", "mmllm", "world", "make", "--level", "tiny", "--quiet", "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(bench.world)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def wait_for(world: subprocess.Popen) -> None:
    """Wait for the world.

    Raises:
        RuntimeError: it was not made; with what was said.
    """
    said, _ = world.communicate()
    if world.returncode:
        raise RuntimeError(f"the world was not made: {said.decode()}")


def build(root: Path) -> None:
    """Make all but the world below a folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    (root / "tmp").mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(root / "tmp"), None
    bench = Bench(root)
    _model(bench)
    _videos(bench.videos)
    _media(bench)
    _data(bench.data)
    _recipes(bench)


def _model(bench: Bench) -> None:
    from helpers.tiny import save_model, tokenizer_folder

    save_model(bench.model)
    shutil.copytree(tokenizer_folder(), bench.tokenizer)


def _videos(folder: Path) -> None:
    """What `data.makers` asks for by name, made of the one clip that the repository has."""
    from helpers.makers import _real, encode
    from PIL import Image

    folder.mkdir()
    for name in ("tablet_drawing.mp4", "countdown_room.mp4"):
        shutil.copyfile(CLIP, folder / name)
    frames = _real(folder)
    Image.fromarray(frames[0]).resize((224, 225)).save(folder / "apple.jpg", quality=90)
    Image.fromarray(frames[-1]).resize((320, 200)).save(folder / "waterview.jpg", quality=90)
    large = [np.asarray(Image.fromarray(frame).resize((320, 240))) for frame in frames]
    encode(str(folder / "stirfry.avi"), large, codec="mpeg4", b="2M")


def _media(bench: Bench) -> None:
    from helpers.makers import encode, encoded, gif, numbered
    from PIL import Image

    folder = bench.root / "media"
    folder.mkdir()
    shutil.copyfile(CLIP, folder / "real.mp4")
    encoded(bench.videos, folder / "front.mp4", movflags="faststart")
    encoded(bench.videos, folder / "clip.mkv")
    encoded(bench.videos, folder / "clip.avi", codec="mpeg4", b="2M")
    encoded(bench.videos, folder / "clip.webm", codec="libvpx-vp9")
    encoded(bench.videos, folder / "stream.ts")
    gif(bench.videos, folder / "clip.gif")
    pictures = numbered(bench.videos)
    Image.fromarray(pictures[3]).save(folder / "still.png")
    Image.fromarray(pictures[3]).save(folder / "still.jpg", quality=90)
    (folder / "frames").mkdir()
    for number, picture in enumerate(pictures[:12], start=1):
        Image.fromarray(picture).save(folder / "frames" / f"{number:05d}.jpg", quality=90)
    late = bench.root / "late"
    late.mkdir()
    moments = [LATE + number / 10 for number in range(len(pictures))]
    encode(str(late / "late.mkv"), pictures, moments=moments)
    encode(str(late / "late.ts"), pictures, moments=moments)


def _data(path: Path) -> None:
    from helpers.tiny import frames, image, write_video

    lines = []
    for number in range(8):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"Question {number}: what moves?"}]
        if number % 4 == 1:
            write_video(path.parent / f"clips/{number}.mp4", frames(number, 8))
            content.insert(0, {"type": "video", "path": f"clips/{number}.mp4", "start": 0.0, "end": 0.9})
        elif number % 4 == 2:
            path.parent.mkdir(exist_ok=True)
            image(number).save(path.parent / f"{number}.png")
            content.insert(0, {"type": "image", "path": f"{number}.png"})
        answer = "A red square moves left." if number % 2 else "left"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"sample-{number}", "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    clips = [line for line in lines if '"path"' in line]
    (path.parent / CAPTIONS).write_text("\n".join(clips) + "\n")


def _recipes(bench: Bench) -> None:
    from helpers.tiny import tiny_recipe

    from mmllm.config.recipe import names

    folder = bench.root / "recipes"
    folder.mkdir()
    for name in names():
        if not name.startswith("nano/") or name == "nano/base":
            continue
        recipe = tiny_recipe(name)
        recipe.model["llm"]["tokenizer"] = str(bench.tokenizer)
        settings = {"data": str(bench.data), "trains": ["encoders", "connector"], "steps": 2, "batch": 4, "lr": 1e-3}
        objective = next((stage.objective for stage in recipe.stages.values()), None)
        if name == "nano/clip":
            settings |= {"objective": objective, "trains": ["encoders", "connector", "text"]}
            recipe.model["text"]["words"]["joint"] = recipe.model["llm"]["config"]["hidden_size"]
            settings["data"] = str(bench.data.with_name(CAPTIONS))
        else:
            settings["trains"].append("llm")
        recipe.data["stages"] = {"instruct": settings}
        recipe.data["roots"] = {}
        recipe.data["eval"] = {"mvbench": str(bench.world / "mvbench")}
        (folder / f"{name.removeprefix('nano/')}.json").write_text(json.dumps(recipe.data))
