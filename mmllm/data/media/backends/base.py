"""A back end: one open media file that returns the pictures on screen at the requested moments.

A back end is asked for moments (seconds since the first frame) and returns for each the last frame on screen by
then: the last with ``pts - pts0 <= t``. Index ``i`` means the moment ``i / fps``, which in a file of constant frame
rate is exactly the i-th frame in display order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from mmllm.data.media.limits import DEFAULTS, Limits
from mmllm.data.media.types import Probe

Convert = Callable[[np.ndarray], Any]
"""Called once with each distinct picture, uint8 ``[H, W, 3]``, as soon as it is decoded; its result is kept instead."""


class BackendFailure(Exception):
    """An optional back end cannot read this file; the reader falls back to PyAV and reports it."""


class Backend:
    """One open media file: ``probe``, ``read_times`` in any order with repeats, ``close``; a context manager.

    To add a back end, write a subclass with ``open`` and ``read_times`` under ``@register("backend", name)``.

    Attributes:
        package: the package to import for it, None if it needs none beyond those always installed.
        header_by: name of a back end that reads the same header faster, None if there is none.
        probe: what the header says.
        missing: number of moments of the last read that are later than anything that decoded; the last decoded
            frame stands in for them.
        last: seconds of that last decoded frame, if ``missing`` is not 0.
        tells_damage: whether it detects damaged frames and fills in ``corrupt``.
        corrupt: (first, last) seconds within which frames of the last read may be damaged.
    """

    package: str | None = None
    header_by: str | None = None
    probe: Probe
    missing: int = 0
    last: float = 0.0
    tells_damage: bool = False
    corrupt: tuple[tuple[float, float], ...] = ()

    def __init__(self, path: str, limits: Limits = DEFAULTS) -> None:
        self.path, self.limits = path, limits

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> Self:
        """Open a file or folder and read its header.

        Args:
            path: an existing local path.
            fps: frames per second of a folder of frames; other back ends ignore it.
            limits: the picture size and the duration are checked before anything is decoded.

        Raises:
            UserError: it cannot be opened, or its header exceeds a limit.
            BackendFailure: this back end cannot open it, but PyAV may.
        """
        raise NotImplementedError

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """The pictures on screen at these moments (seconds since the first frame).

        Args:
            times: in any order, with repeats.
            convert: applied to each distinct picture as it comes, so that no two pictures need be held at once. Its
                argument may be a view with strides; it is not overwritten later.

        Returns:
            One value per moment: ``convert``'s result, or uint8 ``[H, W, 3]`` of ``probe``'s size without it. Moments
            that show the same picture share one value.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
