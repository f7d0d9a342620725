"""VisionZip's rule: the patches that the tower's own CLS token attends to (Yang et al. 2025, 2412.04467)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmllm.contract.errors import UserError
from mmllm.contract.registry import register
from mmllm.contract.types import VisualTokens
from mmllm.reducers.door import Door


@register("reducer", "visionzip")
class VisionZip(Door):
    """The tokens with most of the CLS token's attention, in the tower's block that gives the tokens.

    Only the dominant tokens of the paper; it merges the others into a few more.
    """

    cls_attention: ClassVar[bool] = True

    def choose(self, tokens: VisualTokens, count: int) -> Tensor:
        """Ties to the earlier token.

        Raises:
            UserError: the tower has no CLS token, or a part on the way made new tokens.
        """
        attention = tokens.extras.get("cls_attention")
        if attention is None:
            what = "the tower's CLS attention is not there: it has no CLS token, or a part made new tokens"
            raise UserError("reduce visionzip", what, hint="another reducer")
        return attention[0].argsort(descending=True, stable=True)[:count]
