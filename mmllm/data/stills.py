"""Back ends over pictures: one image as a one-frame clip, and a folder of frames as a video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmllm.contract.errors import UserError
from mmllm.data.backends import Backend
from mmllm.data.media import FOLDER_FPS, IMAGE_SUFFIXES, Probe

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 274
"""EXIF tag that says how the camera was held."""


class ImageBackend(Backend):
    """A still as a clip of one frame, upright (EXIF) and RGB."""

    @classmethod
    def open(cls, path: str, fps: float | None = None) -> ImageBackend:
        """Read the header of an image; a GIF gives its first frame."""
        self = cls(path)
        self.probe = Probe("image", 1, 1.0, *_upright_size(path))
        return self

    def read_times(self, times: Sequence[float]) -> list[np.ndarray]:
        """The same uint8 ``[H, W, 3]`` picture for every moment."""
        return [load_image(self.path)] * len(times)


class FolderBackend(Backend):
    """The image files of a folder, sorted by name with numbers by value, as the frames of a video."""

    @classmethod
    def open(cls, path: str, fps: float | None = None) -> FolderBackend:
        """List the folder and read the header of its first image.

        Raises:
            UserError: no image in it.
        """
        self = cls(path)
        files = [entry for entry in Path(path).iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
        self.files = sorted((file for file in files if not file.name.startswith(".")), key=_by_number)
        if not self.files:
            raise UserError(
                path,
                "the folder holds no image",
                expected="a folder of frames such as 00001.jpg",
                hint="name a video file in it, or the folder that holds the frames",
            )
        self.probe = Probe("folder", len(self.files), fps or FOLDER_FPS, *_upright_size(str(self.files[0])))
        return self

    def read_times(self, times: Sequence[float]) -> list[np.ndarray]:
        """Frames at these moments, each file read once: uint8 ``[H, W, 3]``.

        Raises:
            UserError: a file of another size than the first, or unreadable.
        """
        size, loaded = (self.probe.height, self.probe.width), {}
        places = [min(int(moment * self.probe.fps + 1e-6), len(self.files) - 1) for moment in times]
        for place in sorted(set(places)):
            picture = loaded[place] = load_image(str(self.files[place]))
            if picture.shape[:2] != size:
                raise UserError(
                    self.files[place],
                    "the frames of a folder differ in size",
                    expected=f"{size[0]}x{size[1]} (height x width)",
                    got=f"{picture.shape[0]}x{picture.shape[1]}",
                    hint="make all frames the size of the first one",
                )
        return [loaded[place] for place in places]


def load_image(path: str) -> np.ndarray:
    """Decode an image: RGB uint8 ``[H, W, 3]``, upright by its EXIF tag.

    Raises:
        UserError: the file is no image or is damaged.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(path, f"the image is damaged ({error})", hint="copy or download it again") from error
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit values to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _opened(path: str) -> Image:
    """An image file with its header read, or a :class:`UserError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        hint = "an image such as jpg or png, or check how the file was made"
        raise UserError(path, "not an image, it cannot be opened as one", hint=hint) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(path, f"the image cannot be opened ({error})", hint="check the file") from error


def _upright_size(path: str) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, from the header."""
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Sort key: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]
