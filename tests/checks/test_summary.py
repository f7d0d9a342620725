"""The figures of a walk, by hand."""

from __future__ import annotations

import torch
from torch import nn

from mmllm.checks.summary import count_macs, short


def test_multiply_adds_of_a_matrix_are_its_elements_a_row():
    with torch.device("meta"):
        assert count_macs(nn.Linear(5, 7), torch.zeros(3, 5)) == 3 * 5 * 7
        assert count_macs(nn.Conv2d(2, 4, 3, padding=1), torch.zeros(1, 2, 6, 8)) == 6 * 8 * 2 * 4 * 9


def test_numbers_for_people():
    assert [short(number) for number in (999, 1000, 1_234_567, 2.5e9)] == ["999", "1.00 k", "1.23 M", "2.50 G"]
