"""Windows over a token grid, and means inside them with weights that come from scores.

Source: PPLLaVA (Liu et al. 2024, arXiv 2411.02327), prompt-guided pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.connectors.common.precision import without_autocast

Size = tuple[int, int, int]
Ends = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
AXES = ("time", "rows", "columns")


@dataclass(frozen=True)
class Windows:
    """Where the windows of each axis (time, rows, columns) start and end; a window is the product of one per axis."""

    starts: Ends
    ends: Ends

    @property
    def grid(self) -> Size:
        """Number of windows along each axis."""
        return tuple(len(starts) for starts in self.starts)

    def cells(self, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[windows, longest] token indices of each window of an axis, and which are in it (short windows repeat)."""
        starts = torch.tensor(self.starts[axis], device=device)[:, None]
        ends = torch.tensor(self.ends[axis], device=device)[:, None]
        longest = max(end - start for start, end in zip(self.starts[axis], self.ends[axis], strict=True))
        cells = starts + torch.arange(longest, device=device)
        return cells.minimum(ends - 1), cells < ends

    def inside(self, device: torch.device) -> Tensor:
        """[t, h, w, K] bool: which of the K slots of a window hold a token of it."""
        time, rows, columns = (self.cells(axis, device)[1] for axis in range(3))
        both = rows[:, None, :, None] & columns[None, :, None, :]
        return (time[:, None, None, :, None, None] & both[None, :, :, None]).flatten(3)

    def coverage(self, size: Size, device: torch.device) -> Tensor:
        """[T, H, W]: the number of windows that contain each token, at least 1."""
        counts = []
        for axis, length in enumerate(size):
            cells, inside = self.cells(axis, device)
            counts.append(torch.zeros(length, device=device).index_add_(0, cells.flatten(), inside.flatten().float()))
        time, rows, columns = counts
        return (time[:, None, None] * rows[:, None] * columns).clamp_min(1)


def resolve_windows(
    size: Size,
    grid: Size | None = None,
    kernel: Size | None = None,
    stride: Size | None = None,
    *,
    reference: bool = False,
) -> Windows:
    """The windows over a grid of `size` (t, rows, columns), from one or two of the other three.

    `grid` alone: adaptive windows [floor(i n / o), ceil((i + 1) n / o)), any size. `kernel` and `stride`: from the
    first token on; the last window is cut at the end, so nothing is lost and one frame is enough. `grid` with `kernel`
    or `stride`: the third follows by arithmetic.

    Args:
        reference: the authors' windows: all of equal length, within the axis: `grid` alone overlaps and `kernel`
            with `stride` drops the remainder.

    Raises:
        ValueError: another combination, or windows that do not fit; names the axis and its numbers.
    """
    starts, ends = [], []
    for axis, name in enumerate(AXES):
        asked = [None if values is None else values[axis] for values in (grid, kernel, stride)]
        if any(value is not None and value < 1 for value in asked):
            raise ValueError(f"{name}: grid, kernel and stride are at least 1, not {asked}")
        along = _equal if reference else _ours(*asked)
        windows = along(size[axis], *asked, name)
        starts.append(tuple(start for start, _ in windows))
        ends.append(tuple(end for _, end in windows))
    return Windows(tuple(starts), tuple(ends))


def arithmetic(size: int, cells: int | None, kernel: int | None, stride: int | None, name: str) -> tuple[int, int, int]:
    """(cells, kernel, stride) of one axis, all windows of equal length and within the axis.

    Raises:
        ValueError: not one of the four combinations, or the windows do not fit; names the axis by `name`.
    """
    given = {"size": size, "grid": cells, "kernel": kernel, "stride": stride}
    match (cells, kernel, stride):
        case (int(), None, None):
            stride = size // cells
            kernel = size - (cells - 1) * stride
        case (None, int(), int()):
            cells = (size - kernel) // stride + 1
        case (int(), None, int()):
            kernel = size - (cells - 1) * stride
        case (int(), int(), None):
            stride = (size - kernel) // (cells - 1) if cells > 1 else kernel
        case _:
            raise ValueError(f"{name}: give grid, or kernel and stride, or grid and one of them, not {given}")
    if min(cells, kernel, stride) < 1 or (cells - 1) * stride + kernel > size:
        raise ValueError(f"{name}: no such windows, {given}")
    return cells, kernel, stride


def _equal(size: int, cells: int | None, kernel: int | None, stride: int | None, name: str) -> list[tuple[int, int]]:
    cells, kernel, stride = arithmetic(size, cells, kernel, stride, name)
    return [(start * stride, start * stride + kernel) for start in range(cells)]


def _adaptive(size: int, cells: int, kernel: None, stride: None, name: str) -> list[tuple[int, int]]:
    return [(cell * size // cells, -(-(cell + 1) * size // cells)) for cell in range(cells)]


def _covering(size: int, cells: None, kernel: int, stride: int, name: str) -> list[tuple[int, int]]:
    if stride > kernel:
        raise ValueError(f"{name}: stride {stride} is above kernel {kernel}, tokens between windows would be lost")
    count = max(0, -(-(size - kernel) // stride)) + 1
    return [(start * stride, min(start * stride + kernel, size)) for start in range(count)]


def _ours(*asked: int | None) -> Callable[..., list[tuple[int, int]]]:
    """How the windows of an axis are laid out when these of (grid, kernel, stride) are given."""
    given = tuple(value is not None for value in asked)
    return {(True, False, False): _adaptive, (False, True, True): _covering}.get(given, _equal)


def by_window(values: Tensor, windows: Windows) -> Tensor:
    """[B, T, H, W, ...] -> [B, t, h, w, K, ...]: the tokens of every window, in raster order.

    Where windows tile the grid nothing is copied before the final reordering; overlaps are repeated.
    """
    for axis in range(3):
        cells, _ = windows.cells(axis, values.device)
        at = 1 + 2 * axis
        if not cells.numel() == windows.ends[axis][-1] == values.shape[at]:
            values = values.index_select(at, cells.flatten())
        values = values.unflatten(at, cells.shape)
    rest = range(7, values.ndim)
    return values.permute(0, 1, 3, 5, 2, 4, 6, *rest).flatten(4, 6)


def window_weights(scores: Tensor | None, windows: Windows, temperature: float, device: torch.device) -> Tensor:
    """[B or 1, t, h, w, K] float32 weights that sum to 1 in every window: softmax of score / temperature.

    Args:
        scores: [B, T, H, W]; None = the mean of each window.
    """
    inside = windows.inside(device)[None]
    if scores is None:
        return inside / inside.sum(-1, keepdim=True)
    logits = by_window(scores.float(), windows) / temperature
    return logits.masked_fill(~inside, -torch.inf).softmax(-1)


def weighted_means(values: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Values [B, T, H, W, C] by weights [B or 1, t, h, w, K] -> [B, t, h, w, C], in float32 also under autocast."""
    with without_autocast(values):
        cells = by_window(values.float(), windows)
        return torch.einsum("bthwkc,bthwk->bthwc", cells, weights.expand(cells.shape[:5])).to(values.dtype)


def windowed_softmax_pool(values: Tensor, scores: Tensor | None, windows: Windows, temperature: float) -> Tensor:
    """[B, T, H, W, C] -> [B, t, h, w, C]: in every window the mean with weights softmax(score / temperature)."""
    return weighted_means(values, window_weights(scores, windows, temperature, values.device), windows)


def distance_from_mean(weights: Tensor, windows: Windows) -> Tensor:
    """Total variation distance of weights [B, t, h, w, K] from the plain mean, averaged over windows: 0 = the mean."""
    inside = windows.inside(weights.device)
    return (weights - inside / inside.sum(-1, keepdim=True)).abs().sum(-1).mean() / 2
