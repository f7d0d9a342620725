"""Errors say the same wherever they are raised."""

from __future__ import annotations

import pickle

from mmllm.contract.errors import UserError, nearest


def test_an_error_of_a_worker_arrives_as_itself():
    error = UserError("a.yaml:model", "wrong type", expected="a map", got=[1], hint="{type: mlp}")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.yaml:model: wrong type, expected a map, got [1]. Try: {type: mlp}"
    fields = ("where", "what", "expected", "got", "hint")
    assert [getattr(again, name) for name in fields] == [getattr(error, name) for name in fields]


def test_the_nearest_names_or_all_of_them():
    assert nearest("liner", ["mlp", "linear", "pool"]) == "linear"
    assert nearest("xyz", ["pool", "mlp"]) == "one of mlp, pool"
