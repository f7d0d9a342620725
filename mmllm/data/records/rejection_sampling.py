"""Answers as the best policy would give them: rejection sampling by reward, and pairs out of what was accepted.

Source: RSO (Liu et al. 2023), arXiv 2309.06657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from mmllm.contract.errors import UserError


def rejection_sample(
    rewards: Sequence[float], count: int, beta: float, draw: Callable[[], float]
) -> tuple[list[int], int]:
    """Indices of accepted candidates, in the order of acceptance, and how many draws it took.

    Passes over the remaining candidates in order; one of reward r is accepted with probability exp((r - best) / beta),
    where best is the largest reward left when the pass began. It ends the moment `count` are accepted.

    Args:
        rewards: of the candidates.
        count: how many to accept; fewer where there are fewer candidates.
        beta: large = the first ones, small = the best ones.
        draw: a number in 0..1, called once for each candidate that is looked at.

    Raises:
        UserError: beta is not above 0, or a reward is not finite.
    """
    if not beta > 0:
        raise UserError("rso: beta", "must be above 0", got=beta)
    if not all(map(math.isfinite, rewards)):
        raise UserError("rso: rewards", "one of them is not finite")
    left, accepted, draws = list(range(len(rewards))), [], 0
    while left and len(accepted) < count:
        best, passed = max(rewards[index] for index in left), []
        for index in left:
            draws += 1
            if draw() < acceptance(rewards[index], best, beta):
                accepted.append(index)
                passed.append(index)
                if len(accepted) == count:
                    break
        left = [index for index in left if index not in passed]
    return accepted, draws


def acceptance(reward: float, best: float, beta: float) -> float:
    """Probability of accepting a candidate."""
    return math.exp((reward - best) / beta)


def distinct(texts: Sequence[str], rewards: Sequence[float]) -> dict[str, float]:
    """{text: reward}: equal texts are one candidate, at the place of the first with the reward of the last."""
    return dict(zip(texts, rewards, strict=True))


def first_round(accepted: Sequence[str], rewards: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(chosen, rejected) of neighbours: the first with the second, the third with the fourth; equals are left out."""
    for one, other in zip(accepted[::2], accepted[1::2], strict=False):
        if rewards[one] != rewards[other]:
            yield (one, other) if rewards[one] > rewards[other] else (other, one)


def tournament(accepted: Sequence[str], rewards: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(chosen, rejected) of every round: winners meet winners until one is left."""
    field = list(accepted)
    while len(field) > 1:
        yield from first_round(field, rewards)
        pairs = zip(field[::2], field[1::2], strict=False)
        winners = [max(pair, key=rewards.__getitem__) for pair in pairs]
        field = winners + field[len(field) // 2 * 2 :]


RANKINGS = {"first_round": first_round, "tournament": tournament}
