"""Study files for the tests of the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SHIPPED = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
ARMS = {"llava": "nano/llava", "means": {"recipe": "nano/video_chatgpt", "set": ["stages.instruct.lr=1e-4"]}}


def study(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    data = {"arms": ARMS, "seeds": [0, 1], "summary": "Are means enough?", **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return path
