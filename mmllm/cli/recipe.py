"""`mmllm recipe`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mmllm.cli.common import calm_libraries, common, print_json
from mmllm.contract.errors import UserError
from mmllm.tables import aligned

EPILOG = """\
examples:
  mmllm recipe list
  mmllm recipe show llava
  mmllm recipe show nano/llava model.media.frames=16
  mmllm recipe check my.yaml --plugin my_part.py
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog = EPILOG
    parser.description = "Recipes: what they are made of, and whether they hold together."
    verbs = parser.add_subparsers(dest="action", metavar="list|show|check", required=True)
    listing = verbs.add_parser("list", help="the shipped recipes")
    common(listing, "--json")
    listing.set_defaults(run=run_list)
    for name, summary, run in (
        ("show", "the walk: part, grid, tokens, width, parameters, multiply-adds", run_show),
        ("check", "declared = real, gradients, batch = single, save = load", run_check),
    ):
        verb = verbs.add_parser(name, help=summary)
        verb.add_argument("recipe", help="a shipped name or a YAML file")
        verb.add_argument("overrides", nargs="*", metavar="key=value")
        common(verb, "--json", "--plugin", "--trust-remote-code")
        verb.set_defaults(run=run)
        if name == "show":
            verb.add_argument("--image", action="store_true", help="the walk of an image instead of a video")
            verb.add_argument("--size", metavar="WxH", help="pixels of that image, where the recipe cuts it into tiles")


def run_list(options: argparse.Namespace) -> int:
    """Print names and summaries; reads YAML only."""
    from mmllm.config.recipe import summaries

    rows = list(summaries())
    if options.json:
        print_json([{"name": name, "summary": summary, "paper": paper} for name, summary, paper in rows])
        return 0
    lines = [(name, f"{summary}  [{paper}]" if paper else summary) for name, summary, paper in rows]
    print("\n".join(aligned(lines, left=2)))
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Print the walk."""
    calm_libraries()
    from mmllm.checks.summary import as_dicts, render, walk
    from mmllm.config.recipe import load
    from mmllm.model.blueprint import Blueprint, llm_facts

    blueprint = Blueprint.of(load(options.recipe, options.overrides))
    recipe = blueprint.recipe
    rows = walk(blueprint, "image" if options.image else "video", size=_size(options))
    if options.json:
        print_json({"recipe": recipe.name, "llm": llm_facts(recipe), "parts": as_dicts(rows)})
        return 0
    print(render(rows))
    print(f"llm: {llm_facts(recipe)}")
    for name, stage in recipe.stages.items():
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epochs"
        print(f"stage {name}: {length} of {stage.batch}, trains {', '.join(stage.trains)}, lr {_rates(stage.lr)}")
    return 0


def _rates(lr: float | dict[str, float]) -> str:
    """One learning rate, or one per name."""
    return f"{lr:g}" if not isinstance(lr, dict) else ", ".join(f"{name} {rate:g}" for name, rate in lr.items())


def _size(options: argparse.Namespace) -> tuple[int, int] | None:
    """`--size 1000x667` as (height, width)."""
    if options.size is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", options.size)
    if not options.image or found is None:
        raise UserError(f"--size {options.size}", "not a size of an image", expected="--image --size 1000x667")
    return int(found[2]), int(found[1])


def run_check(options: argparse.Namespace) -> int:
    """Check every part of a recipe and the recipe as a whole."""
    calm_libraries()
    from mmllm.checks.part import check_part
    from mmllm.checks.recipe import check_recipe
    from mmllm.config.recipe import load, resolve
    from mmllm.contract.registry import find
    from mmllm.model.blueprint import Blueprint

    recipe = resolve(load(options.recipe, options.overrides))
    for node in recipe.model["connector"]:
        find("connector", node["type"], recipe.where(f"model.connector.{node['name']}.type"))
    for kind, section in (  # before the whole recipe, so that a faulty part is reported as such
        ("encoder", recipe.model["encoders"].values()),
        ("text", (recipe.model.get("text") or {}).values()),
        ("connector", recipe.model["connector"]),
    ):
        for name in sorted({part["type"] for part in section}):
            check_part(kind, name)
    facts: dict[str, Any] = check_recipe(Blueprint.of(recipe))
    print_json(facts) if options.json else print(facts["says"])
    return 0
