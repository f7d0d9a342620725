"""NLoRA's start, output and gradients against the authors' code; the default keeps the layer as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmllm.model import nystrom
from mmllm.model.nystrom import NystromLinear


def layer(golden) -> nn.Linear:
    base = nn.Linear(*reversed(golden["weight"].shape))
    base.load_state_dict({"weight": golden["weight"], "bias": golden["bias"]})
    return base


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.golden("second_ring_nlora_init")
@pytest.mark.parametrize("preserve", [False, True])
def test_nlora(golden, preserve, monkeypatch):
    monkeypatch.setattr(nystrom, "LARGEST_CHANGE", 1.0)
    base, rank, x = layer(golden), golden.number("r"), golden["x"]
    close(base(x), golden["y_base"])
    adapted = NystromLinear(base, rank, golden.number("alpha"), preserve=preserve)
    for name in ("A", "N", "B"):
        close(getattr(adapted, f"lora_{name}"), golden[f"lora_{name}"])
    close(adapted.delta(), golden["delta_weight"])
    y = adapted(x)
    change = (golden["y_nlora"] - golden["y_base"]).norm() / golden["y_base"].norm()
    close(change, golden["y_rel_change"])
    if preserve:
        close(y, golden["y_base"])
    else:
        close(y, golden["y_nlora"])
        y.square().mean().backward()
        for name in ("A", "N", "B"):
            close(getattr(adapted, f"lora_{name}").grad, golden[f"grad_{name}"])
    first, last = adapted.as_lora()
    close(adapted.scale * last @ first, golden["delta_weight"])
    close(adapted.merged()(x), y)


@pytest.mark.golden("second_ring_nlora_init")
def test_nlora_with_the_formulas_inverse_misses_the_weight(golden):
    """Why neither the authors' code nor ours inverts N."""
    weight = golden["weight"]
    inverse = torch.linalg.pinv(golden["lora_N"].double())
    product = golden["lora_B"].double() @ inverse @ golden["lora_A"].double()
    torch.testing.assert_close(product.float(), golden["nystrom_pinv_product"], rtol=1e-4, atol=1e-4)
    error = (product - weight).norm() / weight.norm()
    torch.testing.assert_close(error.float(), golden["nystrom_pinv_rel_err"], rtol=1e-4, atol=1e-4)
    assert error > 1
