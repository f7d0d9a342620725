"""The bank: long clips in pieces, kept features beside fresh ones."""

from __future__ import annotations

import pytest
import torch

from mmllm.contract.types import MediaSpec, Needs
from mmllm.model import encoder_bank as bank_module
from mmllm.model.chunks import encode_in_chunks
from mmllm.model.encoder_bank import EncoderBank

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = {"type": "clip", "config": {**SMALL, "image_size": 28, "patch_size": 14}}


def clip(bank: EncoderBank, frames: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    geometries = {encoder.geometry for encoder in bank.encoders.values()}
    pixels = {
        g: torch.randint(0, 256, (frames, 3, g.height, g.width), dtype=torch.uint8, generator=generator)
        for g in geometries
    }
    return {"spec": MediaSpec("video", frames), "times": torch.arange(frames).float(), "pixels": pixels}


@pytest.fixture
def bank() -> EncoderBank:
    torch.manual_seed(0)
    return EncoderBank({"clip": CLIP, "few": {**CLIP, "frames": 5}}).eval().requires_grad_(False)


@pytest.mark.parametrize("at_once", [1, 3, 7, 10])
def test_pieces_are_the_whole(bank, at_once):
    encoder, media = bank.encoders["clip"], MediaSpec("video", 10)
    pixels = torch.stack([clip(bank, 10, seed)["pixels"][encoder.geometry] for seed in (1, 2)])
    needs = Needs()
    with torch.no_grad():
        whole, parts = encoder(pixels, media, needs), encode_in_chunks(encoder, pixels, media, needs, at_once)
    assert parts.spec == whole.spec
    torch.testing.assert_close(parts.values, whole.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.positions, whole.positions)


def test_a_long_clip_goes_in_pieces(bank, monkeypatch):
    media, clips = MediaSpec("video", 10), [clip(bank, 10, seed) for seed in (1, 2)]
    whole = bank(clips, media, {}, {"clip", "few"})
    monkeypatch.setattr(bank_module, "FRAMES_AT_ONCE", 6)
    seen: list[int] = []
    bank.encoders["clip"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    pieces = bank(clips, media, {}, {"clip", "few"})
    assert seen == [3, 3, 3, 1]
    for name in ("clip", "few"):
        torch.testing.assert_close(pieces[name].values, whole[name].values, atol=1e-6, rtol=0)
        torch.testing.assert_close(pieces[name].times, whole[name].times)


def test_an_encoder_of_fewer_frames_sees_evenly_spaced_ones_and_their_times(bank):
    media, clips = MediaSpec("video", 10), [clip(bank, 10, seed) for seed in (1, 2)]
    clips[1]["times"] = clips[1]["times"] * 3 + 1
    seen: list[torch.Tensor] = []
    bank.encoders["few"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = bank(clips, media, {}, {"few"})["few"]
    (pixels,) = seen
    for row, medium in enumerate(clips):
        whole = medium["pixels"][bank.encoders["few"].geometry]
        assert torch.equal(pixels[row], whole[[0, 2, 4, 6, 8]])
    assert tokens.times.tolist() == [[0, 2, 4, 6, 8], [1, 7, 13, 19, 25]]
    seconds = tokens.by_frame(tokens.positions)[..., 0]
    assert torch.equal(seconds, tokens.times[..., None].expand_as(seconds))


def test_kept_and_fresh_clips_in_one_group(bank):
    media, clips = MediaSpec("video", 10), [clip(bank, 10, seed) for seed in (1, 2, 3)]
    whole = bank(clips, media, {}, {"clip"})["clip"]
    kept: dict[str, dict] = {}
    bank.keep = lambda key, medium, tokens: kept.update({key: tokens})
    for index, medium in enumerate(clips):
        medium["keys"] = {"clip": f"key {index}"}
    bank([clips[1]], media, {}, {"clip"})
    assert list(kept) == ["key 1"]
    clips[1] = {"spec": media, "times": clips[1]["times"], "pixels": {}, "features": {"clip": kept["key 1"]}}
    mixed = bank(clips, media, {}, {"clip"})["clip"]
    assert mixed.spec == whole.spec
    for name in ("values", "positions", "sizes", "times"):
        torch.testing.assert_close(getattr(mixed, name), getattr(whole, name), atol=1e-6, rtol=0)
    assert sorted(kept) == ["key 0", "key 1", "key 2"]
