"""Our reader against bare decord and threaded PyAV, side by side in one run: frames per second, overhead, memory.

    python scripts/bench/read_video.py --videos ../shared/data/videos --out read_video.json
    python scripts/bench/read_video.py --repeats 3 --clips 60

All read the same frames of the same files: 16 uniform ones, all of them, and 16 within ten seconds of a ten-minute
file that is made here. They take turns, so that a busy machine slows all of them; a time includes opening and is the
best of the repetitions, which a busy machine disturbs least. The memory of many reads is measured in separate
processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.reader import probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

Read = Callable[[], np.ndarray]
HOWS = ("pyav", "pyav guarded", "decord guarded")


def bare_decord(path: str, indices: list[int]) -> np.ndarray:
    """As its manual shows."""
    import decord

    return decord.VideoReader(path).get_batch(indices).asnumpy()


def bare_pyav(path: str, indices: list[int], fps: float) -> np.ndarray:
    """The usual threaded loop: seek to the first frame, decode, keep what is wanted."""
    import av

    wanted, kept = set(indices), {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        origin, tick, sought = stream.start_time or 0, float(stream.time_base), indices[0] > 10 * fps
        if sought:
            container.seek(origin + int(indices[0] / fps / tick), stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            if sought:
                number = round((frame.pts - origin) * tick * fps)
            if number in wanted:
                kept[number] = frame.to_ndarray(format="rgb24")
            if number >= indices[-1]:
                break
    return np.stack([kept[number] for number in indices])


def make_video(path: Path, frames: int, height: int, width: int, fps: int = 25, gop: int = 250) -> Path:
    """A moving texture, so that frames are neither empty nor noise."""
    import av

    x, y = np.meshgrid(np.arange(width), np.arange(height))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": str(gop), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            wave = np.sin(x / 17 + number / 9) + np.cos(y / 11 - number / 13) + np.sin((x + y) / 29 + number / 5)
            picture = ((wave + 3) * 42)[..., None].astype(np.uint8).repeat(3, -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def in_turns(reads: dict[str, Read], repeats: int) -> tuple[dict[str, float], dict[str, bool]]:
    """Best seconds of each reader, and whether each gives the same frames as ours."""
    seconds: dict[str, list[float]] = {name: [] for name in reads}
    frames = {name: read() for name, read in reads.items()}
    equal = {name: bool(np.array_equal(frames[name], frames["ours"])) for name in reads}
    del frames
    for turn in range(repeats):
        names = list(reads)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            reads[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}, equal


def speed(refs: list[MediaRef], sampling: Callable[[Any], Sampling], repeats: int, guarded: dict[str, Any]) -> Any:
    """Frames per second of every reader over some files, and the ratio to the better of the two bare ones."""
    totals, clips, frames = dict.fromkeys(("decord", "threaded pyav"), 0.0), {}, 0
    for ref in refs:
        header = probe(ref)
        chosen = sampling(header)
        indices = chosen.indices(header, ref.start, ref.end)
        reads = {
            "decord": lambda ref=ref, indices=indices: bare_decord(ref.path, indices),
            "threaded pyav": lambda ref=ref, indices=indices, header=header: bare_pyav(ref.path, indices, header.fps),
            "ours": lambda ref=ref, chosen=chosen: read_media(ref, chosen).frames,
            "ours guarded": lambda ref=ref, chosen=chosen: guarded["pyav"].read(ref, chosen).frames,
            "ours by decord": lambda ref=ref, chosen=chosen: read_media(ref, chosen, "decord").frames,
        }
        seconds, equal = in_turns(reads, repeats)
        for name, value in seconds.items():
            totals[name] = totals.get(name, 0.0) + value
        frames += len(indices)
        best = min(seconds["decord"], seconds["threaded pyav"])
        clips[Path(ref.path).name] = {
            "milliseconds": {name: round(value * 1000, 2) for name, value in seconds.items()},
            "ours / best": round(best / seconds["ours"], 3),
            "guarded / best": round(best / seconds["ours guarded"], 3),
            "other frames": [name for name, same in equal.items() if not same],
        }
    best = min(totals["decord"], totals["threaded pyav"])
    return {
        "frames per second": {name: round(frames / value, 1) for name, value in totals.items()},
        "relative to the best bare one": {name: round(best / value, 3) for name, value in totals.items()},
        "clips": clips,
    }


def overhead(ref: MediaRef, repeats: int, guarded: GuardedReader) -> dict[str, float]:
    """What the separate process costs a read of 16 frames."""
    chosen = Sampling(frames=16)
    reads = {"ours": lambda: read_media(ref, chosen).frames, "guarded": lambda: guarded.read(ref, chosen).frames}
    seconds, _ = in_turns(reads, repeats)
    more = seconds["guarded"] - seconds["ours"]
    return {
        "direct ms": round(seconds["ours"] * 1000, 3),
        "guarded ms": round(seconds["guarded"] * 1000, 3),
        "more ms": round(more * 1000, 3),
        "more %": round(100 * more / seconds["ours"], 2),
    }


def resident(process: int) -> int:
    """Bytes in memory of a process and those it has forked."""
    own = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return own + sum(resident(int(child)) for child in children)


def memory(how: str, paths: list[str], count: int) -> dict[str, Any]:
    """Mean resident megabytes in each quarter of many reads, of this process with its children.

    One round over all clips comes first, so that everything is imported and the heap has its final size.
    """
    backend, _, process = how.partition(" ")
    reader, sizes = GuardedReader(backend), []
    for number in range(-len(paths), count):
        ref = MediaRef("video", paths[number % len(paths)])
        clip = reader.read(ref, Sampling(frames=16)) if process else read_media(ref, Sampling(frames=16), backend)
        assert len(clip.frames) == 16
        del clip
        if number >= 0:
            sizes.append(resident(os.getpid()) / 1e6)
    reader.close()
    quarters = [statistics.mean(sizes[count * k // 4 : count * (k + 1) // 4]) for k in range(4)]
    return {
        "MB by quarter": [round(value, 1) for value in quarters],
        "last / first": round(quarters[3] / quarters[0], 4),
    }


def memory_elsewhere(how: str, options: argparse.Namespace) -> Any:
    """:func:`memory` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--videos",
        str(options.videos),
        "--clips",
        str(options.clips),
        "--memory",
        how,
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=Path("../shared/data/videos"), help="folder of clips")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions of every read (the best one counts)")
    parser.add_argument("--clips", type=int, default=200, help="reads of the memory measurement")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the long file")
    parser.add_argument("--memory", choices=HOWS, help="measure only this, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    paths = sorted(str(path) for path in options.videos.iterdir() if path.suffix in (".mp4", ".avi"))
    if options.memory:
        print(json.dumps(memory(options.memory, paths, options.clips)))
        return
    clips = [MediaRef("video", path) for path in paths]
    with tempfile.TemporaryDirectory() as folder, GuardedReader() as pyav:
        guarded = {"pyav": pyav}
        small = make_video(Path(folder) / "small.mp4", 16, 48, 48, fps=8)
        long = make_video(Path(folder) / "long.mp4", int(options.minutes * 60 * 25), 240, 320)
        middle = options.minutes * 30
        part = MediaRef("video", str(long), middle, middle + 10)
        of_wide = MediaRef("video", str(options.videos / "countdown_room.mp4"))
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "16 uniform": speed(clips, lambda header: Sampling(frames=16), options.repeats, guarded),
            "all": speed(
                clips, lambda header: Sampling(frames=header.frames, sampler="linspace"), options.repeats, guarded
            ),
            "10 s of a long file": speed([part], lambda header: Sampling(frames=16), options.repeats, guarded),
            "overhead 16 x 48x48": overhead(MediaRef("video", str(small)), 40 * options.repeats, pyav),
            "overhead 16 x 640x360": overhead(of_wide, 4 * options.repeats, pyav),
            "memory": {how: memory_elsewhere(how, options) for how in HOWS},
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
