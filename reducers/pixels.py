"""Fewer input pixels: smaller frames make fewer tokens, and the tower gets cheaper too."""

from __future__ import annotations

import math

from mmllm.contract.reducer import Entered
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens
from mmllm.reducers.door import Door, Share, chosen


@register("reducer", "pixels")
class Pixels(Door):
    """Frames are read at a smaller size, with as many tokens along each side as the budget allows.

    The tokens take places spread evenly over those of the whole frames.
    """

    def __init__(self, *, keep: Share) -> None:
        super().__init__(keep=keep)
        self.shrink = math.sqrt(keep) if keep < 1 else None

    def enter(self, tokens: VisualTokens) -> Entered | None:
        """Those that there are."""
        if self.shrink is None:
            return None
        return chosen(tokens.values[0], tokens.extras["present"][0].nonzero()[:, 0])
