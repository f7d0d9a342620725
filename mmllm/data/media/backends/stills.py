"""Back ends for pictures: one image as a one-frame clip, and a folder of frames as a video."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.data.media.backends.base import Backend, Convert
from mmllm.data.media.limits import DEFAULTS, Limits
from mmllm.data.media.types import FOLDER_FPS, IMAGE_SUFFIXES, Probe

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

ORIENTATION = 274
"""EXIF tag for the orientation of the camera."""
UPRIGHT = (
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_270",
    "TRANSVERSE",
    "ROTATE_90",
)
"""How to turn a picture of orientation 2, 3, ..., 8 upright."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
"""Formats that are opened as images. Some other formats of Pillow run programs (EPS) or open other files."""
_warnings_lock = Lock()
"""Warning filters are shared by the whole process."""


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
        reading: the last file read, for errors.
    """

    tells_damage = True
    reading: Path

    @classmethod
    def open(cls, path: str, fps: float | None = None, limits: Limits = DEFAULTS) -> FolderBackend:
        """List the folder and read the header of its first image.

        Raises:
            UserError: it holds no image, or something else under an image's name, such as a pipe.
        """
        self = cls(path, limits)
        with os.scandir(path) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
            found = [entry for entry in found if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
            for entry in found:
                if not entry.is_file():  # a link to a file is one
                    what = "not a regular file in a folder of frames"
                    hint = "remove it: a folder, a pipe, a device or a broken link is not a frame"
                    raise UserError(entry.path, what, hint=hint)
        self.files = sorted((Path(entry.path) for entry in found), key=_by_number)
        if not self.files:
            raise UserError(
                path,
                "the folder holds no images",
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
        indices = [min(int(moment * self.probe.fps + 1e-6), len(self.files) - 1) for moment in times]
        for index in sorted(set(indices)):
            self.reading = self.files[index]
            picture = load_image(str(self.reading), self.limits)
            loaded[index] = convert(picture) if convert else picture
        return [loaded[index] for index in indices]


def load_image(source: str | BytesIO, limits: Limits = DEFAULTS, where: str = "") -> np.ndarray:
    """Decode an image: RGB uint8 ``[H, W, 3]``, upright by its EXIF tag.

    Args:
        source: a path, or the bytes of a file.
        where: its name in messages; default: the path.

    Raises:
        UserError: the file is not an image, is damaged, or exceeds the limit (checked before decoding).
    """
    from PIL import Image

    where = where or str(source)
    image, orientation, doubts = _opened(source, limits, where)
    if doubts:
        log.warning("%s: the image is read, but parts of the file are damaged (%s)", where, "; ".join(doubts))
    with image:
        # the decoders of the many formats raise all kinds of errors on damaged data
        try:
            image.load()
            # it is dropped anyway, and Pillow warns where it cannot carry it over
            image.info.pop("transparency", None)
            if image.mode.startswith("I;16"):
                # Pillow would clip 16-bit values to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if orientation > 1:
                image = image.transpose(Image.Transpose[UPRIGHT[orientation - 2]])
            return np.array(image.convert("RGB"))
        except Exception as error:
            hint = "copy or download it again"
            raise UserError(where, f"the image is damaged ({str(error) or type(error).__name__})", hint=hint) from error


def _opened(source: str | BytesIO, limits: Limits, where: str) -> tuple[Image, int, list[str]]:
    """An image file with its header read, its orientation (EXIF), and Pillow's warnings about it.

    Pillow's warnings are captured, so that none is printed without the name of its file.

    Raises:
        UserError: not an image, damaged, or larger than the limit.
    """
    from PIL import Image, UnidentifiedImageError

    # only headers are read under this lock: pictures are decoded in parallel
    with _warnings_lock, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            Image.init()
            image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError as error:
            hint = "an image such as jpg or png, or check how the file was made"
            raise UserError(where, "not an image, it cannot be opened as one", hint=hint) from error
        except Exception as error:
            what = f"the image cannot be opened ({str(error) or type(error).__name__})"
            raise UserError(where, what, hint="check the file") from error
        try:
            limits.check_picture(where, image.height, image.width)
            # the base class's method: that of a PNG decodes the picture, in case a tag follows it
            tag = Image.Image.getexif(image).get(ORIENTATION)
        except UserError:
            image.close()
            raise
        except Exception as error:
            image.close()
            raise UserError(where, f"the EXIF data is damaged ({error})", hint="save the image again") from error
    # our own limit replaces Pillow's
    heard = [one for one in heard if not issubclass(one.category, Image.DecompressionBombWarning)]
    doubts = dict.fromkeys(str(one.message) for one in heard if "PIL" in Path(one.filename).parts)
    return image, tag if tag in range(1, 9) else 1, list(doubts)


def _upright_size(path: str, limits: Limits) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, from the header."""
    image, orientation, _ = _opened(path, limits, path)
    with image:
        return image.size if orientation >= 5 else image.size[::-1]


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sort key: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]
