"""AIM's accounting against the authors' analyzer and their paper's table."""

from __future__ import annotations

import pytest

from mmllm.checks.flops import Sizes, billed
from mmllm.contract.reducer import Schedule
from mmllm.reducers.aim import falling

MODELS = {
    "qwen2-7b": Sizes(3584, 18944, 28, 4, 28, 152064, residuals=1),
    "vicuna-7b": Sizes(4096, 11008, 32, 32, 32, 32000, residuals=2),
}


@pytest.mark.golden("aim_flops")
def test_every_row(golden):
    golden.unread.discard("model")
    names = golden.arrays["model"].tolist()
    visual, text, l1, l2 = (golden[name].tolist() for name in ("visual_tokens", "text_tokens", "l1", "l2"))
    tokens = golden["tokens_per_layer"]
    theirs, claimed = golden.exact("tflops_analyzer"), golden.exact("tflops_claimed")
    for row, name in enumerate(names):
        sizes = MODELS[name]
        rates = (1.0,) * sizes.layers if l1[row] < 0 else falling(sizes.layers, l1[row], l2[row] - l1[row])
        read = billed(Schedule(1.0, rates), visual[row], text[row])
        assert read == tokens[row, : sizes.layers].int().tolist()
        flops = sizes.flops(read) / 1e12
        assert flops == pytest.approx(theirs[row].item(), rel=1e-12)
        if (theirs[row] - claimed[row]).abs() < 0.011:  # four rows of the paper follow no schedule that it names
            assert flops == pytest.approx(claimed[row].item(), abs=0.011)
        milliseconds = 1e3 * sizes.roofline(read)
        assert milliseconds == pytest.approx(golden.exact("prefill_ms_roofline")[row].item(), rel=1e-9)
