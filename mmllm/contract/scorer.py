"""The base of the scorers: how good an answer to a conversation is."""

from __future__ import annotations

from typing import Any, ClassVar


class Scorer:
    """Gives an answer a reward, the higher the better. Arguments are keywords with types, as of any part."""

    kind: ClassVar[str] = "scorer"
    registered_name: ClassVar[str] = ""

    def score(self, sample: Any, answer: str) -> float:
        """The reward of an answer to a conversation (a `Sample`) that ends with the user's turn."""
        raise NotImplementedError
