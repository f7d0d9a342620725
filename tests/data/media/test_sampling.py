"""The sampler against the reference's index lists, and its own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.contract.errors import UserError
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef, Probe

CLIP = Probe("video", 300, 30.0, 240, 320)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("golden", "sampler", "kind", "cases"),
    [
        ("mvbench_video", "uniform", "video", 15),
        ("mvbench_frame_folder", "uniform", "folder", 8),
        ("linspace_inclusive", "linspace", "video", 5),
    ],
)
def test_equals_the_reference(shared: Path, golden: str, sampler: str, kind: str, cases: int) -> None:
    """Every reference index that lies in the clip is ours too; the others are clamped into it."""
    every = json.loads((shared / "goldens" / "eval_frame_indices.json").read_text())["cases"]
    chosen = [case for case in every if case["sampler"] == golden]
    assert len(chosen) == cases
    first, inside = int(kind == "folder"), 0
    for case in chosen:
        total, number = case["n_frames_total"], case["num_segments"]
        ours = Sampling(frames=number, sampler=sampler).indices(
            Probe(kind, total, case["fps"], 10, 10), *(case["bound"] or (None, None))
        )
        theirs = [index - first for index in case["indices"]]
        assert len(ours) == number
        assert ours == [min(max(index, 0), total - 1) for index in theirs], case
        inside += all(0 <= index < total for index in theirs)
    assert inside >= cases - 1


def test_eight_frames_are_the_default() -> None:
    """No argument, a rate, and a cap."""
    assert Sampling().frames == 8
    assert Sampling(max_frames=4).frames == 4
    assert (Sampling(fps=2.0).frames, Sampling(fps=2.0).fps) == (None, 2.0)
    assert Sampling().indices(CLIP) == [18, 55, 93, 130, 168, 205, 242, 280]


@pytest.mark.parametrize(
    ("sampling", "bound", "count"),
    [
        (Sampling(fps=1.0), (None, None), 10),
        (Sampling(fps=2.0), (2.0, 5.0), 6),
        (Sampling(fps=2.0), (8.0, 99.0), 4),
        (Sampling(fps=2.0), (None, 3.0), 6),
        (Sampling(fps=0.01), (None, None), 1),
        (Sampling(fps=30.0, max_frames=16), (None, None), 16),
        (Sampling(frames=400), (None, None), 400),
    ],
)
def test_count_from_the_header(sampling: Sampling, bound: tuple[float | None, float | None], count: int) -> None:
    """The count says exactly how many indices come, within the bound and the clip."""
    indices = sampling.indices(CLIP, *bound)
    assert sampling.count(CLIP, *bound) == len(indices) == count
    assert indices == sorted(indices)
    low, high = (bound[0] or 0) * 30, min((bound[1] or 10) * 30, 299)
    assert low <= indices[0] <= indices[-1] <= high


def test_an_image_is_one_frame() -> None:
    """Whatever is asked for."""
    image = Probe("image", 1, 1.0, 10, 10)
    for sampling in (Sampling(frames=16), Sampling(fps=4.0), Sampling(frames=5, sampler="linspace")):
        assert sampling.count(image) == 1
        assert sampling.indices(image) == [0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"frames": 8, "fps": 1.0}, "exclude each other"),
        ({"frames": 0}, "sampling.frames"),
        ({"frames": 2.5}, "sampling.frames"),
        ({"fps": -1.0}, "sampling.fps"),
        ({"fps": float("inf")}, "sampling.fps"),
        ({"max_frames": 0}, "sampling.max_frames"),
        ({"frames": 64, "max_frames": 32}, "more frames than max_frames"),
        ({"sampler": "unifrom"}, "Try: uniform"),
    ],
)
def test_bad_values(arguments: dict, text: str) -> None:
    """Each mistake is named."""
    with pytest.raises(UserError, match=text):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("text", "path", "start", "end"),
    [
        ("clip.mp4", "clip.mp4", None, None),
        ("a/clip.mp4#t=3,8", "a/clip.mp4", 3.0, 8.0),
        ("clip.mp4#t=3", "clip.mp4", 3.0, None),
        ("clip.mp4#t=,8.25", "clip.mp4", None, 8.25),
        ("clip.mp4#t=npt:.5,1", "clip.mp4", 0.5, 1.0),
        ("clip#1.mp4", "clip#1.mp4", None, None),
        ("take#2/a.mp4", "take#2/a.mp4", None, None),
        ("take#2/a.mp4#t=1", "take#2/a.mp4", 1.0, None),
        ("file:///clips/a%20b.mp4#t=1", "/clips/a b.mp4", 1.0, None),
    ],
)
def test_media_fragments(text: str, path: str, start: float | None, end: float | None) -> None:
    """Path and bounds out of one text, and back."""
    ref = MediaRef.parse("video", text)
    assert (ref.path, ref.start, ref.end) == (path, start, end)
    assert MediaRef.parse("video", ref.describe()) == ref


@pytest.mark.parametrize("fragment", ["#t=", "#t=,", "#t=a,b", "#t=1,2,3", "#t=-1", "#t=1,", "#t=nan", "#3,8", "#x=1"])
def test_bad_fragments(fragment: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UserError, match="bad media fragment"):
        MediaRef.parse("video", "clip.mp4" + fragment)


@pytest.mark.parametrize("text", ["https://a.b/c.mp4", "HTTP://a.b/c.mp4", "s3://b/c.mp4", "data:image/png;base64,AA"])
def test_nothing_remote(text: str) -> None:
    """However the reference is made."""
    for make in (MediaRef, MediaRef.parse):
        with pytest.raises(UserError, match="download it first"):
            make("video", text)
