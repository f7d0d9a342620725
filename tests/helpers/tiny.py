"""Tiny models and media for the tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from mmllm.config.recipe import Recipe, load
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model
from mmllm.model.modeling import MMLLMForConditionalGeneration
from mmllm.processing.processor import MMLLMProcessor

LLMS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def tiny_recipe(name: str = "nano/llava", llm: str = "llama", overrides: tuple[str, ...] = ()) -> Recipe:
    """A nano recipe with a still smaller LLM of any family."""
    recipe = load(name, ["model.media.frames=4", *overrides])
    config = recipe.model["llm"]["config"]
    config.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, **LLMS[llm])
    return recipe


@lru_cache(maxsize=1)
def tokenizer_folder() -> str:
    """NanoWorld's tokenizer, saved once per session."""
    import tempfile

    from mmllm.world.tokenizer import build_tokenizer

    folder = tempfile.mkdtemp(prefix="mmllm-tokenizer-")
    build_tokenizer().save_pretrained(folder)
    return folder


def tiny_processor(recipe: Recipe) -> MMLLMProcessor:
    """Its processor."""
    config = Blueprint.of(recipe).config
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    return MMLLMProcessor(tokenizer, config.model_section, config.text_config.hidden_size, 1024)


def tiny_model(recipe: Recipe, seed: int = 0) -> MMLLMForConditionalGeneration:
    """Its model, with random weights."""
    torch.manual_seed(seed)
    return build_model(Blueprint.of(recipe)).eval()


def save_model(folder: Path) -> Path:
    """A saved tiny model with its processor and recipe."""
    recipe = tiny_recipe()
    tiny_model(recipe).save_pretrained(folder)
    tiny_processor(recipe).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe.dump())
    return folder


def frames(seed: int, count: int = 8, side: int = 48) -> np.ndarray:
    """Random uint8 [T, H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def image(seed: int, side: int = 48) -> Image.Image:
    """A random picture."""
    return Image.fromarray(frames(seed, 1, side)[0])


def video(seed: int, count: int = 8) -> dict[str, Any]:
    """A content entry of an in-memory video."""
    return {"type": "video", "video": frames(seed, count)}


def picture(seed: int) -> dict[str, Any]:
    """A content entry of an in-memory image."""
    return {"type": "image", "image": image(seed)}


def turn(*content: Any, role: str = "user") -> dict[str, Any]:
    """A message out of text and content entries."""
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def conversations() -> list[list[dict]]:
    """Text only; one image; two images and a video in two turns; a video."""
    return [
        [turn("How many objects move?")],
        [turn(picture(1), "What color is it?")],
        [
            turn(picture(2), "and", video(3), "What moves?"),
            turn("left", role="assistant"),
            turn(picture(4), "And here?"),
        ],
        [turn(video(5), "Where is the red square at the end?")],
    ]


def write_video(path: Path, array: np.ndarray, fps: int = 8) -> Path:
    """Frames as an H.264 mp4."""
    from mmllm.world.video import write_mp4

    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, array)
    return path
