"""JSON as people and programs write it: input is checked once, and an error is one line with its location."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError

DEEPEST = 100
"""Levels of lists and objects; anything deeper is not data, and exceeds Python's recursion limit."""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
NAMES: dict[type, str] = {str: "a text", dict: "an object", list: "a list", int: "a whole number", float: "a number"}
_decoder = json.JSONDecoder()


def parse_json(data: bytes | str, where: str, *, expected: str | None = None, followed: bool = False) -> Any:
    """Parse one JSON value; a UTF-8 byte order mark (BOM) at its beginning is skipped.

    Args:
        where: its location, such as `file:line`.
        expected: what should be there, for the error.
        followed: whether something else may follow it.

    Raises:
        UserError: not UTF-8, not JSON, nested too deeply, a number of thousands of digits, or a text that is not valid
            Unicode.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError as error:
        raise UserError(where, f"not UTF-8 ({error.reason})", hint="save the file as UTF-8") from error
    text = text.removeprefix("\ufeff")
    try:
        value = _decoder.raw_decode(text.lstrip())[0] if followed else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_json(error, where, expected) from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise UserError(where, "nested too deeply", expected=f"at most {DEEPEST} levels")
    # half a surrogate pair passes as JSON, but no tokenizer or file accepts it
    if SURROGATE.search(text) and not _is_unicode(value):
        raise UserError(where, "a text is not valid Unicode, it contains half a surrogate pair", hint="export it again")
    return value


def not_json(error: Exception, where: str, expected: str | None = None) -> UserError:
    """The error for a text that Python's JSON rejects."""
    if isinstance(error, RecursionError):
        return UserError(where, "nested too deeply", expected=f"at most {DEEPEST} levels")
    reason = error if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
    return UserError(where, f"not JSON ({reason})", expected=expected)


def read_json(path: str | Path) -> Any:
    """Parse a file that is one JSON value.

    Raises:
        UserError: missing, not a regular file, or see :func:`parse_json`.
    """
    path = _regular(path)
    return parse_json(path.read_bytes(), str(path))


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of a file with one JSON value per line; blank lines are skipped.

    Raises:
        UserError: missing, not a regular file, or see :func:`parse_json`.
    """
    with _regular(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def take(record: dict[str, Any], key: str, kind: type, where: str, default: Any = ...) -> Any:
    """The value of a key, checked for its type: an integer is a `float` too, but true and false are not numbers.

    Args:
        kind: str, dict, list, int or float.
        where: location of the record.
        default: the value of a missing key (or null); without it, the key is required.

    Raises:
        UserError: `where:key` (`where.key` after an index), missing or of another type; a non-finite number.
    """
    value = record.get(key)
    if value is None and default is not ...:
        return default
    if isinstance(value, bool) or not (_is_finite(value) if kind is float else isinstance(value, kind)):
        location = f"{where}{'.' if where.endswith(']') else ':'}{key}"
        what = "missing" if value is None else "of the wrong type"
        raise UserError(location, what, expected=NAMES[kind], got=None if value is None else short(repr(value)))
    return value


def short(value: object) -> str:
    """The beginning of a value, for errors."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _regular(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UserError(path, what, expected="a file of JSON")
    return path


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inside = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in inside if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
