"""Recipes: YAML with inheritance and overrides by name; a paper is a recipe, a recipe is a list of parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError, nearest
from mmllm.located import llm_source
from mmllm.overrides import override
from mmllm.sections import LLM, Stage

SHIPPED = Path(__file__).parent / "recipes"
MODEL_KEYS = ("media", "encoders", "text", "connector", "output", "place", "llm")
TOP_KEYS = ("summary", "paper", "roots", "model", "stages", "eval")


@dataclass
class Recipe:
    """A resolved recipe.

    Attributes:
        name: as it was asked for. file: the YAML it came from, for errors.
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
        """{name: stage} in order; a stage that an override or a heir set to null is none."""
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
        """A path; `world:train/text.jsonl` stands below the folder that `roots.world` names."""
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
            raise UserError(where, "a stage is as long as either steps or epochs say", hint=f"stages.{name}.steps=1000")
        for part, folder in stage.init.items() if isinstance(stage.init, dict) else ():
            if not isinstance(folder, str):
                raise UserError(f"{where}.init.{part}", "not a folder", expected="a run folder", got=folder)
        if not stage.data:
            raise UserError(f"{where}.data", "missing", expected="a .jsonl file of conversations")
        return stage


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.rglob("*.yaml"))


def load(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe by its shipped name or by file, with bases merged, overrides applied and defaults written out.

    Args:
        overrides: `key.path=value` lines.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a wrong type.
    """
    path = _find(str(name))
    data = _read(path, ())
    recipe = Recipe(str(name), path.name, data)
    for key in data:
        if key not in TOP_KEYS:
            raise UserError(recipe.where(key), "unknown key", hint=nearest(key, list(TOP_KEYS)))
    if not isinstance(data.get("model"), dict):
        raise UserError(recipe.where("model"), "missing", expected="encoders, connector and llm")
    for key in ("roots", "eval"):  # there to be overridden
        data.setdefault(key, {})
    _normalise(recipe)  # before, so that overrides find every node and default by name; after, to check what they set
    for line in overrides:
        override(recipe.data, line, recipe.file)
    _normalise(recipe)
    _ = recipe.llm, recipe.stages
    return recipe


def _find(name: str) -> Path:
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UserError(name, "no such file", hint="mmllm recipe list")
    raise UserError(name, "no such recipe", hint=nearest(name, names()))


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise UserError(f"{path.name}:base", "a recipe is its own base")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(path, f"not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(path, "not a recipe", expected="a map of model, stages and eval")
    bases = data.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        beside = path.parent / base
        merged = _merge(merged, _read(beside if beside.is_file() else _find(base), (*above, path)))
    return _merge(merged, data)


def _merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Maps are merged, everything else (lists too) is replaced; a key set to null is taken out."""
    merged = copy.deepcopy(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # Another type of part has other arguments: nothing of the old one is kept.
        if both and value.get("type", merged[key].get("type")) == merged[key].get("type"):
            merged[key] = _merge(merged[key], value)
        elif value is None and key in merged:
            del merged[key]
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _normalise(recipe: Recipe) -> None:
    """Write defaults out: node names, inputs, the output, configs of towers and LLM."""
    model = recipe.model
    for key in model:
        if key not in MODEL_KEYS:
            raise UserError(recipe.where(f"model.{key}"), "unknown key", hint=nearest(key, list(MODEL_KEYS)))
    for key in ("encoders", "connector", "llm"):
        if not model.get(key):
            raise UserError(recipe.where(f"model.{key}"), "missing")
    if isinstance(model["llm"], str):
        model["llm"] = {"name": model["llm"]}
    model.setdefault("media", {"frames": 8})
    for key, kind in (("media", dict), ("encoders", dict), ("llm", dict), ("connector", list)):
        if not isinstance(model[key], kind):
            words = {dict: "a map", list: "a list of parts"}
            raise UserError(recipe.where(f"model.{key}"), "wrong type", expected=words[kind], got=model[key])
    for key in ("roots", "stages", "eval"):
        if not isinstance(recipe.data.get(key) or {}, dict):
            raise UserError(recipe.where(key), "wrong type", expected="a map", got=recipe.data[key])
    for name in model.get("text") or {}:
        if name in model["encoders"]:
            raise UserError(recipe.where(f"model.text.{name}"), "an encoder has this name", hint="another name")
    names_so_far: list[str] = []
    for index, node in enumerate(model["connector"]):
        node = {"type": node} if isinstance(node, str) else node
        if not isinstance(node, dict):
            raise UserError(recipe.where("model.connector"), "a node is a map or a name", got=node)
        model["connector"][index] = _node(recipe, node, names_so_far)
    model.setdefault("output", names_so_far[-1])


def _node(recipe: Recipe, node: dict[str, Any], above: list[str]) -> dict[str, Any]:
    where = recipe.where("model.connector")
    encoders = list(recipe.model["encoders"])
    if "type" not in node:
        raise UserError(where, "a node without a type", got=node)
    name = node.get("name", node["type"])
    if not isinstance(name, str) or "." in name:
        raise UserError(f"{where}.{name}", "a name is a word without a dot", hint="name: another")
    if name in above or name in encoders:
        raise UserError(f"{where}.{name}", "two nodes of this name", hint="name: another")
    inputs = node.get("in")
    if inputs is None:
        if not above and len(encoders) > 1:
            raise UserError(f"{where}.{name}.in", "which encoder does it read?", hint="in: " + " or ".join(encoders))
        inputs = above[-1] if above else encoders[0]
    inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    for source in inputs:
        if source not in above and source not in encoders:
            hint = nearest(source, [*above, *encoders])
            raise UserError(f"{where}.{name}.in", f"nothing above is called {source!r}", hint=hint)
    above.append(name)
    return {**node, "name": name, "in": inputs}


def summaries() -> Iterator[tuple[str, str, str]]:
    """(name, summary, paper) of the shipped recipes; reads YAML alone."""
    for name in names():
        data = _read(_find(name), ())
        yield name, data.get("summary", ""), data.get("paper", "")


def resolve_encoders(recipe: Recipe) -> None:
    """Complete encoders and LLM with inline configs where they only have a name (asks the hub or a folder)."""
    from mmllm.contract.registry import find

    for kind, key in (("encoder", "encoders"), ("text", "text")):
        for name, section in (recipe.model.get(key) or {}).items():
            where = recipe.where(f"model.{key}.{name}")
            if not isinstance(section, dict) or "type" not in section:
                raise UserError(where, f"{kind} without a type")
            fixed = {name: section[name] for name in ("type", "turns") if name in section}
            arguments = {name: value for name, value in section.items() if name not in fixed}
            completed = find(kind, section["type"], f"{where}.type").resolve(arguments)
            if isinstance(completed.get("tokenizer"), str):
                completed["tokenizer"] = recipe.path(completed["tokenizer"])
            recipe.model[key][name] = {**fixed, **completed}
    llm = recipe.llm
    if llm.config is None:
        if llm.name is None:
            raise UserError(recipe.where("model.llm"), "neither name nor config")
        from transformers import AutoConfig

        place, options = llm_source(llm, recipe.where("model.llm.name"))
        try:
            config = AutoConfig.from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            raise UserError(recipe.where("model.llm.name"), f"cannot fetch {llm.name}", hint="give config:") from error
        recipe.model["llm"] = {**asdict(llm), "config": config.to_dict()}


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Key paths at which two nested maps differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for name in sorted({*old, *new})
            for found in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [key]
