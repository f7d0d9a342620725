"""Formats that carry their media: Parquet, saved datasets and WebDataset shards become the same conversations."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.samples import llava
from PIL import Image

from mmllm.contract.errors import UserError
from mmllm.data.records.conversations import open_source

CLIP = Path(__file__).resolve().parents[2] / "assets" / "tablet_drawing.mp4"


def picture(value: int) -> np.ndarray:
    """A picture of one grey, 6 x 8 pixels."""
    return np.full((6, 8, 3), value, np.uint8)


def png(value: int) -> bytes:
    """It as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(picture(value)).save(file, "png")
    return file.getvalue()


# --- Parquet


@pytest.fixture
def parquet(tmp_path):
    """`parquet(rows, name)`: rows as a Parquet file, opened."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    def make(rows: list[dict[str, Any]], name: str = "train.parquet") -> Any:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return open_source(path, spill=tmp_path / "spill")

    return make


def test_parquet_with_bytes(parquet):
    turns = [{"user": "<image>\nWhich?", "assistant": "1"}, {"user": "Sure?", "assistant": "Yes"}]
    rows = [
        {"images": [{"bytes": png(number), "path": None}, {"bytes": png(100), "path": "b.png"}], "texts": turns}
        for number in range(5)
    ]
    rows[0]["texts"] = [{"user": "Which?", "assistant": "0"}]
    rows[4] = {"images": [], "texts": turns[1:]}
    source = parquet(rows)
    assert len(source) == 5
    first, second, *_ = source[0].messages[0]["content"]
    assert first["type"] == second["type"] == "image"
    assert (first["image"] == picture(0)).all()
    assert (second["image"] == picture(100)).all()
    assert [message["content"] for message in source[4].messages] == ["Sure?", "Yes"]
    with pytest.raises(UserError, match=r"train\.parquet:row 3:image: more media than placeholders: 1 of 2"):
        source[2]
    again = pickle.loads(pickle.dumps(source))
    assert (again[0].messages[0]["content"][0]["image"] == picture(0)).all()


def test_parquet_videos_are_written_once(parquet, tmp_path):
    clip = CLIP.read_bytes()
    message = {"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A hand."}]}
    rows = [{"id": str(number), "video": clip, "messages": [message, answer]} for number in range(2)]
    source = parquet(rows)
    paths = {source[number].messages[0]["content"][0]["path"] for number in (0, 1)}
    assert [Path(path).read_bytes() for path in paths] == [clip]
    assert Path(next(iter(paths))).is_relative_to(tmp_path / "spill")
    assert source[1].messages[0]["content"][1] == {"type": "text", "text": "What?"}
    assert source[1].messages[1] == {"role": "assistant", "content": "A hand."}
    assert not list((tmp_path / "spill").rglob("*.part"))


def test_parquet_preference_pairs(parquet):
    pair = {"prompt": "Which?", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b", "image": png(1)}
    sample = parquet([pair])[0]
    assert (sample.messages[0]["content"][0]["image"] == picture(1)).all()
    assert sample.fields == {"chosen": "a", "rejected": "b"}


def test_parquet_folders_and_broken_bytes(parquet, tmp_path):
    record = {"conversations": [{"from": "human", "value": "x"}], "image": {"bytes": png(3)[:40], "path": "x.png"}}
    parquet([record], "set/train-0.parquet")
    parquet([{**record, "image": {"bytes": None, "path": "p.png"}}], "set/train-1.parquet")
    source = open_source(tmp_path / "set", spill=tmp_path / "spill")
    assert len(source) == 2
    assert source[1].messages[0]["content"][0]["path"] == str(tmp_path / "p.png")
    with pytest.raises(UserError, match=r"set:row 1:image: .*damaged|set:row 1:image: not an image"):
        source[0]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read"):
        open_source(tmp_path / "bad.parquet", spill=tmp_path / "spill")


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": f"q{number}"}]} for number in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved", spill=tmp_path / "spill")
    assert [sample.messages[0]["content"] for sample in source] == ["q0", "q1", "q2"]


@pytest.mark.parametrize(("library", "name"), [("datasets", "a.parquet"), ("webdataset", "a.tar")])
def test_a_library_that_is_absent_is_named_with_its_line(tmp_path, monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.tariterators", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf'library {library}\. Try: pip install "mmllm\[data\]"'):
        open_source(tmp_path / name)


# --- WebDataset


def shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    record = llava(0, "<image>\n<image>\nWhich?")
    shard(
        tmp_path / "s-00.tar",
        {
            "__index__.json": b"{}",
            "a/000.left.png": png(1),
            "a/000.right.png": png(2),
            "a/000.json": json.dumps(record).encode(),
            "a/001.png": png(3),
            "a/001.txt": b"A grey square.\n",
        },
    )
    shard(tmp_path / "s-01.tar", {"002.mp4": CLIP.read_bytes(), "002.json": json.dumps(llava(2)).encode()})
    source = open_source(tmp_path / "s-{00..01}.tar", spill=tmp_path / "spill")
    assert len(source) == 3
    last, first, second = source[2], source[0], source[1]
    assert [float(entry["image"].mean()) for entry in first.messages[0]["content"][:2]] == [1.0, 2.0]
    assert (first.id, last.id, second.id) == ("s0", "s2", "a/001")
    assert second.messages[0]["content"][0]["image"].mean() == 3
    assert second.messages[1]["content"] == "A grey square."
    clip = last.messages[0]["content"][0]
    assert Path(clip["path"]).read_bytes() == CLIP.read_bytes()
    assert (Path(clip["path"]).suffix, clip["placeholder"]) == (".mp4", "<image>")
    assert pickle.loads(pickle.dumps(source))[2] == last
    assert len(open_source(tmp_path, spill=tmp_path / "spill")) == 3


def test_webdataset_errors_name_shard_and_key(tmp_path):
    pytest.importorskip("webdataset")
    source = open_source(shard(tmp_path / "s.tar", {"7.json": b"{", "8.png": png(1)}))
    for index, says in ((0, "s.tar:7:json: not JSON"), (1, "s.tar:8:conversations: missing")):
        with pytest.raises(UserError) as error:
            source[index]
        assert says in str(error.value)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as file:
        file.add(CLIP, "1.mp4")
    cut = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(cut[: len(cut) // 2 - 4000])
    for name in ("z.tar", "c.tar"):
        with pytest.raises(UserError, match="not a readable tar shard"):
            open_source(tmp_path / name)
