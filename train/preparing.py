"""From numbers of samples to a batch, in a loader worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from mmllm.contract.errors import UserError
from mmllm.contract.objective import Objective
from mmllm.contract.registry import load_plugin, plugins
from mmllm.data.records.conversations import Sample
from mmllm.train.caching import delta, snapshot
from mmllm.train.order import draw_key

if TYPE_CHECKING:
    from mmllm.processing.processor import MMLLMProcessor

TRIES = 20
"""After this many bad samples in a row the data are at fault, not a sample."""


class _Plugins:
    """Loads plug-ins where it is unpickled."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __reduce__(self) -> tuple[Any, tuple[list[Path]]]:
        return _loaded, (self.paths,)


def _loaded(paths: list[Path]) -> _Plugins:
    for path in paths:
        load_plugin(path)
    return _Plugins(paths)


@lru_cache(maxsize=1)
def _shield() -> None:
    """In a loader worker: ignore the first termination signal.

    Whoever stops a job signals all of its processes, but the training process saves first and may need its workers
    for that. It later asks them to end itself (`ending_workers`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, lambda *_: os._exit(0)))


@contextmanager
def ending_workers() -> Iterator[None]:
    """End the loader workers started in this context when it exits: they get the one signal that they ignore."""
    before = set(active_children())
    try:
        yield
    finally:
        for worker in set(active_children()) - before:
            worker.terminate()


class Preparer:
    """Numbers of samples to a batch; what is wrong with the data comes back as part of the batch.

    A worker's exception would reach the trainer as text with a traceback; this way the exception itself arrives.

    Args:
        skip_bad: replace a sample that cannot be read by the next one that can.
        seed: of the run, for what is drawn about samples.
        held: samples kept for validation: they and the others do not replace each other.
    """

    def __init__(
        self,
        data: Sequence[Sample],
        objective: Objective,
        processor: MMLLMProcessor,
        skip_bad: bool = False,
        seed: int = 0,
        held: Sequence[int] = (),
    ) -> None:
        self.data, self.objective, self.processor, self.skip_bad = data, objective, processor, skip_bad
        self.seed, self.held = seed, frozenset(held)

    def __getstate__(self) -> dict[str, Any]:
        """A spawned worker has an empty registry: the plug-ins are sent before anything that may need them."""
        return {"plugins": _Plugins(plugins()), **vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "plugins"})

    def __call__(self, turns: list[tuple[int, int]]) -> dict[str, Any]:
        """The batch of some samples, or `{"error": ...}`; `skipped` lists what was left out and why.

        Args:
            turns: (number, epoch) of each sample.
        """
        if get_worker_info() is not None:
            _shield()
        caches = self.processor.loader.caches
        before = snapshot(caches)
        try:
            batch = self._batch(turns)
        except UserError as error:
            return {"error": error}
        return {**batch, "looked_up": delta(before, caches)} if caches is not None else batch

    def _batch(self, turns: list[tuple[int, int]]) -> dict[str, Any]:
        try:
            return self._prepared(turns)
        except UserError:
            if not self.skip_bad:
                raise
        skipped: list[str] = []
        good = [self._next_good(turn, skipped) for turn in turns]
        return {**self._prepared(good), "skipped": skipped}

    def _next_good(self, turn: tuple[int, int], skipped: list[str]) -> tuple[int, int]:
        """The first turn from this one on whose sample can be read.

        Raises:
            UserError: too many bad samples in a row.
        """
        first, epoch = turn
        following = ((first + step) % len(self.data) for step in range(max(TRIES, len(self.data))))
        of_a_kind = (number for number in following if (number in self.held) == (first in self.held))
        for number in islice(of_a_kind, TRIES):
            candidate = number, epoch
            try:
                self._prepared([candidate])
                return candidate
            except UserError as error:
                skipped.append(str(error))
                last = error
        raise last

    def _prepared(self, turns: list[tuple[int, int]]) -> dict[str, Any]:
        samples = [replace(self.data[number], draw=draw_key(self.seed, epoch, number)) for number, epoch in turns]
        return self.objective.prepare(samples, self.processor)
