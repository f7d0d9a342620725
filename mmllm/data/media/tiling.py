"""Any-resolution images: a view of the whole image and, at a higher resolution, tiles of it.

Source: LLaVA-NeXT (Liu et al. 2024) and LLaVA-OneVision (Li et al. 2024, section 3.2); arithmetic as in the models
published with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmllm.contract.types import Geometry, MediaSpec
from mmllm.data.media.pixels import to_geometry


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into views.

    Args:
        size: side of a view in pixels.
        patches: tokens along a side of a view.
        up_to: largest grid of tiles, (rows, columns); every smaller grid is a candidate.
        among: the candidates themselves, instead.
    """

    size: int
    patches: int
    up_to: tuple[int, int] = (6, 6)
    among: tuple[tuple[int, int], ...] | None = None

    @property
    def candidates(self) -> tuple[tuple[int, int], ...]:
        """Grids of tiles, in the order in which they are tried."""
        rows, columns = (range(1, most + 1) for most in self.up_to)
        return self.among or tuple((r, c) for r in rows for c in columns)

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of this size: keep most of the image, then pad least."""
        best, least = (0, -math.inf), (1, 1)
        for rows, columns in self.candidates:
            high, wide = rows * self.size, columns * self.size
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if (kept, kept - high * wide) > best:
                best, least = (kept, kept - high * wide), (rows, columns)
        return least

    def spec(self, height: int, width: int) -> MediaSpec:
        """What the encoders will see of an image of this size; needs no pixels."""
        rows, columns = self.tiles(height, width)
        high, wide = rows * self.patches, columns * self.patches
        if width / height > wide / high:
            high -= 2 * ((high - max(1, int(round(height * (wide / width), 7)))) // 2)
        else:
            wide -= 2 * ((wide - max(1, int(round(width * (high / height), 7)))) // 2)
        return MediaSpec("image", 1 + rows * columns, (rows, columns), (high, wide))

    def views(self, image: np.ndarray) -> tuple[np.ndarray, MediaSpec]:
        """uint8 [H, W, 3] -> the whole image squashed and its tiles row by row, uint8 [views, size, size, 3]."""
        height, width = image.shape[:2]
        spec = self.spec(height, width)
        rows, columns = spec.tiles
        high, wide = rows * self.size, columns * self.size
        inside = _fit(height, width, high, wide)
        canvas = np.zeros((high, wide, 3), np.uint8)
        top, left = (high - inside[0]) // 2, (wide - inside[1]) // 2
        canvas[top : top + inside[0], left : left + inside[1]] = _resized(image, *inside)
        tiles = canvas.reshape(rows, self.size, columns, self.size, 3).swapaxes(1, 2)
        whole = _resized(image, self.size, self.size)
        return np.concatenate([whole[None], tiles.reshape(-1, self.size, self.size, 3)]), spec


def _fit(height: int, width: int, high: int, wide: int) -> tuple[int, int]:
    """(height, width) of the image inside a canvas, with its aspect ratio kept."""
    if wide / width < high / height:
        return min(math.ceil(height * (wide / width)), high), wide
    return high, min(math.ceil(width * (high / height)), wide)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return to_geometry(image[None], Geometry(height, width))[0].permute(1, 2, 0).numpy()
