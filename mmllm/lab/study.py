"""A study: which recipes are compared with which seeds, and whether the comparison is fair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.registry import load_plugin
from mmllm.recipe import Recipe, load

CLOSE = 0.05
"""Multiply-adds are equal if no arm has more than this share above the least."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Args:
        recipe: a shipped name or a file. set: overrides, `key.path=value`. free: leave it out of what has to be equal.
    """

    recipe: str
    set: tuple[str, ...] = ()
    free: bool = False


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        arms: {name: recipe, or a map of `recipe`, `set`, `free`}.
        baseline: the arm that the others are measured against; default: the first.
        seeds: training seeds; every arm is trained with each.
        equal: what has to be equal between the arms: tokens into the LLM, or multiply-adds; null = nothing.
        tasks: benchmarks that are run. limit: only the first items of each task.
        set: overrides for all arms, before their own.
        plugin: a file, or several, that register parts.
        summary: what is asked, in a sentence.
    """

    arms: dict
    baseline: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    equal: Literal["tokens", "flops"] | None = None
    tasks: tuple[str, ...] = ("mvbench",)
    limit: int | None = None
    set: tuple[str, ...] = ()
    plugin: tuple[str, ...] | str = ()
    summary: str = ""


@dataclass(frozen=True)
class Facts:
    """What an arm costs, without running anything: visual tokens of a video, parameters, multiply-adds."""

    tokens: int
    parameters: int
    macs: int


class StudyFile:
    """A study with its arms resolved.

    Args:
        path: a YAML file; recipes and plug-ins are looked for beside it first.
        overrides: `key.path=value` for all arms, after the study's own.

    Raises:
        UserError: not a study, an unknown key, an arm whose recipe does not load.
    """

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()) -> None:
        self.path = path
        self.study = _read(path)
        self.overrides = (*self.study.set, *overrides)
        named = (self.study.plugin,) if isinstance(self.study.plugin, str) else self.study.plugin
        self.plugins = [self._beside(name) for name in named]
        for plugin in self.plugins:
            load_plugin(plugin)
        self.arms = {name: self._arm(name, value) for name, value in self.study.arms.items()}
        self.recipes = {name: self.load(arm) for name, arm in self.arms.items()}
        self.baseline = self.study.baseline or next(iter(self.arms))
        if self.baseline not in self.arms:
            hint = nearest(self.baseline, list(self.arms))
            raise UserError(f"{path}:baseline", f"no arm is called {self.baseline!r}", hint=hint)

    def load(self, arm: Arm) -> Recipe:
        """The recipe of an arm, with all overrides."""
        return load(self.recipe_of(arm), [*self.overrides, *arm.set])

    def recipe_of(self, arm: Arm) -> str:
        """The recipe's name, or its file beside the study."""
        return self._beside(arm.recipe) if arm.recipe.endswith((".yaml", ".yml")) else arm.recipe

    def facts(self) -> dict[str, Facts]:
        """{arm: what it costs}.

        Raises:
            UserError: what the study wants to be equal is not; says the figures.
        """
        from mmllm.walk import walk

        found = {}
        for name, recipe in self.recipes.items():
            rows = walk(recipe)
            parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
            found[name] = Facts(rows[-1].tokens, parameters, macs)
        self._refuse_unequal(found)
        return found

    def _refuse_unequal(self, found: dict[str, Facts]) -> None:
        kind = self.study.equal
        if kind is None:
            return
        field = "tokens" if kind == "tokens" else "macs"
        figures = {name: getattr(facts, field) for name, facts in found.items() if not self.arms[name].free}
        slack = 0.0 if kind == "tokens" else CLOSE
        if max(figures.values()) > min(figures.values()) * (1 + slack):
            got = ", ".join(f"{name} {value}" for name, value in figures.items())
            hint = "change a grid, or `free: true` for an arm that is meant to differ"
            raise UserError(f"{self.path}:equal", f"the arms differ in {kind}", got=got, hint=hint)

    def _arm(self, name: str, value: Any) -> Arm:
        if "/" in name or "." in name:
            raise UserError(f"{self.path}:arms.{name}", "a name is a word without a dot or a slash")
        where = f"{self.path}:arms.{name}"
        return Arm(**bind(Arm, {"recipe": value} if isinstance(value, str) else value, where))

    def _beside(self, name: str) -> str:
        beside = self.path.parent / name
        return str(beside) if beside.is_file() else name


def _read(path: Path) -> Study:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(path, "no such study", expected="a YAML file with arms") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(path, f"not YAML: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("arms"), dict) or not data["arms"]:
        raise UserError(f"{path}:arms", "missing", expected="{name: recipe}")
    study = Study(**bind(Study, data, str(path)))
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{path}:seeds", "no seed, or one twice", got=list(study.seeds))
    return study
