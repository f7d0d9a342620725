"""Values are read by the annotation of what they are for."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack

import pytest

from mmllm.contract.arguments import Count, bind, parse, signature
from mmllm.contract.errors import UserError


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        ("1e-5", float, 1e-5),
        (1, float, 1.0),
        ("8,6,6", tuple[int, int, int], (8, 6, 6)),
        ([8, 6, 6], tuple[int, int, int], (8, 6, 6)),
        ("-2", int | tuple[int, ...], -2),
        ("-1,-3", int | tuple[int, ...], (-1, -3)),
        ("llm", int | str, "llm"),
        ("96", int | str, 96),
        ("null", int | None, None),
        ("true", bool, True),
        ("false", bool, False),
        ("No", bool, False),
        (True, bool, True),
        ("row", Literal["one", "row"], "row"),
        ("null", str | None, None),
    ],
)
def test_read(value, annotation, result):
    assert parse(value, annotation, "key") == result


@pytest.mark.parametrize(
    ("value", "annotation"),
    [("a", int), (1.5, int), (True, int), ("1,2", tuple[int, int, int]), ("cube", Literal["one", "row"]), (3, str)],
)
def test_refused(value, annotation):
    with pytest.raises(UserError, match="key: wrong type, expected"):
        parse(value, annotation, "key")


def takes(*, width: int, depth: int = 2) -> None:
    """Something with arguments."""


def test_unknown_and_missing_keys():
    with pytest.raises(UserError, match=r"part\.widht: unknown key.*Try: width"):
        bind(takes, {"widht": 3}, "part")
    with pytest.raises(UserError, match=r"part\.width: missing"):
        bind(takes, {"depth": 3}, "part")


class Shared(TypedDict, total=False):
    """Arguments of several parts."""

    size: Count | None


def test_shared_arguments_are_read_as_those_of_the_constructor():
    def build(*, depth: int = 1, **shared: Unpack[Shared]) -> None:
        """Takes them."""

    assert signature(build) == {"depth": (int, 1), "size": (Count | None, None)}
    assert bind(build, {"size": "3"}, "x") == {"size": 3}
    with pytest.raises(UserError, match=r"x\.sise: unknown key. Try: size"):
        bind(build, {"sise": 3}, "x")
