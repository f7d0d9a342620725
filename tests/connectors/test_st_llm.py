"""What always holds of local frames with a residual of the whole, and of a Q-Former on every frame."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from mmllm.connectors.st_llm.global_local import GlobalLocal, MeanFrames, local_indices
from mmllm.connectors.st_llm.qformer import QFormer
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def clips(frames: int, batch: int = 2, width: int = 8, seed: int = 0) -> VisualTokens:
    """Random clips of six tokens per frame, one frame per second, whose patches know where they are."""
    grid = Grid(frames, 2, 3)
    values = torch.randn(batch, grid.tokens, width, generator=torch.Generator().manual_seed(seed))
    tokens = frame_tokens(values, MediaSpec("video", frames), grid, frames)
    tokens = at_times(tokens, torch.arange(float(frames)).expand(batch, -1))
    tokens.sources = torch.arange(grid.tokens).expand(batch, -1)
    return tokens


def part(tokens: VisualTokens, residual: bool = True, **arguments: object) -> GlobalLocal:
    """The part over such tokens, with a residual or as it starts."""
    torch.manual_seed(0)
    made = GlobalLocal(Site((tokens.spec,)), **{"frames": 4, **arguments})
    if residual:
        nn.init.normal_(made.up.weight)
        nn.init.normal_(made.up.bias)
    return made


def test_at_first_the_local_frames_alone():
    tokens = clips(10)
    out = part(tokens, residual=False)(tokens)
    chosen = local_indices(10, 4)
    assert torch.equal(out.by_frame(), tokens.by_frame()[:, chosen])
    assert out.times[0].tolist() == [float(index) for index in chosen]
    assert torch.equal(out.positions[..., 0].unflatten(1, (4, 6))[0, :, 0], out.times[0])
    assert out.sources.unflatten(1, (10, 6))[0, :, 0].tolist() == [-1, 0, -1, 6, -1, -1, 12, -1, -1, 18]


@torch.no_grad()
def test_other_frames_count_through_the_mean_alone():
    tokens = clips(10)
    made, rest = part(tokens), [index for index in range(10) if index not in local_indices(10, 4)]
    out = made(tokens).values
    moved = clips(10)
    frames = tokens.by_frame().clone()
    frames[:, rest] = frames[:, rest[::-1]]
    moved.values = frames.flatten(1, 2)
    torch.testing.assert_close(made(moved).values, out)
    frames[:, rest] += 1
    moved.values = frames.flatten(1, 2)
    assert (made(moved).values - out).abs().max() > 0.01


def test_gradients_reach_all_frames():
    tokens = clips(10)
    tokens.values.requires_grad_()
    part(tokens, hidden=32)(tokens).values.square().sum().backward()
    assert tokens.values.grad.abs().sum(-1).gt(0).all()


def test_every_length_has_its_own_frames():
    for wanted in range(1, 65):
        for frames in range(1, 300):
            found = local_indices(frames, wanted)
            assert len(found) == wanted and max(found) < frames
            if frames >= wanted:
                assert len(set(found)) == wanted
    long, short = clips(64), clips(20)
    made = part(long, frames=16)
    made(long)
    assert made(short).times[0].tolist() == [float(index) for index in local_indices(20, 16)]


def test_frames_that_are_not_there():
    tokens = clips(3)
    assert part(tokens, frames=8)(tokens).times[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="8 of 3 frames: frame 3 is not there"):
        part(tokens, frames=8, reference=True).output_spec(tokens.spec)


def test_the_mean_is_the_mean():
    tokens = clips(5)
    out = MeanFrames(Site((tokens.spec,)))(tokens)
    torch.testing.assert_close(out.values, tokens.by_frame().mean(1))
    assert out.sizes.eq(5).all() and out.times.eq(2).all()
    assert torch.equal(out.sources[0], torch.arange(6).repeat(5))


# Q-Former


def prompts(batch: int = 2) -> PromptFeatures:
    """Two prompts of different length, padded."""
    ids, mask = torch.zeros(batch, 5, dtype=torch.long), torch.zeros(batch, 5, dtype=torch.long)
    for row in range(batch):
        ids[row, : 3 + row % 3], mask[row, : 3 + row % 3] = torch.arange(1, 4 + row % 3) + row, 1
    return PromptFeatures(ids, mask, present=torch.ones(batch, dtype=torch.bool))


def qformer(tokens: VisualTokens, **arguments: object) -> QFormer:
    """A small one over such tokens."""
    torch.manual_seed(1)
    config = {**SMALL, "vocab_size": 20}
    return QFormer(Site((tokens.spec,)), config=config, queries=3, **arguments).eval()


@torch.no_grad()
def test_each_frame_is_read_alone_and_with_the_same_prompt():
    tokens = clips(4)
    made, said = qformer(tokens), prompts()
    out = made(tokens, prompt=said)
    assert out.spec == made.output_spec(tokens.spec)
    assert out.sizes.eq(2).all()
    for frame in range(4):
        one = frame_tokens(tokens.by_frame()[:, frame], MediaSpec("video", 1), Grid(1, 2, 3), 1)
        torch.testing.assert_close(made(one, prompt=said).values, out.by_frame()[:, frame])
    for row in range(2):
        alone = made(tokens.row(row), prompt=said.select([row]))
        torch.testing.assert_close(alone.values, out.values[row : row + 1])
    other = prompts()
    other.ids[0, 1] += 5
    again = made(tokens, prompt=other).values
    assert (again - out.values)[0].abs().max() > 1e-4
    torch.testing.assert_close(again[1], out.values[1])


@torch.no_grad()
def test_an_absent_prompt_says_nothing():
    tokens, said = clips(2), prompts()
    made = qformer(tokens)
    said.present[0] = False
    out = made(tokens, prompt=said).values
    said.ids[0] += 3
    torch.testing.assert_close(made(tokens, prompt=said).values, out)


@torch.no_grad()
def test_cls_tokens_are_read_before_the_patches():
    tokens = clips(2)
    tokens.extras["cls"] = torch.randn(2, 2, 1, 8)
    made = qformer(tokens, guided=False, cls_layer=-1)
    assert made.needs().cls == (-1,) and not made.needs().prompt
    out = made(tokens).values
    tokens.extras["cls"] = tokens.extras["cls"] + 1
    tokens.extras["cls"][..., 0] -= 3
    assert (made(tokens).values - out).abs().max() > 1e-4


def test_a_frozen_one_has_no_dropout():
    tokens, said = clips(2), prompts()
    made = qformer(tokens).train()
    assert made.tower.training
    made.requires_grad_(False).train()
    assert not made.tower.training
    assert torch.equal(made(tokens, prompt=said).values, made(tokens, prompt=said).values)


def test_weights_of_a_published_model(tmp_path):
    torch.manual_seed(3)
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "model_type": "llama", "vocab_size": 11, "num_key_value_heads": 2}
    config = InstructBlipConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        qformer_config={**SMALL, "vocab_size": 20, "encoder_hidden_size": 8},
        text_config=text,
        num_query_tokens=3,
    )
    whole = InstructBlipForConditionalGeneration(config).eval()
    nn.init.normal_(whole.query_tokens)
    nn.init.normal_(whole.vision_model.post_layernorm.weight)
    whole.save_pretrained(tmp_path)
    tokens, said = clips(2), prompts()
    tokens.extras["cls"] = torch.randn(2, 2, 1, 8)
    made = qformer(tokens, weights=str(tmp_path), cls_layer=-1)
    made.norm.eps = whole.vision_model.post_layernorm.eps
    made.load_weights()
    with torch.no_grad():
        frames = torch.cat([tokens.extras["cls"], tokens.by_frame()], dim=2).flatten(0, 1)
        ids, mask = (value.repeat_interleave(2, dim=0) for value in (said.ids, said.mask))
        theirs = whole.qformer(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(4, 3, dtype=torch.long), mask], dim=1),
            query_embeds=whole.query_tokens.expand(4, -1, -1),
            encoder_hidden_states=whole.vision_model.post_layernorm(frames),
        ).last_hidden_state[:, :3]
        torch.testing.assert_close(made(tokens, prompt=said).values, theirs.unflatten(0, (2, 2)).flatten(1, 2))
    with pytest.raises(UserError, match="has no such Q-Former"):
        qformer(clips(2, width=6), weights=str(tmp_path)).load_weights()
    with pytest.raises(UserError, match="cannot fetch the weights"):
        qformer(tokens, weights=str(tmp_path / "nothing")).load_weights()
    with pytest.raises(ValueError, match="config of a Q-Former"):
        QFormer(Site((tokens.spec,)), config={**SMALL, "num_attention_heads": 3})
