"""What the caches save: epoch 2 against epoch 1 with a frozen tower, and a cached frame against a decoded one.

    python scripts/bench/feature_cache.py --videos ../shared/data/videos
    python scripts/bench/feature_cache.py --tower clip --clips 4 --frames 4 --out cache.json

The tower has the shape of SigLIP-B/16 (random weights), the connector and a small LLM train. Both epochs run in one
process over the same clips in the same order. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from mmllm.config.recipe import load
from mmllm.data.media.loading import Caches, MediaLoader
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef
from mmllm.data.records.conversations import Sample
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model, build_processor
from mmllm.train.caching import attach_caches
from mmllm.train.run import build_objective
from mmllm.train.stage import freeze
from mmllm.world.tokenizer import build_tokenizer

TOWERS = {
    "siglip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 16},
    "clip": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"image_size": 224, "patch_size": 16},
}
VIDEOS = (".mp4", ".avi")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=Path("../shared/data/videos"), help="folder of clips")
    parser.add_argument("--tower", choices=list(TOWERS), default="siglip")
    parser.add_argument("--clips", type=int, default=8, help="number of clips (default 8)")
    parser.add_argument("--frames", type=int, default=8, help="frames per clip (default 8)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    clips = sorted(path for path in options.videos.iterdir() if path.suffix in VIDEOS)[: options.clips]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = {"tower": options.tower, "clips": len(clips), "frames": options.frames}
        result |= epochs(clips, options, Path(folder) / "features")
        result |= frames(clips, options.frames, Path(folder) / "frames")
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def epochs(clips: list[Path], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of a first and a second epoch of training the connector over a frozen tower, with features kept."""
    recipe = load("nano/llava", [f"model.media.frames={options.frames}"])
    recipe.model["encoders"] = {"tower": {"type": options.tower, "config": TOWERS[options.tower]}}
    recipe.model["connector"] = [
        {"type": "pool", "name": "pool", "in": ["tower"], "grid": [options.frames, 4, 4]},
        {"type": "mlp", "name": "mlp", "in": ["pool"], "width": "llm"},
    ]
    blueprint = Blueprint.of(recipe)
    model = build_model(blueprint)
    processor = build_processor(blueprint, build_tokenizer())
    freeze(model, ("connector",), "bench")
    attach_caches(model, processor, None, Caches.open(folder, ("features",), None), "float32")
    model.train()
    objective = build_objective("language_modeling", "bench")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    samples = [
        Sample(clip.name, [{"role": "user", "content": [{"type": "video", "path": str(clip)}]}, reply()], {})
        for clip in clips
    ]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for at in range(0, len(samples), 2):
            batch = objective.prepare(samples[at : at + 2], processor)
            batch.pop("names")
            terms = model(**batch, objective=objective)
            sum(term.sum / term.count for term in terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    rate = processor.loader.caches.features.rate
    processor.loader.reader.close()
    first, second = seconds
    found = {"hits": rate.hits, "misses": rate.misses}
    return {"epoch_1_seconds": first, "epoch_2_seconds": second, "epoch_ratio": first / second, **found}


def reply() -> dict[str, str]:
    """An answer to learn from."""
    return {"role": "assistant", "content": "a red square moves left"}


def frames(clips: list[Path], count: int, folder: Path) -> dict[str, float]:
    """Milliseconds per frame, decoded and resized against cached, measured in turns; the median over clips."""
    geometry = build_model(Blueprint.of(_tower_recipe())).model.front_end.plan.geometries
    sampling = Sampling(frames=count)
    plain, kept = MediaLoader(), MediaLoader(caches=Caches.open(folder, ("frames",), None))
    decoded, cached = [], []
    for clip in clips:
        ref = MediaRef("video", str(clip))
        for loader in (plain, kept):
            loader.load(ref, sampling, geometry)
        for seconds, loader in ((decoded, plain), (cached, kept)) * 3:
            start = time.perf_counter()
            loaded = loader.load(ref, sampling, geometry)
            sum(int(pixels.sum()) for pixels in loaded.pixels.values())  # make sure the pages are read
            seconds.append((time.perf_counter() - start) / count)
    for loader in (plain, kept):
        loader.reader.close()
    slow, fast = sum(decoded) / len(decoded), sum(cached) / len(cached)
    return {"decoded_ms": 1e3 * slow, "cached_ms": 1e3 * fast, "frame_ratio": slow / fast}


def _tower_recipe() -> object:
    recipe = load("nano/llava", [])
    recipe.model["encoders"] = {"tower": {"type": "siglip", "config": TOWERS["clip"]}}
    recipe.model["connector"] = [{"type": "mlp", "name": "mlp", "in": ["tower"], "width": "llm"}]
    return recipe


if __name__ == "__main__":
    main()
