"""Flags that several verbs share."""

from __future__ import annotations

from argparse import Namespace

import pytest

from mmllm.cli.common import kept_kinds, pairs
from mmllm.contract.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"), [("300MB", 300_000_000), ("50gb", 50_000_000_000), ("1.5TB", 1_500_000_000_000)]
)
def test_a_cache_has_the_size_that_is_said(text, size):
    assert kept_kinds(Namespace(cache="frames,features", cache_size=text)) == (("frames", "features"), size)


@pytest.mark.parametrize(("cache", "text"), [("frame", "1GB"), ("frames", "50"), ("frames", "0GB"), ("frames", "-1GB")])
def test_no_cache_and_no_size_are_refused(cache, text):
    with pytest.raises(UserError, match="--cache"):
        kept_kinds(Namespace(cache=cache, cache_size=text))


def test_pairs_are_cut_at_the_first_equals_sign():
    assert pairs(["mvbench=a=b", "mlvu=c"], "--root") == {"mvbench": "a=b", "mlvu": "c"}
    with pytest.raises(UserError, match="--root mvbench: not of the form NAME=VALUE"):
        pairs(["mvbench"], "--root")
