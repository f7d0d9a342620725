"""A small training run beside a busy neighbour: threads that spin while they wait, threads that sleep, fewer threads.

    python scripts/bench/busy_neighbour.py --steps 40 --out busy_neighbour.json

The neighbour is one process per core that multiplies matrices. Each setting is measured alone and beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WAYS = {
    "spinning, all cores": ("active", None),
    "sleeping, all cores": ("passive", None),
    "sleeping, one thread": ("passive", 1),
}
NEIGHBOUR = "import torch; torch.set_num_threads(1); a = torch.randn(600, 600)\nwhile True: a @ a"
STEPS = """
import sys, time, torch
if sys.argv[2] != "None": torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
blocks = [torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True) for _ in range(4)]
model = torch.nn.Sequential(*blocks)
optimizer = torch.optim.AdamW(model.parameters())
rows = torch.randn(32, 96, 128)
for step in range(int(sys.argv[1]) + 3):
    if step == 3: start = time.perf_counter()
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(time.perf_counter() - start)
"""


def seconds(steps: int, policy: str, threads: int | None) -> float:
    """Wall time of some training steps in a separate process."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", STEPS, str(steps), str(threads)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {name: {} for name in WAYS}
    for name, way in WAYS.items():
        found[name]["alone"] = round(seconds(options.steps, *way), 2)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    neighbours = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(cores)]
    try:
        time.sleep(5)  # until they are busy
        for name, way in WAYS.items():
            found[name]["beside"] = round(seconds(options.steps, *way), 2)
    finally:
        for process in neighbours:
            process.kill()
    text = json.dumps({"steps": options.steps, "cores": cores, "seconds": found}, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
