"""One slug per paper: its part, its recipe, its page and its parity test are found under one name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from mmllm.config.recipe import load, names

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "llava": "connectors/common/projectors.py",  # everybody's projector
    "clip": "train/objectives/contrastive.py",  # an objective, and no connector
    "llava_kd": "train/objectives/distillation.py",
}
"""Where the part of a paper is that is no connector of its own."""
NO_PART = ("smol",)
"""Recipes that name the paper of a model that they use; nothing of it is built here."""


def slugs() -> list[str]:
    """The shortest name among the recipes of each paper: the others are variants of it."""
    by_paper: dict[str, list[str]] = defaultdict(list)
    for name in names():
        if "/" not in name and (paper := load(name).data.get("paper")):
            by_paper[paper].append(name)
    return sorted(min(found, key=len) for found in by_paper.values())


@pytest.mark.parametrize("slug", [slug for slug in slugs() if slug not in NO_PART])
def test_a_paper_is_found_under_one_name(slug):
    part = ROOT / ELSEWHERE.get(slug, f"connectors/{slug}.py")
    assert part.is_file() or part.with_suffix("").is_dir(), f"no part in {part} or {part.with_suffix('')}/"
    assert (ROOT / f"mmllm/recipes/{slug}.yaml").is_file()
    assert (ROOT / f"mmllm/recipes/nano/{slug}.yaml").is_file()
    assert (ROOT / f"docs/methods/{slug}.md").is_file()
    assert list((ROOT / "tests/parity").glob(f"test_{slug}*.py")), f"no tests/parity/test_{slug}*.py"


def test_every_page_of_a_method_is_a_slug():
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == set(slugs()) - set(NO_PART)
