"""Where computations have to be in float32 whatever the run's precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(values: Tensor) -> AbstractContextManager:
    """Products inside keep the dtype of their operands. The meta device has no autocast."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)
