"""Back ends over pictures: one image as a one-frame clip, and a folder of frames as a video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.data.backends.base import Backend, Convert
from mmllm.data.limits import DEFAULTS, Limits
from mmllm.data.media import FOLDER_FPS, IMAGE_SUFFIXES, Probe

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 274
"""EXIF tag that says how the camera was held."""


class ImageBackend(Backend):
    """A still as a clip of one frame, upright (EXIF) and RGB."""

    tells_damage = True  # a damaged image is an error

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> ImageBackend:
        """Read the header of an image; a GIF gives its first frame."""
        self = cls(path, limits)
        self.probe = Probe("image", 1, 1.0, *_upright_size(path, limits))
        return self

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """The same uint8 ``[H, W, 3]`` picture for every moment."""
        picture = load_image(self.path, self.limits)
        return [convert(picture) if convert else picture] * len(times)


class FolderBackend(Backend):
    """The image files of a folder, sorted by name with numbers by value, as the frames of a video.

    Attributes:
        reading: the file that was read last, for errors.
    """

    tells_damage = True
    reading: Path

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> FolderBackend:
        """List the folder and read the header of its first image.

        Raises:
            UserError: no image in it.
        """
        self = cls(path, limits)
        files = [entry for entry in Path(path).iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
        self.files = sorted((file for file in files if not file.name.startswith(".")), key=_by_number)
        if not self.files:
            raise UserError(
                path,
                "the folder holds no image",
                expected="a folder of frames such as 00001.jpg",
                hint="name a video file in it, or the folder that holds the frames",
            )
        self.probe = Probe("folder", len(self.files), fps or FOLDER_FPS, *_upright_size(str(self.files[0]), limits))
        return self

    def read_times(self, times: Sequence[float], convert: Convert | None = None) -> list[Any]:
        """Frames at these moments, each file read once: uint8 ``[H, W, 3]``.

        Raises:
            UserError: a file that is unreadable.
        """
        loaded = {}
        places = [min(int(moment * self.probe.fps + 1e-6), len(self.files) - 1) for moment in times]
        for place in sorted(set(places)):
            self.reading = self.files[place]
            picture = load_image(str(self.reading), self.limits)
            loaded[place] = convert(picture) if convert else picture
        return [loaded[place] for place in places]


def load_image(path: str, limits: Limits = DEFAULTS) -> np.ndarray:
    """Decode an image: RGB uint8 ``[H, W, 3]``, upright by its EXIF tag.

    Raises:
        UserError: the file is no image, is damaged, or is larger than the limit (seen before it is decoded).
    """
    from PIL import Image, ImageOps

    with _opened(path, limits) as image:
        # the decoders of the many formats raise anything on damaged data
        try:
            image.load()
            if image.mode.startswith("I;16"):
                # Pillow would clip 16-bit values to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:
            hint = "copy or download it again"
            raise UserError(path, f"the image is damaged ({str(error) or type(error).__name__})", hint=hint) from error


def _opened(path: str, limits: Limits) -> Image:
    """An image file with its header read, or a :class:`UserError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        hint = "an image such as jpg or png, or check how the file was made"
        raise UserError(path, "not an image, it cannot be opened as one", hint=hint) from error
    except Exception as error:
        what = f"the image cannot be opened ({str(error) or type(error).__name__})"
        raise UserError(path, what, hint="check the file") from error
    try:
        limits.check_picture(path, image.height, image.width)
    except UserError:
        image.close()
        raise
    return image


def _upright_size(path: str, limits: Limits) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, from the header."""
    with _opened(path, limits) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
        except Exception as error:
            raise UserError(path, f"the EXIF data is damaged ({error})", hint="save the image anew") from error
        return (width, height) if turned else (height, width)


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sort key: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]
