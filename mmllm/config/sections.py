"""The sections of a recipe as written: which keys are allowed where, and the defaults that are filled in."""

from __future__ import annotations

import re
from typing import Any

from mmllm.contract.errors import UserError, nearest, shown

MODEL_KEYS = ("media", "encoders", "text", "connector", "output", "place", "vocabulary", "llm")
TOP_KEYS = ("summary", "paper", "roots", "model", "stages", "eval")
NAME = re.compile(r"[A-Za-z0-9_-]+")
INHERITED = ("config", "template", "tokenizer", "gguf")
"""Keys that belong to the LLM that a recipe names: a new name drops them."""


def check_name(name: object, where: str) -> str:
    """Check the name of a stage, a part, an arm or a task: it becomes part of paths and keys.

    Raises:
        UserError: anything but letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(where, "not a name", expected="letters, digits, _ and -", got=shown(name))
    return name


def merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A recipe merged over its base: maps are merged, all else (lists too) is replaced, keys set to null are removed.

    A different LLM drops the keys of the base's LLM, just as a different type of part drops the old one's arguments.
    """
    old = _llm(base)
    if old and renamed(old, _llm(new)):
        base = {**base, "model": without_old_llm(base["model"])}
    return _merge(base, new)


def without_old_llm(model: dict[str, Any]) -> dict[str, Any]:
    """A model's section without what belongs to the LLM that it names: some keys, and the ids of its vocabulary."""
    found = {**model, "llm": without_inherited(model["llm"])}
    if isinstance(model.get("vocabulary"), dict):
        found["vocabulary"] = {key: value for key, value in model["vocabulary"].items() if key != "first"}
    return found


def _llm(recipe: dict[str, Any]) -> dict[str, Any]:
    """The section of the LLM if it is a map, otherwise an empty one."""
    model = recipe.get("model")
    llm = model.get("llm") if isinstance(model, dict) else None
    return llm if isinstance(llm, dict) else {}


def without_inherited(llm: dict[str, Any]) -> dict[str, Any]:
    """An LLM's section without the keys that belong to the named LLM."""
    return {key: value for key, value in llm.items() if key not in INHERITED}


def renamed(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether one LLM section names a different LLM than the other; no name does not count as different."""
    return new.get("name") not in (None, "null", "none", old.get("name"))


def _merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in new.items():
        old = merged.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        if both and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = _merge(old, value)
        elif value is None and key in merged:
            del merged[key]
        else:
            merged[key] = value
    return merged


def normalise(data: dict[str, Any], file: str) -> None:
    """Check the sections and fill in defaults: node names, inputs, the output. Changes `data`.

    Raises:
        UserError: an unknown key, a value of a wrong type, a node that reads nothing.
    """
    for key in data:
        if key not in TOP_KEYS:
            raise UserError(f"{file}:{key}", "unknown key", hint=nearest(key, list(TOP_KEYS)))
    if data.get("model") is None:
        raise UserError(f"{file}:model", "missing", expected="encoders, connector and llm")
    _typed(data, {"model": dict, "roots": dict, "eval": dict, "stages": dict, "summary": str, "paper": str}, f"{file}:")
    for section in ("roots", "eval"):
        _typed(data.get(section) or {}, dict.fromkeys(data.get(section) or {}, str), f"{file}:{section}.")
    for name in data.get("stages") or {}:
        check_name(name, f"{file}:stages.{shown(name)}")
    _typed(data.get("stages") or {}, dict.fromkeys(data.get("stages") or {}, dict), f"{file}:stages.")
    _normalise_model(data["model"], f"{file}:model")


def _normalise_model(model: dict[str, Any], where: str) -> None:
    for key in model:
        if key not in MODEL_KEYS:
            raise UserError(f"{where}.{key}", "unknown key", hint=nearest(key, list(MODEL_KEYS)))
    for key in ("encoders", "connector", "llm"):
        if not model.get(key):
            raise UserError(f"{where}.{key}", "missing")
    if isinstance(model["llm"], str):
        model["llm"] = {"name": model["llm"]}
    if model.get("media") is None:
        model["media"] = {"frames": 8}
    kinds = {"media": dict, "encoders": dict, "text": dict, "llm": dict, "connector": list, "place": dict}
    kinds |= {"vocabulary": dict}
    _typed(model, kinds, f"{where}.")
    _typed(model["media"], {"tiles": dict}, f"{where}.media.")
    for kind in ("encoders", "text"):
        for name, section in (model.get(kind) or {}).items():
            _typed_part(section, check_name(name, f"{where}.{kind}.{shown(name)}"), f"{where}.{kind}.{name}")
    for name in model.get("text") or {}:
        if name in model["encoders"]:
            raise UserError(f"{where}.text.{name}", "an encoder has this name", hint="another name")
    above: list[str] = []
    nodes = [_node(node, list(model["encoders"]), above, f"{where}.connector") for node in model["connector"]]
    model["connector"] = nodes
    if model.get("output") is None:
        model["output"] = above[-1]


def _typed(section: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    """Refuse values of a wrong type; null counts as absent."""
    words = {dict: "a map", list: "a list of parts", str: "a text"}
    for key, kind in kinds.items():
        value = section.get(key)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{where}{key}", "wrong type", expected=words[kind], got=shown(value))


def _typed_part(section: object, name: str, where: str) -> None:
    if not isinstance(section, dict) or "type" not in section:
        raise UserError(where, "has no type", expected=f"{name}: {{type: ..., arguments}}", got=shown(section))
    _typed(section, {"type": str}, f"{where}.")


def _node(node: object, encoders: list[str], above: list[str], where: str) -> dict[str, Any]:
    """A node of the connector list with its name and its inputs; its name is added to those `above`."""
    node = {"type": node} if isinstance(node, str) else node
    if not isinstance(node, dict):
        raise UserError(where, "a node is a map or a name", got=shown(node))
    if "type" not in node:
        raise UserError(where, "a node without a type", got=shown(node))
    _typed(node, {"type": str, "prompt": str}, f"{where}.")
    name = check_name(node.get("name", node["type"]), f"{where}.{shown(node.get('name', node['type']))}")
    if name in above or name in encoders:
        raise UserError(f"{where}.{name}", "two nodes have this name", hint="name: another")
    inputs = node.get("in")
    if inputs is None:
        if not above and len(encoders) > 1:
            raise UserError(f"{where}.{name}.in", "which encoder does it read?", hint="in: " + " or ".join(encoders))
        inputs = above[-1] if above else encoders[0]
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list) or not inputs or not all(isinstance(source, str) for source in inputs):
        raise UserError(f"{where}.{name}.in", "wrong type", expected="a name or a list of names", got=shown(inputs))
    for source in inputs:
        if source not in above and source not in encoders:
            hint = nearest(source, [*above, *encoders])
            raise UserError(f"{where}.{name}.in", f"no encoder or node above is called {source!r}", hint=hint)
    above.append(name)
    return {**node, "name": name, "in": inputs}
