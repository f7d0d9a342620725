"""From sample numbers to a batch, in a loader worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

from torch.utils.data import get_worker_info

from mmllm.contract.errors import UserError
from mmllm.contract.parts import Objective
from mmllm.contract.registry import load_plugin, plugins
from mmllm.data.conversations import Sample
from mmllm.train.caching import counted, since

TRIES = 20
"""So many samples in a row may be bad before the data are at fault, not a sample."""


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
    """In a worker: hear signals of the training process alone; whoever stops a job signals all of it, workers too.

    The training process saves first, and needs its workers until then.
    """
    if get_worker_info() is None or not hasattr(signal, "sigwaitinfo"):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_when_asked, args=(os.getppid(),), daemon=True).start()


def _end_when_asked(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class Preparer:
    """Sample numbers to a batch; what is wrong with the data comes back as part of the batch.

    An exception of a worker would reach the trainer as text with a traceback; this way it arrives as itself.

    Args:
        skip_bad: put the next sample that can be read in the place of one that cannot.
    """

    def __init__(self, data: Sequence[Sample], objective: Objective, processor: Any, skip_bad: bool = False) -> None:
        self.data, self.objective, self.processor, self.skip_bad = data, objective, processor, skip_bad

    def __getstate__(self) -> dict[str, Any]:
        """A spawned worker has an empty registry: the plug-ins travel before what may be theirs."""
        return {"plugins": _Plugins(plugins()), **vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "plugins"})

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        """The batch of some samples, or `{"error": ...}`; `skipped` says what was left out and why."""
        _shield()
        caches = self.processor.loader.caches
        before = counted(caches)
        try:
            batch = self._batch(numbers)
        except UserError as error:
            return {"error": error}
        return {**batch, "looked_up": since(before, caches)} if caches is not None else batch

    def _batch(self, numbers: list[int]) -> dict[str, Any]:
        try:
            return self._prepared(numbers)
        except UserError:
            if not self.skip_bad:
                raise
        skipped: list[str] = []
        good = [self._next_good(number, skipped) for number in numbers]
        return {**self._prepared(good), "skipped": skipped}

    def _next_good(self, number: int, skipped: list[str]) -> int:
        """The first number from this one on whose sample can be read.

        Raises:
            UserError: the last of so many bad ones in a row.
        """
        for step in range(TRIES):
            candidate = (number + step) % len(self.data)
            try:
                self._prepared([candidate])
                return candidate
            except UserError as error:
                skipped.append(str(error))
                last = error
        raise last

    def _prepared(self, numbers: list[int]) -> dict[str, Any]:
        return self.objective.prepare([self.data[number] for number in numbers], self.processor)
