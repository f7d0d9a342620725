"""LLaVA-ST's records: placeholders for coordinates in the texts, and their values in lists beside them."""

from __future__ import annotations

import re
from typing import Any

from mmllm.contract.errors import UserError
from mmllm.contract.grounding import AXIS_OF, Axis
from mmllm.data.records.entries import content_entries
from mmllm.data.records.json_files import short

LISTS: dict[Axis, str] = {"time": "temporal", "height": "spatial_height", "width": "spatial_width"}
"""How the lists of an axis begin: `temporal_input_locations`."""
SLOT = re.compile(rf"<({'|'.join(AXIS_OF)})-(INPUT|OUTPUT)>")


def names_places(variables: object) -> bool:
    """Whether a record's `variables` are such lists."""
    starts = tuple(LISTS.values())
    return isinstance(variables, dict) and any(str(key).startswith(starts) for key in variables)


def with_places(messages: list[dict[str, Any]], variables: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages in which every `<TEMP-INPUT>` and its kin is a content entry with the value that belongs there.

    Args:
        variables: six lists of numbers, in the order in which their placeholders appear; absent ones are empty.
        where: of the record, for errors.

    Raises:
        UserError: lists and placeholders that do not match.
    """
    waiting = {
        (name, side): list(_values(variables, f"{LISTS[axis]}_{side.lower()}_locations", where))
        for name, axis in AXIS_OF.items()
        for side in ("INPUT", "OUTPUT")
    }
    found = []
    for message in messages:
        entries = [piece for entry in content_entries(message) for piece in _pieces(entry, waiting, where)]
        found.append({**message, "content": entries})
    for (name, side), rest in waiting.items():
        if rest:
            raise UserError(f"{where}:variables", f"{len(rest)} values are left over for <{name}-{side}>")
    return found


def _values(variables: dict[str, Any], key: str, where: str) -> list[float]:
    values = variables.get(key) or []
    if not isinstance(values, list) or any(
        isinstance(value, bool) or not isinstance(value, int | float) for value in values
    ):
        raise UserError(f"{where}:variables.{key}", "wrong type", expected="a list of numbers", got=short(values))
    return values


def _pieces(entry: dict[str, Any], waiting: dict[tuple[str, str], list[float]], where: str) -> list[dict[str, Any]]:
    if entry["type"] != "text":
        return [entry]
    found: list[dict[str, Any]] = []
    text, last = entry["text"], 0
    for slot in SLOT.finditer(text):
        values = waiting[slot[1], slot[2]]
        if not values:
            raise UserError(f"{where}:variables", f"no value is left for {slot[0]}")
        found.append({"type": "text", "text": text[last : slot.start()]})
        found.append({"type": "location", "axis": AXIS_OF[slot[1]], "at": values.pop(0)})
        last = slot.end()
    found.append({"type": "text", "text": text[last:]})
    return [piece for piece in found if piece.get("text") != ""]
