"""Values of a recipe or a command line, parsed by the annotation of the argument they are for.

YAML reads `1e-5` as text and a command line has only text, so the annotation decides, never the look of the value.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union

from mmllm.contract.errors import UserError, nearest, shown


@dataclass(frozen=True)
class Within:
    """Bounds of a number, as part of its annotation: `Annotated[int, Within(least=1)]`.

    Attributes:
        least: the smallest allowed value.
        most: the largest allowed value.
        above: an exclusive lower bound.
        below: an exclusive upper bound.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        words = {">=": self.least, ">": self.above, "<=": self.most, "<": self.below}
        return " and ".join(f"{sign} {bound:.12g}" for sign, bound in words.items() if math.isfinite(bound))


Count = Annotated[int, Within(least=1)]
Number = Annotated[int, Within(least=0)]
Positive = Annotated[float, Within(above=0)]
NotNegative = Annotated[float, Within(least=0)]
Share = Annotated[float, Within(least=0, below=1)]
Seed = Annotated[int, Within(least=0, most=2**32 - 1)]


class OutOfRange(ValueError):
    """A number of the right type that does not fit."""


LARGEST = 2**63 - 1
"""Upper limit of any integer, whatever its own bounds: larger ones would overflow what computes with them."""


@lru_cache(maxsize=1024)
def signature(target: Callable) -> dict[str, tuple[Any, Any]]:
    """{argument: (annotation, default)} of a function's or a constructor's keyword arguments.

    `inspect.Parameter.empty` marks a missing default. Positional `self` and `site` are left out. Arguments that
    several parts share may be declared in a TypedDict, `**shared: Unpack[Shared]`; those not given are None.
    """
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and typing.get_origin(hints.get(name)) is typing.Unpack:
            (shared,) = typing.get_args(hints[name])
            arguments |= {key: (kind, None) for key, kind in typing.get_type_hints(shared, include_extras=True).items()}
        if name in ("self", "site") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        arguments[name] = (hints.get(name, Any), parameter.default)
    return arguments


def bind(target: Callable, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `target` taken from `values`, each parsed by its annotation.

    Args:
        where: prefix of the keys, for errors: a key path, or a file and a colon.

    Raises:
        UserError: an unknown key (with the nearest known one), a missing one, or a value of the wrong type.
    """
    known = signature(target)
    if not isinstance(values, dict):
        raise UserError(where, "wrong type", expected="a map", got=shown(values))
    where = where if where.endswith(":") else f"{where}."
    for name in values:
        if name not in known:
            raise UserError(f"{where}{name}", "unknown key", hint=nearest(name, list(known)))
    for name, (annotation, default) in known.items():
        if name not in values and default is inspect.Parameter.empty:
            raise UserError(f"{where}{name}", "missing", expected=describe(annotation))
    return {name: parse(value, known[name][0], f"{where}{name}") for name, value in values.items()}


def parse(value: object, annotation: Any, where: str) -> Any:
    """`value` converted to `annotation`.

    Raises:
        UserError: it cannot be converted.
    """
    try:
        return _parse(value, annotation)
    except (TypeError, ValueError, OverflowError) as error:
        what = "out of range" if isinstance(error, OutOfRange | OverflowError) else "wrong type"
        raise UserError(where, what, expected=describe(annotation), got=shown(value)) from None


def describe(annotation: Any) -> str:
    """An annotation in words that tell a user what to write."""
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is Annotated:
        return " ".join([describe(arguments[0]), *map(str, arguments[1:])])
    if origin in (list, tuple):
        inner = [describe(option) for option in arguments if option is not Ellipsis]
        fixed = origin is tuple and Ellipsis not in arguments
        return f"a list of {len(inner)} ({', '.join(inner)})" if fixed else f"a list of {inner[0]}"
    return getattr(annotation, "__name__", str(annotation))


def _parse(value: object, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(value, arguments)
    if origin is Literal:
        return _parse_literal(value, arguments)
    if origin is Annotated:
        return _parse_within(value, *arguments)
    if origin in (tuple, list):
        return _parse_list(value, origin, arguments)
    if annotation is dict or origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return value
    return _parse_scalar(value, annotation)


def _parse_union(value: object, options: tuple) -> Any:
    for option in options:
        if type(value) is option and option is not str:
            return value
    ordered = sorted(options, key=lambda option: option is str)  # text last: everything on a command line is text
    failures: list[Exception] = []
    for option in ordered:
        try:
            return _parse(value, option)
        except (TypeError, ValueError, OverflowError) as error:
            failures.append(error)
    raise next((error for error in failures if isinstance(error, OutOfRange | OverflowError)), ValueError())


def _parse_within(value: object, annotation: Any, *bounds: Within) -> Any:
    number = _parse(value, annotation)
    if not all(number in bound for bound in bounds):
        raise OutOfRange
    return number


def _parse_literal(value: object, options: tuple) -> Any:
    for option in options:
        if value == option or (isinstance(value, str) and value == str(option)):
            return option
    raise ValueError


def _parse_list(value: object, origin: type, arguments: tuple) -> Any:
    if isinstance(value, str):
        value = [item for item in value.strip("[]() ").split(",") if item.strip()]
    if not isinstance(value, list | tuple):
        raise TypeError
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise ValueError
        return tuple(_parse(item, kind) for item, kind in zip(value, arguments, strict=True))
    inner = arguments[0] if arguments else Any
    return origin(_parse(item, inner) for item in value)


def _parse_scalar(value: object, annotation: type) -> Any:
    if annotation is type(None):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none")):
            return None
        raise ValueError
    if annotation is bool:
        words = {"true": True, "false": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in words:
            return words[value.strip().lower()]
        raise ValueError
    if annotation is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = int(value)
        if abs(number) > LARGEST:
            raise OutOfRange
        return number
    if annotation is float:
        if isinstance(value, bool):
            raise ValueError
        if not math.isfinite(float(value)):
            raise OutOfRange
        return float(value)
    if annotation is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if isinstance(value, annotation):
        return value
    raise TypeError
