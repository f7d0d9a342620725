"""From a media reference to encoder inputs: read and resized for each encoder, or taken from a cache."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmllm.contract.types import Geometry, MediaSpec
from mmllm.data.media.cache import Digests, DiskCache, key_of
from mmllm.data.media.damage import Spans
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.pixels import to_geometry
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.tiling import Tiling
from mmllm.data.media.types import Clip, MediaRef

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT = 2
"""Part of every key; raise it when the same facts come to mean different tensors."""


@dataclass
class Loaded:
    """One clip or image, ready for the encoders.

    Attributes:
        times: [F] seconds.
        pixels: {geometry: uint8 [F, 3, h, w]}, for the encoders without cached features.
        features: {encoder: its cached tensors}.
        keys: {encoder: the key under which to cache its output}.
        corrupt: (first, last) seconds within which frames may be damaged; such a clip is never cached.
    """

    spec: MediaSpec
    times: Tensor
    pixels: dict[Geometry, Tensor]
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    corrupt: Spans = ()


@dataclass
class Caches:
    """What is kept between epochs and runs.

    Args:
        digests: of media files.
        frames: decoded and resized frames.
        features: tokens of frozen encoders.
        encoders: {encoder: digest of all that its tokens depend on}; encoders not named here are never cached.
    """

    digests: Digests
    frames: DiskCache | None = None
    features: DiskCache | None = None
    encoders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, kinds: tuple[str, ...], limit: int | None) -> Caches:
        """The caches of some kinds ("frames", "features") below a folder, each of at most `limit` bytes."""
        made = {kind: DiskCache(folder / kind, limit) for kind in kinds}
        return cls(Digests(folder / "digests.sqlite"), made.get("frames"), made.get("features"))


class MediaLoader:
    """Reads media for the encoders of a model.

    Args:
        reader: how files are read.
        caches: what is kept, if anything.
    """

    def __init__(self, reader: GuardedReader | None = None, caches: Caches | None = None) -> None:
        self.reader = GuardedReader() if reader is None else reader
        self.caches = caches

    def load(
        self, ref: MediaRef, sampling: Sampling, wanted: dict[str, Geometry], tiling: Tiling | None = None
    ) -> Loaded:
        """Load a file for the encoders that want it.

        Args:
            wanted: {encoder: its geometry}.
            tiling: how an image is cut into views; None = one view.

        Raises:
            UserError: the file cannot be read.
        """
        if self.caches is None:
            return self._read(ref, sampling, tuple(wanted.values()), tiling)
        kept = _Kept(self.caches, ref, sampling, tiling, wanted, self.reader.backend)
        features = kept.features()
        missing = {name: geometry for name, geometry in wanted.items() if name not in features}
        pixels = kept.pixels(missing.values(), lambda left: self._read(ref, sampling, left, tiling))
        shape = next(iter([*features.values(), *pixels.values()]))
        loaded = Loaded(_spec(ref.kind, shape), shape["clip_times"], {}, features, corrupt=kept.corrupt)
        loaded.pixels = {geometry: entry["pixels"] for geometry, entry in pixels.items()}
        if kept.known and not kept.corrupt:
            loaded.keys = {name: kept.feature_key(name) for name in missing if name in self.caches.encoders}
        return loaded

    def _read(
        self, ref: MediaRef, sampling: Sampling, geometries: tuple[Geometry, ...], tiling: Tiling | None
    ) -> Loaded:
        if tiling is not None and ref.kind == "image":
            return resized(self.reader.read(ref, sampling), ref.kind, geometries, tiling, ref.describe())
        # Each frame is resized as it comes: a long clip is never held at full size, and sizes may differ.
        geometries = tuple(dict.fromkeys(geometries))
        where, limits = ref.describe(), self.reader.limits

        def convert(frame: np.ndarray) -> list[Tensor]:
            return [to_geometry(frame[None], geometry, where, limits)[0] for geometry in geometries]

        clip = self.reader.read(ref, sampling, convert)
        pixels = {geometry: _stacked(clip.frames, index) for index, geometry in enumerate(geometries)}
        times = torch.as_tensor(clip.times, dtype=torch.float32)
        return Loaded(MediaSpec(ref.kind, len(clip.frames)), times, pixels, corrupt=clip.corrupt)


def resized(
    clip: Clip,
    kind: str,
    geometries: tuple[Geometry, ...],
    tiling: Tiling | None = None,
    where: str = "picture in memory",
) -> Loaded:
    """Resize frames [T, H, W, 3] in memory to the sizes that the encoders want.

    Raises:
        UserError: see `to_geometry`.
    """
    frames, spec = clip.frames, MediaSpec(kind, len(clip.frames))
    times = torch.as_tensor(clip.times, dtype=torch.float32)
    if kind == "image" and tiling is not None:
        frames, spec = tiling.views(clip.frames[0])
        times = times.new_zeros(len(frames))
    pixels = {geometry: to_geometry(frames, geometry, where) for geometry in dict.fromkeys(geometries)}
    return Loaded(spec, times, pixels, corrupt=clip.corrupt)


def _stacked(frames: list[list[Tensor | None]], column: int) -> Tensor:
    """[F, 3, h, w] from one of the sizes of each frame, which is released: a long clip is not held twice."""
    whole = frames[0][column].new_empty(len(frames), *frames[0][column].shape)
    for index, frame in enumerate(frames):
        whole[index] = frame[column]
    for frame in frames:
        frame[column] = None
    return whole


class _Kept:
    """The cache entries of one clip.

    Attributes:
        known: whether the file has a digest that identifies it.
        corrupt: the damage found while reading; cached clips had none, since damaged clips are never cached: they are
            reported, or refused, at every read.
    """

    def __init__(
        self,
        caches: Caches,
        ref: MediaRef,
        sampling: Sampling,
        tiling: Tiling | None,
        wanted: dict[str, Geometry],
        backend: str,
    ) -> None:
        self.caches, self.wanted, self.known, self.corrupt = caches, wanted, True, ()
        clip = {"kind": ref.kind, "start": ref.start, "end": ref.end, "fps": ref.fps}
        try:
            clip["media"] = caches.digests(ref.path)
        except (OSError, sqlite3.Error):
            self.known = False  # the reader reports what is wrong with it
        tiles = asdict(tiling) if tiling is not None and ref.kind == "image" else None
        self.facts = {"format": FORMAT, "backend": backend, "clip": clip, "sampling": asdict(sampling), "tiles": tiles}

    def feature_key(self, name: str) -> str:
        """The key of an encoder's cached tokens."""
        geometry = asdict(self.wanted[name])
        return key_of({**self.facts, "geometry": geometry, "encoder": self.caches.encoders[name]})

    def features(self) -> dict[str, dict[str, Tensor]]:
        """{encoder: what is cached for this clip}."""
        found = {}
        cache = self.caches.features
        for name in self.wanted if cache is not None and self.known else ():
            if name in self.caches.encoders and (entry := cache.get(self.feature_key(name))) is not None:
                found[name] = entry
        return found

    def pixels(
        self, geometries: Iterable[Geometry], read: Callable[[tuple[Geometry, ...]], Loaded]
    ) -> dict[Geometry, dict[str, Tensor]]:
        """{geometry: frames, times and layout}: cached ones, and those that `read` returns for the others."""
        geometries = tuple(dict.fromkeys(geometries))
        cache, found = self.caches.frames if self.known else None, {}
        keys = {geometry: key_of({**self.facts, "geometry": asdict(geometry)}) for geometry in geometries}
        if cache is not None:
            entries = {geometry: cache.get(key) for geometry, key in keys.items()}
            found = {geometry: entry for geometry, entry in entries.items() if entry is not None}
        left = tuple(geometry for geometry in geometries if geometry not in found)
        if left:
            loaded = read(left)
            self.corrupt = loaded.corrupt
            for geometry in left:
                found[geometry] = {"pixels": loaded.pixels[geometry], **layout(loaded.spec, loaded.times)}
                if cache is not None and not loaded.corrupt:
                    cache.put(keys[geometry], found[geometry])
        return found


def layout(spec: MediaSpec, times: Tensor) -> dict[str, Tensor]:
    """What is kept beside the frames, so that a clip need not be opened to know its shape."""
    tiles, crop = spec.tiles or (0, 0), spec.crop or (0, 0)
    return {"clip_times": times, "clip_layout": torch.tensor([*tiles, *crop])}


def _spec(kind: str, entry: dict[str, Tensor]) -> MediaSpec:
    rows, columns, height, width = entry["clip_layout"].tolist()
    tiled = bool(rows)
    return MediaSpec(
        kind, len(entry["clip_times"]), (rows, columns) if tiled else None, (height, width) if tiled else None
    )
