"""Losses over pairs of answers, from the log-probabilities of chosen and rejected alone.

Sources: DPO (Rafailov et al. 2023, arXiv 2305.18290), IPO (Azar et al. 2023, 2310.12036), SLiC-HF (Zhao et al. 2023,
2305.10425), RSO (Liu et al. 2023, 2309.06657), SimPO (Meng et al. 2024, 2405.14734), ORPO (Hong et al. 2024,
2403.07691), robust DPO (Chowdhury et al. 2024, 2403.00409), KTO (Ethayarajh et al. 2024, 2402.01306).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of n pairs, summed over the tokens of each answer.

    Attributes:
        chosen: [n], of the policy.
        rejected: [n], of the policy.
        reference_chosen: [n]; zeros without a reference.
        reference_rejected: [n]; zeros without a reference.
        chosen_length: [n], tokens of the chosen answer.
        rejected_length: [n], tokens of the rejected one.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def margin(self) -> Tensor:
        """[n]: by how much more than the reference the policy prefers the chosen answer."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)

    @property
    def mean_margin(self) -> Tensor:
        """The margin with each answer's mean over its tokens in place of its sum."""
        chosen, rejected = self.chosen - self.reference_chosen, self.rejected - self.reference_rejected
        return chosen / self.chosen_length.clamp_min(1) - rejected / self.rejected_length.clamp_min(1)


@dataclass(frozen=True)
class Settings:
    """What the losses are set by.

    Attributes:
        beta: how sharply a margin counts.
        label_smoothing: share of pairs whose labels are taken to be swapped.
        gamma: SimPO's target margin, as a share of beta.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5


def sigmoid(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO; with smoothing, its conservative form. RSO's "sigmoid-norm" with its gamma as beta."""
    margin, swapped = settings.beta * pairs.margin, settings.label_smoothing
    return -(1 - swapped) * logsigmoid(margin) - swapped * logsigmoid(-margin)


def robust(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO for noisy labels: unbiased if `label_smoothing` is the share of swapped pairs."""
    margin, swapped = settings.beta * pairs.margin, settings.label_smoothing
    return (-(1 - swapped) * logsigmoid(margin) + swapped * logsigmoid(-margin)) / (1 - 2 * swapped)


def sigmoid_norm(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO on mean log-probabilities per token."""
    return -logsigmoid(settings.beta * pairs.mean_margin)


def hinge(pairs: Pairs, settings: Settings) -> Tensor:
    """Hinge on the margin: RSO's "hinge-norm"; SLiC's where there is no reference."""
    return relu(1 - settings.beta * pairs.margin)


def ipo(pairs: Pairs, settings: Settings) -> Tensor:
    """IPO on means over tokens, as TRL has it."""
    return (pairs.mean_margin - 1 / (2 * settings.beta)) ** 2


def ipo_sum(pairs: Pairs, settings: Settings) -> Tensor:
    """IPO on sums over tokens, as published."""
    return (pairs.margin - 1 / (2 * settings.beta)) ** 2


def simpo(pairs: Pairs, settings: Settings) -> Tensor:
    """SimPO: mean log-probabilities, a target margin, no reference."""
    means = pairs.chosen / pairs.chosen_length.clamp_min(1) - pairs.rejected / pairs.rejected_length.clamp_min(1)
    return -logsigmoid(settings.beta * (means - settings.gamma))


def orpo(pairs: Pairs, settings: Settings) -> Tensor:
    """ORPO's log odds ratio of mean log-probabilities, times beta; it goes with the chosen answers' cross-entropy."""
    means = pairs.chosen / pairs.chosen_length.clamp_min(1), pairs.rejected / pairs.rejected_length.clamp_min(1)
    chosen, rejected = (mean - torch.log1p(-torch.exp(mean.clamp_max(-1e-7))) for mean in means)
    return -settings.beta * logsigmoid(chosen - rejected)


def kto_pair(pairs: Pairs, settings: Settings) -> Tensor:
    """KTO over pairs, [2 n] (chosen, then rejected): each against the batch's mean of the other kind.

    Of the whole batch at once: no objective uses it, since micro-batches would change it.
    """
    chosen, rejected = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    above_rejected = 1 - torch.sigmoid(settings.beta * (chosen - rejected.mean().clamp_min(0)))
    below_chosen = 1 - torch.sigmoid(settings.beta * (chosen.mean().clamp_min(0) - rejected))
    return torch.cat([above_rejected, below_chosen])


PreferenceLoss = Callable[[Pairs, Settings], Tensor]
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "simpo": simpo,
    "orpo": orpo,
}
"""Losses of one pair at a time."""
FREE = ("simpo", "orpo")
"""Losses that know no reference."""
