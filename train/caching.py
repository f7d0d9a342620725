"""What a stage keeps between epochs: decoded frames, and the tokens of its frozen encoders."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmllm.contract.types import Needs
from mmllm.data.media.cache import Rate, key_of
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.loading import Caches, MediaLoader, layout

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor


def attach_caches(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    reader: GuardedReader | None,
    caches: Caches | None,
    precision: str,
) -> None:
    """Let a model's reader and its frozen encoders use the caches; None: neither does.

    Only encoders without a trainable weight take part, under a digest of their weights, so call this for each stage.

    Args:
        reader: how files are read; None = as the processor already does.
        precision: of the forward; tokens are kept per precision.
    """
    bank, plan = model.model.front_end.bank, model.model.front_end.plan
    bank.keep = None
    processor.loader = MediaLoader(reader or processor.loader.reader, caches)
    if caches is None or caches.features is None:
        return
    disk = caches.features
    caches.encoders = {
        name: key_of([bank.encoders[name].digest(), asdict(plan.needs.get(name, Needs())), precision])
        for name in plan.encoders_used
        if not bank.encoders[name].trainable
    }

    def keep(key: str, clip: dict[str, Any], tokens: dict[str, Tensor]) -> None:
        tensors = tokens | layout(clip["spec"], clip["times"])
        disk.put(key, {name: value.detach().cpu() for name, value in tensors.items()})

    bank.keep = keep


class LookUps:
    """Cache hits and misses of a stage over all loader workers; each batch brings its own counts."""

    def __init__(self) -> None:
        self.rates: dict[str, Rate] = {}

    def add(self, counts: dict[str, tuple[int, int]]) -> None:
        """Add one batch's counts: {cache: (hits, misses)}."""
        for name, (hits, misses) in counts.items():
            rate = self.rates.setdefault(name, Rate())
            rate.hits += hits
            rate.misses += misses

    def facts(self) -> dict[str, str]:
        """Hit rates for the progress line and the log."""
        return {f"{name} cached": str(rate) for name, rate in self.rates.items()}


def snapshot(caches: Caches | None) -> dict[str, tuple[int, int]]:
    """{cache: (hits, misses)} of this process so far."""
    found = {"frames": caches.frames, "features": caches.features} if caches is not None else {}
    return {name: (disk.rate.hits, disk.rate.misses) for name, disk in found.items() if disk is not None}


def delta(before: dict[str, tuple[int, int]], caches: Caches | None) -> dict[str, tuple[int, int]]:
    """The hits and misses since `before` was taken."""
    return {
        name: (hits - before[name][0], misses - before[name][1]) for name, (hits, misses) in snapshot(caches).items()
    }
