"""Peak memory of encoding a long clip against a short one, with a frozen encoder of ViT-B's shape.

    python scripts/bench/long_video.py
    python scripts/bench/long_video.py --short 20 --long 60 --layers 2 --out long.json

Each length runs in its own process: frames are read, resized and encoded a few at a time, and the tokens of each
chunk are written to a file before the next one is read. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AT_ONCE = 32


def main() -> None:
    """Run both lengths and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=100, help="frames of the short clip (default 100)")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long clip (default 1000)")
    parser.add_argument("--layers", type=int, default=12, help="depth of the encoder (default 12, as ViT-B)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--one", nargs=2, metavar=("VIDEO", "FRAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(encode(Path(options.one[0]), int(options.one[1]), options.layers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        video = make_video(Path(folder) / "long.mp4", options.long)
        runs = {}
        for name, frames in (("short", options.short), ("long", options.long)):
            command = [sys.executable, __file__, "--layers", str(options.layers), "--one", str(video), str(frames)]
            runs[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    extra = runs["long"]["peak_mb"] - runs["short"]["peak_mb"]
    text = json.dumps({**runs, "long_minus_short_mb": extra}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def make_video(path: Path, frames: int, height: int = 240, width: int = 320) -> Path:
    """A moving pattern."""
    import numpy as np

    from mmllm.world.video import write_mp4

    ramp = np.add.outer(np.arange(height), np.arange(width))
    write_mp4(
        path, np.stack([np.stack([ramp + 3 * i, ramp * 2 + i, ramp - i], -1) for i in range(frames)]).astype("u1")
    )
    return path


def encode(video: Path, frames: int, layers: int) -> dict[str, float]:
    """Write tokens of the first frames to a file, chunk by chunk; seconds and the process's peak memory."""
    import torch

    from mmllm.contract.parts import Site
    from mmllm.contract.types import MediaSpec, Needs
    from mmllm.data.media.pixels import to_geometry
    from mmllm.data.media.reader import VideoReader
    from mmllm.data.media.types import MediaRef
    from mmllm.encoders.image.huggingface import SiglipEncoder
    from mmllm.model.chunks import chunks_of

    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": layers, "num_attention_heads": 12}
    encoder = SiglipEncoder(Site(), config={**config, "image_size": 224, "patch_size": 16}).eval().requires_grad_(False)
    start, written = time.perf_counter(), 0
    with VideoReader(MediaRef("video", str(video))) as reader, tempfile.TemporaryFile() as file, torch.no_grad():

        def pieces():
            for first in range(0, frames, AT_ONCE):
                clip = reader.read_indices(range(first, min(first + AT_ONCE, frames)))
                yield to_geometry(clip.frames, encoder.geometry)[None]

        for part in chunks_of(encoder, pieces(), MediaSpec("video", frames), Needs()):
            part.values.numpy().tofile(file)
            written += part.values.numel() * part.values.element_size()
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count what the parent had
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    seconds = time.perf_counter() - start
    return {"frames": frames, "tokens_mb": written / 2**20, "seconds": seconds, "peak_mb": peak}


if __name__ == "__main__":
    main()
