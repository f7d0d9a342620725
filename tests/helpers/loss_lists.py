"""The first losses of every nano recipe, as they were: `python tests/helpers/loss_lists.py` stores them anew.

Run it where a change of a loss is meant, and say in the commit why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.small_runs import options

from mmllm.config.recipe import load, names
from mmllm.train.run import train

STORED = Path(__file__).resolve().parents[1] / "assets" / "losses.json"
STEPS = 20
RECIPES = [name for name in names() if name.startswith("nano/") and name != "nano/base"]


def first_losses(name: str, world: Path, folder: Path) -> list[float]:
    """Losses of 20 small steps of a recipe's last stage, from random weights where it starts from another run.

    A teacher or a start is `nano/llava` or `nano/small` after a single step.
    """
    made = load(name, [f"roots.world={world}"])
    stages = made.data["stages"]
    for stage in list(stages)[:-1]:
        del stages[stage]
    (stage,) = stages.values()
    for root in ("teacher", "start"):
        if root in made.data["roots"]:
            made.data["roots"][root] = str(
                _start("nano/small" if "small" in name else "nano/llava", world, folder / root)
            )
    given = stage.get("init")
    if not isinstance(given, str):  # towers of other studies are not made here
        stage.pop("init", None)
    stage |= {"steps": STEPS, "batch": 8, "validation": None, "validate_every": None}
    stage["share"] = False
    train(made, folder / "run", options(threads=1))
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _start(name: str, world: Path, folder: Path) -> Path:
    made = load(name, [f"roots.world={world}"])
    stages = made.data["stages"]
    for stage in list(stages)[:-1]:
        del stages[stage]
    next(iter(stages.values())).update(steps=1, batch=8)
    train(made, folder, options(threads=1, seed=3))
    return folder


def main() -> None:
    """Store the lists of all nano recipes."""
    import tempfile

    from mmllm.world.make import make_world

    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        make_world(world, "tiny", seed=0, jobs=1)
        found = {}
        for name in RECIPES:
            found[name] = first_losses(name, world, Path(folder) / name.replace("/", "-"))
            print(name, found[name][0], found[name][-1], flush=True)
    STORED.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
