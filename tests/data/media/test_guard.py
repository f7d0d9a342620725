"""A process of its own reads, and whatever happens to it the run goes on."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mmllm.contract.errors import UserError
from mmllm.data.media import guard
from mmllm.data.media.guard import GuardedReader
from mmllm.data.media.limits import Limits
from mmllm.data.media.reader import probe, read_media
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.types import MediaRef

Make = Callable[..., Path]
FOUR = Sampling(frames=4)
PLUGIN = '''
"""A back end that does to its process what the name of the file says; its pictures show the number of that process."""
import ctypes, os, signal, sys, time
import numpy as np
from mmllm.contract.registry import register
from mmllm.data.media import guard_child
from mmllm.data.media.backends.base import Backend, BackendFailure
from mmllm.data.media.types import Probe

guard_child.GRACE = 0.5
leak = []

DEEDS = {
    "sleeps": lambda: time.sleep(1000),
    "holds": lambda: ctypes.PyDLL(None).sleep(1000),
    "segfaults": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exits": lambda: os._exit(7),
    "memory": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raises": lambda: [].pop(),
    "prints": lambda: os.write(1, b"noise on stdout"),
    "leaks": lambda: leak.append(np.ones(1 << 23, np.uint8)),
}


@register("backend", "fake")
class Fake(Backend):
    @classmethod
    def open(cls, path, fps=None, limits=None):
        self = cls(path, limits)
        self.probe = Probe("video", 40, 10.0, 2, 3 if "wrong" not in path else 4)
        for name, deed in DEEDS.items():
            if f"opening_{name}" in path:
                deed()
        return self

    def read_times(self, times, convert=None):
        found = []
        for number, moment in enumerate(times):
            for name, deed in DEEDS.items():
                if number == 2 and f"reading_{name}" in self.path:
                    deed()
            if number == 2 and "gives_up" in self.path:
                raise BackendFailure("it gives up")
            picture = np.full((2, 3, 3), "torch" in sys.modules, np.uint8)
            picture[0, :, 0] = np.frombuffer(np.uint32(os.getpid()).tobytes()[:3], np.uint8)
            found.append(convert(picture) if convert else picture)
        return found
'''


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., GuardedReader]]:
    """``fake(**limits)`` -> reader with the fake back end."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    readers: list[GuardedReader] = []

    def make(timeout: float = 20.0) -> GuardedReader:
        readers.append(GuardedReader("fake", Limits(timeout=timeout), [plugin]))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()


def item(folder: Path, name: str) -> MediaRef:
    """A file that is there."""
    path = folder / f"{name}.mp4"
    path.write_bytes(b"x")
    return MediaRef("video", str(path))


def reader_process(frames: np.ndarray) -> int:
    """The number of the process that made pictures of the fake back end."""
    return int(np.frombuffer(frames[0, 0, :, 0].tobytes() + b"\0", np.uint32)[0])


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process ends soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_the_same_as_reading_here(make_video: Make, make_picture: Callable, tmp_path: Path, backend: str) -> None:
    """Frames, times and headers of a video, a part of it, a folder and an image; and with a converter."""
    from PIL import Image

    path = str(make_video(frames=40))
    (tmp_path / "folder").mkdir()
    for number in range(5):
        Image.fromarray(make_picture(number)).save(tmp_path / "folder" / f"{number}.png")
    refs = [
        MediaRef("video", path),
        MediaRef("video", path, 1.0, 2.5),
        MediaRef("video", str(tmp_path / "folder"), fps=2.0),
        MediaRef("image", str(tmp_path / "folder" / "3.png")),
    ]
    with GuardedReader(backend) as reader:
        for ref in refs:
            assert reader.probe(ref) == probe(ref, backend)
            for sampling in (Sampling(), Sampling(frames=60), Sampling(fps=4.0, max_frames=7, sampler="linspace")):
                ours, here = reader.read(ref, sampling), read_media(ref, sampling, backend)
                assert np.array_equal(ours.frames, here.frames) and ours.frames.flags.c_contiguous
                assert ours.times.tolist() == here.times.tolist() and ours.times.dtype == here.times.dtype
                small = reader.read(ref, sampling, lambda picture: picture[::16, ::16].copy())
                assert np.array_equal(np.stack(small.frames), here.frames[:, ::16, ::16])


def test_the_same_errors_and_warnings(
    make_video: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, fields, and the log with its names and levels."""
    whole = make_video(frames=200, gop=10, movflags="faststart")
    data, cut = whole.read_bytes(), tmp_path / "cut\udcff.mp4"
    cut.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) * 98 // 100])
    ref = MediaRef("video", str(cut))
    late = MediaRef("video", str(whole), 19.0, 99.0)
    with GuardedReader() as reader, caplog.at_level(logging.INFO):
        ends = Sampling(frames=2, sampler="linspace")
        assert reader.read(ref, ends).repeated == 1
        reader.read(late, FOUR)
        ours = [(record.name, record.levelno, record.getMessage()) for record in caplog.records]
        caplog.clear()
        read_media(ref, ends)
        read_media(late, FOUR)
        assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == ours
        assert "1 of 2 frames are missing" in caplog.text and "ends after the clip" in caplog.text
        for bad in (
            MediaRef("video", "no/such.mp4"),
            MediaRef("video", str(whole), 3.0, 2.0),
            MediaRef("video", "/dev/null"),
        ):
            with pytest.raises(UserError) as here:
                read_media(bad, FOUR)
            with pytest.raises(UserError) as there:
                reader.read(bad, FOUR)
            assert str(there.value) == str(here.value) and there.value.hint == here.value.hint
    with pytest.raises(UserError, match=r"unknown back end 'decrod'. Try: decord"):
        GuardedReader("decrod").read(ref, FOUR)
    with pytest.raises(UserError, match="no such plug-in"):
        GuardedReader("mine", plugins=["nix.py"]).probe(ref)


@pytest.mark.parametrize("deed", ["opening_sleeps", "reading_holds"])
def test_a_reader_that_sleeps_for_ever_is_killed(fake: Callable, tmp_path: Path, deed: str) -> None:
    """At its limit, also where it holds Python's lock; the next file is read by a new process."""
    reader = fake(timeout=1.0)
    before = reader_process(reader.read(item(tmp_path, "good"), FOUR).frames)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        reader.read(item(tmp_path, deed), FOUR)
    assert 0.9 < time.monotonic() - start < 3
    assert f"{deed}.mp4: reading it took too long and was stopped, expected at most 1 s" in str(caught.value)
    assert gone(before)
    frames = reader.read(item(tmp_path, "good"), FOUR).frames
    assert reader_process(frames) != before and frames.shape == (4, 2, 3, 3)


@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("opening_segfaults", "died (SIGSEGV)"),
        ("reading_segfaults", "died (SIGSEGV)"),
        ("opening_exits", "died (exit code 7)"),
        ("reading_memory", "died (SIGKILL, probably out of memory)"),
        ("reading_raises", "reading it failed (IndexError: pop from empty list)"),
    ],
)
def test_a_crash_is_an_error_of_the_file(fake: Callable, tmp_path: Path, deed: str, cause: str) -> None:
    reader = fake()
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            reader.read(item(tmp_path, deed), FOUR)
        assert f"{deed}.mp4: " in str(caught.value) and cause in str(caught.value)
        assert reader.read(item(tmp_path, "good"), FOUR).frames.shape == (4, 2, 3, 3)


def test_odd_back_ends(fake: Callable, tmp_path: Path, make_video: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Noise on stdout, a picture of the wrong size, one that gives up half-way; torch is never imported."""
    reader = fake()
    frames = reader.read(item(tmp_path, "reading_prints"), FOUR).frames
    assert not frames[:, 1].any()
    with pytest.raises(UserError, match=r"wrong.mp4: .* a picture of shape \(2, 3, 3\) after a header of \(2, 4, 3\)"):
        reader.read(item(tmp_path, "wrong"), FOUR)
    path = make_video("gives_up.mp4", frames=40)
    given_up = reader.read(MediaRef("video", str(path)), FOUR)
    assert np.array_equal(given_up.frames, read_media(MediaRef("video", str(path)), FOUR).frames)
    assert "it gives up; reading it with pyav instead" in caplog.text


def test_a_process_that_dies_between_two_files_is_no_files_fault(fake: Callable, tmp_path: Path) -> None:
    reader = fake()
    process = reader_process(reader.read(item(tmp_path, "good"), FOUR).frames)
    os.kill(process, 9)
    assert gone(process)
    time.sleep(0.2)
    assert reader_process(reader.read(item(tmp_path, "good"), FOUR).frames) != process


def test_a_fresh_process_takes_over(fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many files, or when it has grown; the program behind it is started once."""
    monkeypatch.setattr(guard, "FILES", 3)
    monkeypatch.setattr(guard, "GROWTH", 64 << 20)
    reader = fake()
    processes = [reader_process(reader.read(item(tmp_path, "good"), FOUR).frames) for _ in range(7)]
    assert len(set(processes)) == 3
    assert processes[0] == processes[2] != processes[3] == processes[5] != processes[6]
    program = reader._child.process.pid
    monkeypatch.setattr(guard, "FILES", 1000)
    reader.close()
    leaky = [reader_process(reader.read(item(tmp_path, "opening_leaks"), FOUR).frames) for _ in range(20)]
    assert 2 <= len(set(leaky)) <= 4
    assert reader._child.process.pid != program


def test_it_ends_with_its_owner(fake: Callable, tmp_path: Path) -> None:
    """Closed, forgotten, or its parent killed, even in the middle of a file that hangs."""
    good = item(tmp_path, "good")
    with fake() as reader:
        process = reader_process(reader.read(good, FOUR).frames)
    assert gone(process)
    reader = GuardedReader("fake", plugins=reader.plugins)
    process = reader_process(reader.read(good, FOUR).frames)
    del reader
    gc.collect()
    assert gone(process)
    hangs = item(tmp_path, "reading_holds")
    code = f"""if 1:
        import os, sys, threading, time
        from mmllm.data.media.guard import GuardedReader
        from mmllm.data.media.limits import Limits
        from mmllm.data.media.types import MediaRef
        from mmllm.data.media.sampling import Sampling
        reader = GuardedReader("fake", Limits(timeout=1.5), [{str(tmp_path / "plugin.py")!r}])
        frames = reader.read(MediaRef("video", {good.path!r}), Sampling(frames=4)).frames
        print(int.from_bytes(frames[0, 0, :, 0].tobytes(), "little"), reader._child.process.pid, flush=True)
        if sys.argv[1] == "busy":
            read = lambda: reader.read(MediaRef("video", {hangs.path!r}), Sampling(frames=4))
            threading.Thread(target=read, daemon=True).start()
            time.sleep(0.5)
        os.kill(os.getpid(), 9) if sys.argv[1] != "ends" else None
    """
    for how in ("ends", "idle", "busy"):
        run = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        for process in map(int, run.stdout.split()):
            assert gone(process), how


def _work(reader: GuardedReader, ref: MediaRef, answers: multiprocessing.Queue) -> None:
    """What a loader's worker does."""
    frames = [reader.read(ref, FOUR).frames for _ in range(3)]
    answers.put((os.getpid(), reader_process(frames[0]), all(np.array_equal(frames[0], other) for other in frames)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_start_their_own(fake: Callable, tmp_path: Path, method: str) -> None:
    """Daemonic ones too, which may have no children of multiprocessing; the parent's goes on."""
    reader, ref = fake(), item(tmp_path, "good")
    mine = reader_process(reader.read(ref, FOUR).frames)
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    workers = [context.Process(target=_work, args=(reader, ref, answers), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    theirs = {process for _, process, _ in found}
    assert len(theirs) == 2 and mine not in theirs and all(same for _, _, same in found)
    assert all(gone(process) for process in theirs)
    assert reader_process(reader.read(ref, FOUR).frames) == mine


def test_only_settings_travel(make_video: Make) -> None:
    with GuardedReader("decord", Limits(frames=5), ["a.py"]) as reader:
        twin = pickle.loads(pickle.dumps(reader))
    assert (twin.backend, twin.limits, twin.plugins) == ("decord", Limits(frames=5), ("a.py",))


def test_an_error_in_the_converter_is_the_callers(make_video: Make) -> None:
    """It comes through as itself, and the reader is in order again."""
    ref = MediaRef("video", str(make_video(frames=40)))
    with GuardedReader() as reader:
        with pytest.raises(ZeroDivisionError):
            reader.read(ref, FOUR, lambda picture: 1 / 0)
        assert reader.read(ref, FOUR).frames.shape == (4, 48, 64, 3)


def test_a_slow_converter_does_not_count(fake: Callable, tmp_path: Path, make_video: Make) -> None:
    """Only waiting for the file does."""
    path = make_video(frames=40)
    with GuardedReader(limits=Limits(timeout=1.0)) as reader:
        reader.probe(MediaRef("video", str(path)))
        assert len(reader.read(MediaRef("video", str(path)), FOUR, lambda picture: time.sleep(0.4)).frames) == 4


def test_pictures_of_another_size_and_far_more_than_asked_for_make_no_sense() -> None:
    """More may come where a back end was given up half-way, up to all of them twice."""
    from mmllm.data.media.guard_process import Pictures, ReaderDied

    pictures = Pictures(None)
    pictures.expect([2, 4, 5, 3])
    for size in (0, 59, 61):
        with pytest.raises(ReaderDied):
            pictures.reserve(size)
    for number in range(4):
        pictures.reserve(60)[:] = bytes([number]) * 60
        pictures.placed()
    with pytest.raises(ReaderDied):
        pictures.reserve(60)
    assert pictures.at([0, 1])[:, 0, 0, 0].tolist() == [0, 1]
    assert pictures.at([3, 0])[:, 0, 0, 0].tolist() == [3, 0]
