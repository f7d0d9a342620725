#!/usr/bin/env python
"""Peak memory of answering about a long clip against a short one, from file to words, through the nano twins.

    python scripts/bench/long_clip.py
    python scripts/bench/long_clip.py --short 50 --long 200 --recipe nano/longvlm --out long.json

Each length runs in its own process. The encoder sees single frames, so that it is run in pieces; what the LLM reads is
said beside the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from long_video import make_video

SETTINGS = {
    "nano/longvlm": ["model.connector.segments.frames_per_segment=20"],
    "nano/st_llm": [],
}
"""Recipes, and what is changed of them beside `motion`, which makes an encoder look at neighbouring frames."""


def main() -> None:
    """Run both lengths of each recipe and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=100, help="frames of the short clip (default 100)")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long clip (default 1000)")
    parser.add_argument("--recipe", choices=SETTINGS, action="append", help="default: all of them")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--one", nargs=3, metavar=("RECIPE", "VIDEO", "FRAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(answer(options.one[0], options.one[1], int(options.one[2]))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        video = make_video(Path(folder) / "long.mp4", options.long, 48, 48)
        for recipe in options.recipe or SETTINGS:
            runs = {}
            for name, frames in (("short", options.short), ("long", options.long)):
                command = [sys.executable, __file__, "--one", recipe, str(video), str(frames)]
                runs[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            extra = runs["long"]["peak_mb"] - runs["short"]["peak_mb"]
            found[recipe] = {**runs, "long_minus_short_mb": extra}
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def answer(name: str, video: str, frames: int) -> dict[str, float]:
    """Ask about the clip; visual tokens, length of the LLM's input, seconds, and the process's peak memory."""
    import time

    import torch

    from mmllm.config.recipe import load
    from mmllm.device import PeakMemory
    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model, build_processor
    from mmllm.model.reduction.read import visual_tokens
    from mmllm.world.tokenizer import build_tokenizer

    recipe = load(name, ["model.encoders.nano.motion=false", *SETTINGS[name]])
    blueprint = Blueprint.of(recipe)
    model, processor = build_model(blueprint).eval(), build_processor(blueprint, build_tokenizer())
    asked = [{"type": "video", "path": video, "frames": frames}, {"type": "text", "text": "What moves?"}]
    start = time.perf_counter()
    with PeakMemory(model.device) as peak, torch.no_grad():
        batch = processor.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        model.generate(**batch, max_new_tokens=8, do_sample=False)
    seconds, megabytes = time.perf_counter() - start, peak.bytes / 2**20
    (tokens,), length = visual_tokens(batch, blueprint.plan), batch["input_ids"].shape[1]
    frames = batch["visual"]["media"][0]["spec"].frames
    return {"frames": frames, "visual_tokens": tokens, "length": length, "seconds": seconds, "peak_mb": megabytes}


if __name__ == "__main__":
    main()
