"""The disk cache: complete or absent, bounded, shared by processes that may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmllm.data.media.cache import ABANDONED, UNFINISHED, Digests, DiskCache, key_of


def entry(value: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), value), "b": torch.arange(3)}


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    assert cache.get(key_of("x")) is None
    cache.put(key_of("x"), entry(2.5))
    found = cache.get(key_of("x"))
    assert torch.equal(found["a"], torch.full((1000,), 2.5)) and found["b"].tolist() == [0, 1, 2]
    assert (cache.rate.hits, cache.rate.misses) == (1, 1)
    assert str(cache.rate) == "1 of 2 (50%)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32])
def test_number_formats_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = DiskCache(tmp_path)
    cache.put("k" * 64, {"a": torch.arange(5).to(dtype)})
    assert cache.get("k" * 64)["a"].dtype == dtype


def test_a_damaged_entry_counts_as_absent(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    key = key_of("x")
    cache.put(key, entry(1.0))
    path = cache.path(key)
    path.write_bytes(path.read_bytes()[:100])
    assert cache.get(key) is None
    assert key not in cache
    cache.put(key, entry(1.0))
    assert cache.get(key)["a"].sum() == 1000


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=20 * 4300)
    keys = [key_of(i) for i in range(30)]
    for place, key in enumerate(keys):
        cache.put(key, entry(float(place)))
        when = time.time() - 10_000 + place * 100
        if key in cache:
            os.utime(cache.path(key), (when, when))
        if place == 15:
            assert cache.get(keys[3]) is not None  # used again: younger than all others now
    cache.evict()
    assert cache.size() <= 20 * 4300
    assert keys[3] in cache
    assert keys[0] not in cache
    assert keys[-1] in cache


def test_abandoned_files_are_swept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=10**9)
    cache.put(key_of("x"), entry(1.0))
    old, young = tmp_path / "aa" / f"1{UNFINISHED}", tmp_path / "aa" / f"2{UNFINISHED}"
    old.parent.mkdir(exist_ok=True)
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    cache.evict()
    assert not old.exists() and young.exists()


WRITER = """
import sys, torch
from pathlib import Path
from mmllm.data.media.cache import DiskCache, key_of
cache = DiskCache(Path(sys.argv[1]), limit=40_000_000)
torch.set_num_threads(1)
print("ready", flush=True)
for turn in range(10_000):
    for item in range(16):
        cache.put(key_of(item), {"a": torch.full((200_000,), float(item)), "n": torch.tensor(item)})
"""


def test_two_writers_and_a_kill_leave_valid_entries(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    cache, seen = DiskCache(tmp_path), 0
    end = time.time() + 1.5
    while time.time() < end:  # reading while both write
        for item in range(16):
            found = cache.get(key_of(item))
            seen += found is not None
            assert found is None or bool((found["a"] == item).all())
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert seen > 0
    complete = list(tmp_path.glob("*/*.safetensors"))
    assert complete
    for item in range(16):
        found = cache.get(key_of(item))
        assert found is None or (int(found["n"]) == item and bool((found["a"] == item).all()))
    assert list(tmp_path.glob("*/*.safetensors")) == complete  # none was thrown out as damaged


def test_a_file_is_hashed_once_and_again_after_a_change(tmp_path: Path) -> None:
    file, digests = tmp_path / "clip.mp4", Digests(tmp_path / "digests.sqlite")
    file.write_bytes(b"one")
    first = digests(str(file))
    assert digests(str(file)) == first
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(b"one")
    assert digests(str(copy)) == first  # the content counts, not the name
    file.write_bytes(b"two")
    assert digests(str(file)) != first
    again = Digests(tmp_path / "digests.sqlite")  # another process
    assert again(str(file)) == digests(str(file))


def test_a_folder_of_frames_is_its_files(tmp_path: Path) -> None:
    folder, digests = tmp_path / "frames", Digests(tmp_path / "digests.sqlite")
    folder.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (folder / name).write_bytes(name.encode())
    first = digests(str(folder))
    (folder / "3.jpg").write_bytes(b"3")
    assert digests(str(folder)) != first
