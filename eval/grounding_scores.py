"""How well an answer says when and where: overlaps of spans, boxes and tubes.

Source: the metrics of LLaVA-ST's ST-Align benchmark (Li et al. 2025, arXiv 2501.08282).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mmllm.contract.grounding import Box, TimeSpan, Tube

THRESHOLDS = (0.3, 0.5, 0.7)


def span_iou(found: TimeSpan, truth: TimeSpan, reference: bool = False) -> float:
    """Temporal overlap: intersection over union.

    Args:
        reference: over the hull of both, as the authors compute it; a span without length is an error there.

    Raises:
        ZeroDivisionError: in `reference`, where both are the same instant.
    """
    if not reference:
        return found.iou(truth)
    both = max(0.0, min(found.end, truth.end) - max(found.start, truth.start))
    return both / (max(found.end, truth.end) - min(found.start, truth.start))


def tube_iou(found: Mapping[int, Box], truth: Mapping[int, Box]) -> tuple[float, float]:
    """(sIoU, vIoU) of boxes by frame: the sum of overlaps over the frames that both have, or that either has.

    vIoU is the one to go by: sIoU rewards a single frame that is easy.
    """
    both = found.keys() & truth.keys()
    total = sum(found[frame].iou(truth[frame]) for frame in both)
    return total / max(1, len(both)), total / max(1, len(found.keys() | truth.keys()))


def by_frame(tube: Tube, frames: int) -> dict[int, Box]:
    """Boxes by the nearest of a clip's frames; the tube's moments are shares of the clip. The last one counts."""
    return {round(moment * (frames - 1)): box for moment, box in tube.boxes}


def recalls(scores: Sequence[float], thresholds: Iterable[float] = THRESHOLDS) -> dict[str, float]:
    """{"recall@0.5": percentage of scores that reach it}."""
    return {
        f"recall@{least}": 100 * sum(score >= least for score in scores) / max(1, len(scores)) for least in thresholds
    }
