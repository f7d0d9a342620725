"""One medium of a conversation: read from its file or taken from memory, resized for every encoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import ImageOps

from mmllm.contract.errors import UserError
from mmllm.contract.types import Geometry
from mmllm.data.media.loading import MediaLoader, resized
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import Clip, Probe
from mmllm.model.front_end_plan import FrontEndPlan
from mmllm.processing.collate import Medium
from mmllm.processing.content import MediumEntry


def read_medium(
    loader: MediaLoader,
    plan: FrontEndPlan,
    entry: MediumEntry,
    sampling: Sampling | None,
    tiled: bool,
    beside: Iterable[Geometry] = (),
) -> Medium:
    """Decode one content entry and resize it for every encoder.

    Args:
        loader: reads files.
        plan: of the front end that takes it.
        entry: a file, or pixels in memory.
        sampling: used where the entry itself says nothing; None = the recipe's.
        tiled: cut an image into tiles, if the recipe does that.
        beside: sizes that are wanted of its pixels beside the encoders' own.

    Raises:
        UserError: the medium cannot be read.
    """
    sampling = entry.sampled(sampling or plan.sampling)
    wanted = plan.geometries | {f"beside {index}": geometry for index, geometry in enumerate(beside)}
    tiling = plan.tiling if tiled and entry.kind == "image" else None
    ref = entry.ref
    if ref is not None:
        loaded, key = loader.load(ref, sampling, wanted, tiling), (ref, sampling, tiling)
    else:
        clip = _in_memory(entry.source, entry.kind, sampling)
        loaded = resized(clip, entry.kind, tuple(wanted.values()), tiling)
        key = (entry.kind, id(entry.source), sampling, tiling)
    parts = (loaded.spec, loaded.times, loaded.pixels, loaded.features, loaded.keys)
    return Medium(key, *parts, entry.source, loaded.corrupt)


def _in_memory(source: object, kind: str, sampling: Sampling) -> Clip:
    """Frames that are already in memory: a PIL image or uint8 [H, W, 3] or [T, H, W, 3] (one frame per second)."""
    array = np.asarray(ImageOps.exif_transpose(source).convert("RGB") if hasattr(source, "convert") else source)
    array = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"{kind} array", "wrong shape or type", expected="uint8 [T, H, W, 3]", got=array.shape)
    if kind == "video":
        probe = Probe("video", len(array), 1.0, *array.shape[1:3])
        index = sampling.indices(probe, None, None)
        return Clip(array[index], np.asarray(index, dtype=np.float64))
    return Clip(array[:1], np.zeros(1))
