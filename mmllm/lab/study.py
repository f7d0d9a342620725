"""A study: which recipes are compared with which seeds, and whether the comparison is fair."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeVar

from mmllm.config.recipe import Recipe, load
from mmllm.config.sections import check_name
from mmllm.contract.arguments import Count, Seed, bind
from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.registry import load_plugin
from mmllm.eval.benchmarks import parse_tasks
from mmllm.lab.settings import Setting, expanded

CLOSE = 0.05
"""Multiply-adds count as equal if no arm exceeds the least by more than this share."""


Entry = TypeVar("Entry", "Arm", "First")


@dataclass(frozen=True)
class Arm:
    """One of the recipes compared.

    Args:
        recipe: a shipped name or a file.
        set: overrides, `key.path=value`.
        free: exclude it from what has to be equal.
    """

    recipe: str
    set: tuple[str, ...] = ()
    free: bool = False


@dataclass(frozen=True)
class First:
    """A preliminary run, trained before the arms.

    Args:
        recipe: a shipped name or a file.
        set: overrides, `key.path=value`.
        then: an mmllm command to run on the result, with all its flags. `name:file` is a path below this run's folder,
            `world:file` one below the root of that name in its recipe: `data align-levels world:train/caption.jsonl
            --pair clip:model --levels 4 --out clip:levels.jsonl`.
    """

    recipe: str
    set: tuple[str, ...] = ()
    then: str | None = None


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        arms: {name: recipe, or a map of `recipe`, `set`, `free`}.
        first: {name: recipe, or a map of `recipe`, `set`, `then`}: runs trained once per seed before the arms and not
            evaluated; the recipes of the arms get the run folder of their seed as a root of this name, so that a stage
            can start from it: `init: {encoders: "clip:model"}`.
        baseline: the arm that the others are compared with; default: the first.
        seeds: training seeds; every arm is trained with each.
        equal: what has to be equal across the arms: tokens into the LLM, or multiply-adds; null = nothing.
        tasks: benchmarks to run, or single tasks of them (`mlvu:order`).
        limit: only the first items of each task.
        evaluate: settings, `{reduce, keep, protocol}`, under each of which every run is evaluated; a list as a value
            means each of them. Default: as trained.
        set: overrides for all arms, before their own.
        plugin: a file, or several, that register parts.
        summary: the question of the study, in a sentence.
    """

    arms: dict
    first: dict = field(default_factory=dict)
    baseline: str | None = None
    seeds: tuple[Seed, ...] = (0, 1, 2)
    equal: Literal["tokens", "flops"] | None = None
    tasks: tuple[str, ...] = ("mvbench",)
    limit: Count | None = None
    evaluate: tuple[dict, ...] = ({},)
    set: tuple[str, ...] = ()
    plugin: tuple[str, ...] | str = ()
    summary: str = ""


@dataclass(frozen=True)
class Facts:
    """The cost of an arm, without running anything: visual tokens of a video, parameters, multiply-adds."""

    tokens: int
    parameters: int
    macs: int


class StudyFile:
    """A study with its arms resolved.

    Args:
        path: a YAML file; recipes and plug-ins are looked up beside it first.
        overrides: `key.path=value` for all arms, after the study's own.

    Raises:
        UserError: not a study, an unknown key, an arm whose recipe cannot be loaded.
    """

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()) -> None:
        self.path = path
        self.study = _read(path)
        for task in self.study.tasks:
            parse_tasks(task, f"{path}:tasks")
            if "," in task:
                raise UserError(f"{path}:tasks", "one benchmark or task each", got=task, hint="a list of them")
        self.overrides = (*self.study.set, *overrides)
        named = (self.study.plugin,) if isinstance(self.study.plugin, str) else self.study.plugin
        self.plugins = [self._beside(name) for name in named]
        for plugin in self.plugins:
            load_plugin(plugin)
        self.first = {name: self._entry(First, "first", name, value) for name, value in self.study.first.items()}
        self.arms = {name: self._entry(Arm, "arms", name, value) for name, value in self.study.arms.items()}
        for name in self.first:
            if name in self.arms:
                raise UserError(f"{path}:first.{name}", "an arm has this name too")
        self.recipes = {name: self.load(name) for name in {**self.first, **self.arms}}
        self.settings = self._settings()
        self.then = {name: self._command(name, entry.then) for name, entry in self.first.items() if entry.then}
        self._check_roots()
        self.baseline = self.study.baseline or next(iter(self.arms))
        if self.baseline not in self.arms:
            hint = nearest(self.baseline, list(self.arms))
            raise UserError(f"{path}:baseline", f"no arm is called {self.baseline!r}", hint=hint)

    def _layers(self) -> list[int]:
        """Of the LLMs of the arms, where their recipes say."""
        configs = [self.recipes[name].model["llm"].get("config") or {} for name in self.arms]
        return [config["num_hidden_layers"] for config in configs if "num_hidden_layers" in config]

    def _settings(self) -> dict[str, Setting]:
        """{title: setting} of the evaluations."""
        found: dict[str, Setting] = {}
        numbered = [(number, one) for number, given in enumerate(self.study.evaluate) for one in expanded(given)]
        for number, section in numbered:
            where = f"{self.path}:evaluate[{number}]"
            setting = Setting(**bind(Setting, section, where))
            setting = replace(setting, reduce=self._beside(setting.reduce))
            setting.check(where, self._layers())
            if setting.title in found:
                raise UserError(where, "given twice", got=setting.title)
            found[setting.title] = setting
        if not found:
            raise UserError(f"{self.path}:evaluate", "no setting", expected="[{reduce: aim, keep: 0.5}, ...]")
        return found

    def _check_roots(self) -> None:
        """Check roots, which include the preliminary runs; a bad path would otherwise fail only after hours."""
        for name, recipe in self.recipes.items():
            known = set(recipe.data.get("roots") or {})
            if name in self.arms:
                if taken := (known | {"media"}) & set(self.first):
                    raise UserError(f"{self.path}:first.{min(taken)}", "recipes of the arms have a root of this name")
                known |= set(self.first)
            for key, path in self._paths(recipe):
                _check_root(path, known, f"{self._where(name)}: {key}")
            for word in self.then.get(name, []):  # most words of a command are not paths
                path = word.rpartition("=")[2]
                if get_close_matches(path.partition(":")[0], [*known, name]):
                    _check_root(path, {*known, name}, f"{self._where(name)}.then")

    def _paths(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        """(key, path) of the files and folders that a recipe names: benchmarks, data, what stages start from."""
        for name in self.benchmarks:
            yield f"eval.{name}", recipe.data["eval"].get(name) or ""
        for name, stage in recipe.stages.items():
            for folder in stage.init.values() if isinstance(stage.init, dict) else [stage.init or ""]:
                yield f"stages.{name}.init", folder
            for path in [stage.data] if isinstance(stage.data, str) else stage.data:
                yield f"stages.{name}.data", path

    def check_tasks(self) -> None:
        """Check that every arm names the folder of every benchmark.

        Raises:
            UserError: one does not.
        """
        for benchmark in self.benchmarks:
            for name in self.arms:
                if benchmark not in self.recipes[name].eval_roots:
                    hint = f"set: [eval.{benchmark}=DIR]"
                    raise UserError(f"{self._where(name)}: eval.{benchmark}", "where are its files?", hint=hint)

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks that its tasks belong to."""
        return list(parse_tasks(",".join(self.study.tasks)))

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Add the arm's name to errors from its recipe."""
        try:
            yield
        except UserError as error:
            where = f"{self._where(name)}: {error.where}"
            raise UserError(where, error.what, expected=error.expected, got=error.got, hint=error.hint) from error

    def _where(self, name: str) -> str:
        return f"{self.path}:{'first' if name in self.first else 'arms'}.{name}"

    def _command(self, name: str, then: str) -> list[str]:
        """The words of a follow-up command."""
        from mmllm.cli import VERBS, parse

        where = f"{self._where(name)}.then"
        try:
            words = shlex.split(then)
        except ValueError as error:
            raise UserError(where, f"not a command: {error}", got=then) from error
        if not words or words[0] not in VERBS:
            raise UserError(where, "starts with a verb of mmllm", got=then, hint=", ".join(VERBS))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parse(words)
        except SystemExit as error:
            raise UserError(where, (said.getvalue().strip().splitlines() or ["not a command"])[-1]) from error
        return words

    def then_of(self, name: str, out: Path) -> list[str]:
        """The follow-up command of a preliminary run, with paths below its run folder `out` and roots resolved."""
        recipe, own = self.recipes[name], f"{name}:"

        def placed(word: str) -> str:
            found = str(out / word.removeprefix(own)) if word.startswith(own) else recipe.path(word)
            flag, equals, value = word.partition("=")
            return f"{flag}={placed(value)}" if found == word and equals else found

        return [placed(word) for word in self.then.get(name, [])]

    def load(self, name: str) -> Recipe:
        """The recipe of an arm or a preliminary run, with its overrides."""
        with self._named(name):
            return load(self.recipe_of(name), self.overrides_of(name))

    def recipe_of(self, name: str) -> str:
        """The name of its recipe, or the recipe's file beside the study."""
        recipe = {**self.first, **self.arms}[name].recipe
        return self._beside(recipe) if recipe.endswith((".yaml", ".yml")) else recipe

    def overrides_of(self, name: str) -> list[str]:
        """The shared overrides (only roots for a preliminary run, whose stages are others), then its own."""
        if name in self.first:
            return [*(word for word in self.overrides if word.startswith("roots.")), *self.first[name].set]
        return [*self.overrides, *self.arms[name].set]

    def facts(self) -> dict[str, Facts]:
        """{arm: its cost}.

        Raises:
            UserError: something that the study requires to be equal is not; states the figures.
        """
        from mmllm.checks.summary import walk
        from mmllm.model.blueprint import Blueprint
        from mmllm.train.weights import validate_module_names

        found = {}
        for name, recipe in self.recipes.items():
            with self._named(name):
                blueprint = Blueprint.of(recipe)
                for stage, values in recipe.stages.items():
                    validate_module_names(blueprint.plan, values, recipe.where(f"stages.{stage}"))
                rows = walk(blueprint)
            parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
            found[name] = Facts(rows[-1].tokens, parameters, macs)
        arms = {name: found[name] for name in self.arms}
        self._refuse_unequal(arms)
        return arms

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

    def _entry(self, cls: type[Entry], section: str, name: str, value: object) -> Entry:
        where = f"{self.path}:{section}.{name}"
        check_name(name, where)
        return cls(**bind(cls, {"recipe": value} if isinstance(value, str) else value, where))

    def _beside(self, name: str) -> str:
        beside = self.path.parent / name
        return str(beside) if beside.is_file() else name


def _check_root(path: str, known: set[str], where: str) -> None:
    """Refuse `clp:model` where nothing is called `clp`."""
    root, _, rest = path.partition(":")
    if rest and not rest.startswith("/") and root.isidentifier() and root not in known:
        raise UserError(where, f"no root is called {root!r}", got=path, hint=nearest(root, sorted(known)))


def _read(path: Path) -> Study:
    if not path.is_file():
        raise UserError(path, "no such study", expected="a YAML file with arms")
    data = read_yaml(path)
    if not isinstance(data, dict) or not isinstance(data.get("arms"), dict) or not data["arms"]:
        raise UserError(f"{path}:arms", "missing", expected="{name: recipe}")
    study = Study(**bind(Study, data, f"{path}:"))
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{path}:seeds", "no seed, or one twice", got=list(study.seeds))
    return study
