"""The samples of a stage and the files that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.data.records import mix
from mmllm.data.records.conversations import Sample
from mmllm.data.records.mixture import Joined


def data_files(stage: Stage, recipe: Recipe) -> list[Path]:
    """All files that the stage's samples come from, including mixes.

    Raises:
        UserError: one is missing.
    """
    return [file for path, root in _data(stage, recipe) for file in mix.data_files(path, root)]


def load_data(stage: Stage, recipe: Recipe) -> Sequence[Sample]:
    """The stage's samples.

    Raises:
        UserError: a file is missing, empty, broken or of an unknown format.
    """
    parts = [mix.load_data(path, root) for path, root in _data(stage, recipe)]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _data(stage: Stage, recipe: Recipe) -> list[tuple[str, str | None]]:
    """(path, folder of its media or None) of the stage's data; a file under its own root keeps its own folder."""
    names = (stage.data,) if isinstance(stage.data, str) else stage.data
    media = (recipe.data.get("roots") or {}).get("media")
    return [(recipe.path(name), media if recipe.path(name) == name else None) for name in names]
