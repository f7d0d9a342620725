"""How the pixels of a frame become a tower's input: size, fit, interpolation, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from mmllm.contract.types import Geometry

Colour = tuple[float, float, float]
Fit = Literal["squash", "crop", "pad"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]
Resampler = Literal["torch", "pillow"]
Centre = Literal["down", "even"]

IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Colour, Colour] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

PILLOW: dict[str, Any] = {"resampler": "pillow", "centre": "even"}
"""How torchvision transforms Pillow images; timm and open_clip use these settings."""


class CropArguments(TypedDict, total=False):
    """What a recipe may set about how frames are brought to a tower's size; see `Geometry`."""

    fit: Fit | None
    short: int | None
    interpolation: Interpolation | None


class PixelArguments(CropArguments, total=False):
    """The same, plus the normalisation of the pixels."""

    mean: Colour | None
    std: Colour | None


@dataclass(frozen=True)
class Transform:
    """A square input.

    Attributes:
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        size: side in pixels.
        fit: as in `Geometry`.
        interpolation: as in `Geometry`.
        short: as in `Geometry`.
        fill: as in `Geometry`.
        resampler: as in `Geometry`.
        centre: as in `Geometry`.
    """

    mean: Colour
    std: Colour
    size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    short: int | None = None
    fill: int = 0
    resampler: Resampler = "torch"
    centre: Centre = "down"

    @property
    def geometry(self) -> Geometry:
        """How frames are resized."""
        centre = self.centre if self.fit == "crop" else "down"  # equal geometries share frames
        return Geometry(
            self.size, self.size, self.fit, self.interpolation, self.short, self.fill, self.resampler, centre
        )

    def override(self, **given: Any) -> Transform:
        """A copy in which the arguments that a recipe gives (not None) replace these.

        Raises:
            ValueError: `short` without a crop, or shorter than the crop.
        """
        given = {name: value for name, value in given.items() if value is not None}
        fit = given.get("fit", self.fit)
        if fit != "crop":
            if given.get("short") is not None:
                raise ValueError(f"short: nothing is cropped with fit: {fit}")
            given["short"] = None
        changed = replace(self, **given)
        if changed.short is not None and changed.short < changed.size:
            raise ValueError(f"short {changed.short} is less than the size {changed.size}")
        return changed
