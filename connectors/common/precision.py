"""Where numbers have to be float32 whatever the run is computed in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(values: Tensor) -> AbstractContextManager:
    """Products inside keep the format of what they multiply. The meta device knows no autocast."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)
