"""Contact sheets: one picture per task with eight frames of a few items, the question, and the right option marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError
from mmllm.world.make import MANIFEST
from mmllm.world.question import LETTERS
from mmllm.world.tasks import MLVU, MVBENCH, Task

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SHOWN = 8
TILE = 96
LINE = 15


def decode(path: Path) -> list[np.ndarray]:
    """All frames of an mp4 file or of a folder of jpg files, each [S, S, 3] uint8.

    Raises:
        UserError: the clip is missing.
    """
    if path.is_dir():
        import numpy as np
        from PIL import Image

        return [np.asarray(Image.open(file)) for file in sorted(path.glob("*.jpg"))]
    if not path.exists():
        raise UserError(path, "no such clip", hint="mmllm world make")
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def seen(item: dict[str, object], path: Path) -> list[np.ndarray]:
    """Eight frames, the middles of eight equal parts of the clip or of its bounded part."""
    frames = decode(path)
    first, last = 0, len(frames) - 1
    if "start" in item:
        jpg = path.is_dir()
        first, last = (round(float(str(item[key])) * (3 if jpg else 8)) - jpg for key in ("start", "end"))
    step = (min(last, len(frames) - 1) - first) / SHOWN
    return [frames[int(first + step / 2 + step * i)] for i in range(SHOWN)]


def captions(item: dict[str, object]) -> list[str]:
    """The question and its options, the right one marked; the answer if there are no options."""
    lines = [str(item["question"])]
    options = item.get("candidates")
    if isinstance(options, list):
        marked = [
            f"({x}) {option}" + ("  <==" if option == item["answer"] else "")
            for x, option in zip(LETTERS, options, strict=False)
        ]
        return lines + marked
    text = str(item["answer"])
    return lines + [text[i : i + 100] for i in range(0, len(text), 100)]


def sheet(task: Task, root: Path, rows: int) -> Image.Image:
    """The picture of one task: `rows` items below `root` (``mvbench`` or ``mlvu`` of a world)."""
    from PIL import Image, ImageDraw

    file = root / "json" / f"{task.stem}.json"
    try:
        items = json.loads(file.read_text(encoding="utf-8"))[:rows]
        clips = [root / "video" / task.folder / item["video"] for item in items]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(file, "damaged or missing", hint="mmllm world make --out another folder") from error
    width, top = SHOWN * (TILE + 4) + 4, 24
    height = TILE + LINE * 7 + 8
    picture = Image.new("RGB", (width, top + height * len(items)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((4, 4), f"{task.name}  ({root.name}/video/{task.folder})", fill="black")
    for row, (item, clip) in enumerate(zip(items, clips, strict=True)):
        y = top + row * height
        for i, frame in enumerate(seen(item, clip)):
            tile = Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.NEAREST)
            picture.paste(tile, (4 + i * (TILE + 4), y))
        for i, line in enumerate(captions(item)):
            pen.text((4, y + TILE + 3 + i * LINE), line, fill="darkgreen" if "<==" in line else "black")
    return picture


def contact_sheet(world: Path, out: Path, rows: int = 5) -> list[Path]:
    """Write one PNG per task of a world into the folder `out` and return their paths.

    Args:
        world: a folder that `make_world` has written.
        out: folder for the pictures; created if needed.
        rows: number of items per picture.

    Raises:
        UserError: `world` is not a finished world.
    """
    if not (world / MANIFEST).exists():
        raise UserError(world, "no finished world here", hint=f"mmllm world make --out {world}")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for root, tasks in (("mvbench", MVBENCH), ("mlvu", MLVU)):
        for task in tasks:
            paths.append(out / f"{root}-{task.stem}.png")
            sheet(task, world / root, rows).save(paths[-1])
    return paths
