"""Recipes: YAML with inheritance and overrides by name; a paper is a recipe, a recipe is a list of parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmllm.config.llm_source import llm_source
from mmllm.config.overrides import override_all
from mmllm.config.schema import LLM, Stage
from mmllm.config.sections import merge, normalise
from mmllm.contract.arguments import NotNegative, bind, parse
from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.library import pretrained
from mmllm.contract.registry import find

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHIPPED = Path(__file__).parents[1] / "recipes"
BASES = 20
"""Longest allowed chain of bases."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with its bases merged, overrides applied and defaults written out.

    Attributes:
        name: as it was asked for.
        file: the YAML it came from, for errors.
        data: everything, as plain maps and lists; what is written beside a checkpoint.
    """

    name: str
    file: str
    data: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section."""
        return self.data["model"]

    @property
    def llm(self) -> LLM:
        """The language model."""
        return LLM(**bind(LLM, self.model["llm"], self.where("model.llm")))

    @property
    def stages(self) -> dict[str, Stage]:
        """{name: stage} in order, without stages that an override or an inheriting recipe sets to null."""
        sections = (self.data.get("stages") or {}).items()
        return {name: self._stage(name, section) for name, section in sections if section is not None}

    @property
    def eval_roots(self) -> dict[str, str]:
        """{benchmark: folder}."""
        return {name: self.path(root) for name, root in (self.data.get("eval") or {}).items()}

    def where(self, key: str) -> str:
        """`file:key path`, for errors."""
        return f"{self.file}:{key}"

    def path(self, text: str) -> str:
        """A path; `world:train/text.jsonl` is resolved below the folder named by `roots.world`."""
        root, _, rest = text.partition(":")
        roots = self.data.get("roots") or {}
        return str(Path(roots[root]) / rest) if rest and root in roots else text

    def dump(self) -> str:
        """YAML that loads to the same recipe."""
        return yaml.safe_dump(self.data, sort_keys=False, allow_unicode=True)

    def _stage(self, name: str, section: dict[str, Any]) -> Stage:
        where = self.where(f"stages.{name}")
        stage = Stage(**bind(Stage, section, where))
        if (stage.steps is None) == (stage.epochs is None):
            raise UserError(where, "give the length as either steps or epochs", hint=f"stages.{name}.steps=1000")
        for part, folder in stage.init.items() if isinstance(stage.init, dict) else ():
            if not isinstance(folder, str):
                raise UserError(f"{where}.init.{part}", "not a folder", expected="a run folder", got=folder)
        if isinstance(stage.lr, dict):
            rates = {key: parse(rate, NotNegative, f"{where}.lr.{key}") for key, rate in stage.lr.items()}
            stage = replace(stage, lr=rates)
        if not stage.data:
            raise UserError(f"{where}.data", "missing", expected="a .jsonl file of conversations")
        return stage


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.rglob("*.yaml"))


def load(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe by shipped name or file, with bases merged, overrides applied and defaults filled in.

    Args:
        overrides: `key.path=value` lines.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a wrong type.
    """
    path = _find(str(name))
    data = copy.deepcopy(_read(path, (), {}))
    recipe = Recipe(str(name), path.name, data)
    normalise(data, path.name)  # before, so that overrides find every node and default; after, to check what they set
    for key in ("roots", "eval"):  # present so that they can be overridden
        data[key] = data.get(key) or {}
    override_all(data, overrides, path.name)
    normalise(data, path.name)
    _ = recipe.llm, recipe.stages
    return recipe


def _find(name: str) -> Path:
    try:
        shipped, path = SHIPPED / f"{name}.yaml", Path(name)
        if shipped.is_file() and shipped.resolve().is_relative_to(SHIPPED.resolve()):
            return shipped
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # a name that is too long or contains a null byte
        raise UserError(shown(name), f"not a recipe ({error})", hint="mmllm recipe list") from None
    if path.suffix in (".yaml", ".yml"):
        raise UserError(name, "no such file", hint="mmllm recipe list")
    raise UserError(name, "no such recipe", hint=nearest(name, names()))


def _read(path: Path, above: tuple[Path, ...], known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """A recipe's file merged over its bases; `known` holds those already read for this recipe, so each is read once."""
    if path in known:
        return known[path]
    if path in above:
        raise UserError(f"{path.name}:base", "a recipe is its own base")
    if len(above) > BASES:
        raise UserError(f"{above[0].name}:base", f"more than {BASES} recipes above each other")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(path, "not a recipe", expected="a map of model, stages and eval", got=shown(data))
    bases = data.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path.name}:base", "wrong type", expected="a recipe or a list of them", got=shown(bases))
    merged: dict[str, Any] = {}
    for base in bases:
        beside = path.parent / base
        merged = merge(merged, _read(beside if beside.is_file() else _find(base), (*above, path), known))
    known[path] = merge(merged, data)
    return known[path]


def summaries() -> Iterator[tuple[str, str, str]]:
    """(name, summary, paper) of the shipped recipes; reads YAML only."""
    for name in names():
        data = _read(_find(name), (), {})
        yield name, data.get("summary", ""), data.get("paper", "")


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with inline configs where towers and LLM only have a name (asks the hub or a folder).

    Raises:
        UserError: a config that is nowhere to be found.
    """
    model = copy.deepcopy(recipe.model)
    for kind, key in (("encoder", "encoders"), ("text", "text")):
        for name, section in (model.get(key) or {}).items():
            where = recipe.where(f"model.{key}.{name}")
            fixed = {name: section[name] for name in ("type", "turns") if name in section}
            arguments = {name: value for name, value in section.items() if name not in fixed}
            completed = find(kind, section["type"], f"{where}.type").resolve(arguments)
            if isinstance(completed.get("tokenizer"), str):
                completed["tokenizer"] = recipe.path(completed["tokenizer"])
            model[key][name] = {**fixed, **completed}
    llm = recipe.llm
    if llm.config is None:
        if llm.name is None:
            raise UserError(recipe.where("model.llm"), "neither name nor config")
        config = fetch_llm_config(recipe, *llm_source(llm, recipe.where("model.llm.name")))
        model["llm"] = {**asdict(llm), "config": config.to_dict()}
    return replace(recipe, data={**recipe.data, "model": model})


def fetch_llm_config(recipe: Recipe, source: str, options: dict[str, Any]) -> PreTrainedConfig:
    """The library's config of the LLM that a recipe names.

    Args:
        source: as returned by `llm_source`.
        options: as returned by `llm_source`.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoConfig

    try:
        return pretrained(AutoConfig, source, **options)
    except (OSError, ValueError) as error:
        where = recipe.where("model.llm.name")
        raise UserError(where, f"cannot fetch {recipe.llm.name}", hint="give config:") from error


def differences(old: object, new: object, key: str = "") -> list[str]:
    """Key paths at which two nested maps differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for name in sorted({*old, *new})
            for found in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [key]
