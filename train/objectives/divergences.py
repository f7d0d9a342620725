"""How far a student's distribution over the vocabulary is from a teacher's, row by row.

Source: LLaVA-KD (Cai et al. 2024), arXiv 2410.16236, and its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], Tensor]
"""(student's logits [N, V], teacher's logits [N, V], skew) -> [N], each 0 or more."""


def forward(student: Tensor, teacher: Tensor, skew: float = 0.0) -> Tensor:
    """KL(teacher || student): covers all that the teacher holds possible."""
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse(student: Tensor, teacher: Tensor, skew: float = 0.0) -> Tensor:
    """KL(student || teacher): keeps to what the teacher holds likely."""
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def skew_forward(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """KL(teacher || skew * teacher + (1 - skew) * student)."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(p, _mixed(p, q, skew))


def skew_reverse(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """KL(student || skew * student + (1 - skew) * teacher)."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(q, _mixed(q, p, skew))


def jensen_shannon(student: Tensor, teacher: Tensor, skew: float = 0.9) -> Tensor:
    """skew * KL(student || m) + (1 - skew) * KL(teacher || m) with m = (1 - skew) * teacher + skew * student."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    middle = _mixed(q, p, skew)
    return skew * _kl(q, middle) + (1 - skew) * _kl(p, middle)


def total_variation(student: Tensor, teacher: Tensor, skew: float = 0.0) -> Tensor:
    """Half the sum of the absolute differences."""
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward,
    "reverse": reverse,
    "skew_forward": skew_forward,
    "skew_reverse": skew_reverse,
    "js": jensen_shannon,
    "tv": total_variation,
}
SKEWS = {"skew_forward": 0.1, "skew_reverse": 0.1, "js": 0.9}
"""The authors' skews."""


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; where p is 0, its term is 0."""
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def _mixed(own: Tensor, other: Tensor, share: float) -> Tensor:
    """log(share * own + (1 - share) * other) of log-probabilities."""
    shares = own.new_tensor([share, 1 - share]).log()
    return torch.logaddexp(own + shares[0], other + shares[1])


def gram_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], grams: tuple[Tensor, Tensor], center: bool = False
) -> Tensor:
    """1 - cosine of the self-correlations Z Z' of two sets of logits, from hidden states and the heads' Gram matrices.

    Z = H W', so that Z Z' = H (W'W) H': exact, and without the vocabulary.

    Args:
        student: hidden states [n, D] of each sample's tokens; several samples make one vector.
        teacher: [n, D'] of the same tokens.
        grams: W'W of both heads, [D, D] and [D', D'].
        center: subtract each model's mean over a sample's tokens, which logits share for the most part.
    """
    products = []
    for ours, theirs in zip(student, teacher, strict=True):
        own, other = (_relation(hidden, gram, center) for hidden, gram in zip((ours, theirs), grams, strict=True))
        products.append(torch.stack([(own * other.T).sum(), own.square().sum(), other.square().sum()]))
    dot, first, second = torch.stack(products).sum(0)
    return 1 - dot / (first.sqrt() * second.sqrt()).clamp_min(torch.finfo(dot.dtype).tiny)


def _relation(hidden: Tensor, gram: Tensor, center: bool) -> Tensor:
    """Self-correlation of the logits, [n, D] -> [n, n]."""
    hidden = hidden.to(gram.dtype)
    hidden = hidden - hidden.mean(0, keepdim=True) if center else hidden
    return hidden @ gram @ hidden.T
