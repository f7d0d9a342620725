"""What both back ends make of the damaged files of tests/helpers/damage.py: JSON, and a table for people.

    python scripts/bench/damaged_media.py --videos ../shared/data/videos --out damaged.json
    python scripts/bench/damaged_media.py --each

Every file is read by a GuardedReader under a time limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.limits import Limits
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from helpers.damage import CASES

ASKED = 16


def read(reader: GuardedReader, kind: str, path: Path) -> dict[str, Any]:
    """The outcome for one file, and the seconds it took."""
    start = time.perf_counter()
    try:
        clip = reader.read(MediaRef(kind, str(path)), Sampling(frames=ASKED))
        outcome = f"{len(clip.frames)} frames" + (f", {clip.repeated} repeated" if clip.repeated else "")
        outcome += ", reported as damaged" if clip.corrupt else ""
        cause = ""
    except UserError as error:
        outcome, cause = "error", str(error.what)
    return {"outcome": outcome, "cause": cause, "seconds": round(time.perf_counter() - start, 3)}


def each_row(row: dict[str, Any]) -> str:
    """One line per file."""
    cells = [f"{row[name]['outcome']} {row[name]['cause']}".strip() for name in ("pyav", "decord")]
    return f"| {row['name']} | {cells[0]} | {cells[1]} | {max(row['pyav']['seconds'], row['decord']['seconds']):.2f} |"


def group_row(group: str, rows: list[dict[str, Any]]) -> str:
    """One line per group: the count of each outcome, and the slowest file."""
    cells = []
    for name in ("pyav", "decord"):
        counts = Counter("errors" if row[name]["cause"] else "clips" for row in rows)
        cells.append(", ".join(f"{counts[what]} {what}" for what in ("clips", "errors") if counts[what]))
    slowest = max(row[name]["seconds"] for row in rows for name in ("pyav", "decord"))
    return f"| {group} | {len(rows)} | {cells[0]} | {cells[1]} | {slowest:.2f} |"


def main() -> None:
    """Make, read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=Path("../shared/data/videos"), help="folder of real clips")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds per file (default 10)")
    parser.add_argument("--each", action="store_true", help="a table of all files instead of groups")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    limits, rows = Limits(timeout=options.timeout), []
    with (
        tempfile.TemporaryDirectory() as folder,
        GuardedReader("pyav", limits) as pyav,
        GuardedReader("decord", limits) as decord,
    ):
        for case in CASES:
            path = Path(folder) / case.name
            case.make(options.videos, path)
            outcomes = {"pyav": read(pyav, case.kind, path), "decord": read(decord, case.kind, path)}
            rows.append({"name": case.name, "group": case.group, **outcomes})
    text = json.dumps(rows, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.each:
        print("\n| file | pyav | decord | slower, s |\n|---|---|---|---|", *map(each_row, rows), sep="\n")
        return
    print("\n| files | number | pyav | decord | slowest, s |\n|---|---|---|---|---|")
    for group in dict.fromkeys(case.group for case in CASES):
        print(group_row(group, [row for row in rows if row["group"] == group]))


if __name__ == "__main__":
    main()
