"""From a file to the pixels of each encoder, with and without caches."""

from __future__ import annotations

import torch

from mmllm.contract.types import Geometry
from mmllm.data.media.loading import Caches, MediaLoader
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

WANTED = {"small": Geometry(16, 24), "large": Geometry(48, 64), "again": Geometry(16, 24)}


def test_every_encoder_gets_its_own_size(make_video, numbers):
    ref = MediaRef("video", str(make_video(frames=16)))
    loaded = MediaLoader().load(ref, Sampling(frames=4), WANTED)
    shapes = {geometry: tuple(pixels.shape) for geometry, pixels in loaded.pixels.items()}
    assert shapes == {Geometry(16, 24): (4, 3, 16, 24), Geometry(48, 64): (4, 3, 48, 64)}
    frames = loaded.pixels[Geometry(48, 64)].permute(0, 2, 3, 1).numpy()
    assert numbers(frames) == [round(float(second) * 10) for second in loaded.times]


def test_frames_are_kept_apart_by_all_that_they_depend_on(make_video, tmp_path):
    """Number of frames, sampler, part of the clip; each read anew is what is read without a cache."""
    path = str(make_video(frames=16))
    kept = MediaLoader(caches=Caches.open(tmp_path / "cache", ("frames",), None))
    asked = [
        (MediaRef("video", path), Sampling(frames=4)),
        (MediaRef("video", path), Sampling(frames=5)),
        (MediaRef("video", path), Sampling(frames=4, sampler="linspace")),
        (MediaRef("video", path, 0.5), Sampling(frames=4)),
        (MediaRef("video", path, 0.5, 1.0), Sampling(frames=4)),
    ]
    for again in range(2):
        for ref, sampling in asked:
            found, fresh = kept.load(ref, sampling, WANTED), MediaLoader().load(ref, sampling, WANTED)
            assert found.spec == fresh.spec
            assert torch.equal(found.times, fresh.times)
            assert all(torch.equal(found.pixels[size], pixels) for size, pixels in fresh.pixels.items())
        assert kept.caches.frames.rate.hits == again * len(asked) * 2
