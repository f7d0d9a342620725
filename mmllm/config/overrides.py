"""Overrides on the command line: `stages.instruct.lr=1e-5 model.connector.pool.grid=8,6,6`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.config.schema import LLM, Stage
from mmllm.config.sections import renamed, without_old_llm
from mmllm.contract.arguments import signature
from mmllm.contract.documents import parse_yaml
from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.grounding import Coordinates
from mmllm.contract.registry import find
from mmllm.data.media.sampling import Sampling

NAME = "model.llm.name="
OLDER = ("rope_theta", "rope_scaling", "torch_dtype")
"""Keys of a library's config that it also accepts under their former names."""
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "encoders": ("encoder", ()),
    "text": ("text", ("turns",)),
    "connector": ("connector", ("only", "prompt")),
}
"""The kind of the parts in a section of `model`, and the keys allowed besides their arguments."""


def override_all(data: dict[str, Any], lines: Sequence[str], file: str) -> None:
    """Set values in a recipe's maps, one `key.path=value` after the other; see `override`.

    A new name of the LLM comes first: it drops what the recipe says about the old LLM, unless it is given again.
    """
    for line in sorted(lines, key=lambda line: not line.startswith(NAME)):
        before = dict(data["model"]["llm"]) if line.startswith(NAME) else {}
        override(data, line, file)
        if before and renamed(before, data["model"]["llm"]):
            data["model"] = without_old_llm(data["model"])


def override(data: dict[str, Any], line: str, file: str) -> None:
    """Set one value in a recipe's maps by its path; nodes in a list are addressed by name.

    Args:
        data: the recipe; changed in place.
        line: `key.path=value`.
        file: the recipe's file, for errors.

    Raises:
        UserError: not of that form, or the path names nothing that exists or that a part accepts.
    """
    key, equals, value = line.partition("=")
    if not equals or not key:
        raise UserError(line, "not an override", expected="key.path=value")
    *parents, last = key.split(".")
    here: Any = data
    walked: list[str] = []
    for name in parents:
        walked.append(name)
        here = _child(here, name, f"{file}:{'.'.join(walked)}")
    _check_key(here, parents, last, f"{file}:{key}")
    if isinstance(here, list):
        raise UserError(f"{file}:{key}", "names a whole part", expected="one of its arguments")
    if not isinstance(here, dict):
        raise UserError(f"{file}:{'.'.join(parents)}", f"has no key {last!r}: it is not a map", got=shown(here))
    here[last] = _typed(here.get(last), value)


def _child(here: object, name: str, where: str) -> Any:
    if isinstance(here, list):
        named = {node.get("name", node.get("type")): node for node in here if isinstance(node, dict)}
    else:
        named = here if isinstance(here, dict) else {}
    if name not in named:
        raise UserError(where, "no such key", hint=nearest(name, list(named)) if named else None)
    return named[name]


def _check_key(here: object, parents: list[str], last: str, where: str) -> None:
    if not isinstance(here, dict) or last in here:
        return
    known = list(here)
    if parents[:1] == ["stages"] and len(parents) == 2:
        known = list(signature(Stage))
    elif parents == ["model", "llm"]:
        known = list(signature(LLM))
    elif parents == ["model", "media"]:
        known = list(signature(Sampling))
    elif parents == ["model", "vocabulary"]:
        known = list(signature(Coordinates))
    elif parents[:1] in (["roots"], ["eval"]):
        return
    elif "config" in parents:
        known = _config_keys(here) or [last]
    elif "type" in here:
        kind, beside = PARTS.get(parents[1], ("objective", ()))
        known = list(dict.fromkeys([*signature(find(kind, here["type"], where)), *beside, *known]))
    if last not in known:
        raise UserError(where, "unknown key", hint=nearest(last, known))


def _config_keys(config: dict[str, Any]) -> list[str]:
    """The keys of a library's config, by its `model_type`; empty for a sub-config without one."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return []
    cls = CONFIG_MAPPING[kind]
    return list(dict.fromkeys([*config, *cls().to_dict(), *cls.attribute_map, *OLDER]))


def _typed(old: object, value: str) -> Any:
    """Text stays text where an annotation will parse it later; a plain number or map is read as YAML reads it.

    A number such as 1e-5 is a text to YAML; a map may take its place.
    """
    if isinstance(old, str) and not (value.startswith("{") and _is_number(old)):
        return value
    try:
        return parse_yaml(value, value)
    except UserError:
        return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
