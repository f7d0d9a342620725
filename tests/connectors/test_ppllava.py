"""What always holds of relevance and of pooling by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
)

from mmllm.connectors.common.windows import distance_from_mean, resolve_windows, window_weights, windowed_softmax_pool
from mmllm.connectors.ppllava.patch_heads import ClipHead, cosine
from mmllm.connectors.ppllava.pooling import PromptPool, PromptRelevance
from mmllm.contract.errors import UserError
from mmllm.contract.parts import NoPrompt, Site
from mmllm.contract.types import Grid, MediaSpec, PromptFeatures, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens
from mmllm.model.front_end import FrontEnd

CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION = {**CLIP, "image_size": 28, "patch_size": 14}
TEXT = {**CLIP, "vocab_size": 50, "max_position_embeddings": 30, "eos_token_id": 49, "bos_token_id": 48}


def tokens(grid: Grid, kind: str = "video", width: int = 5, relevance: bool = True, seed: int = 0) -> VisualTokens:
    """Two random clips with random scores."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(2, grid.tokens, width, generator=g)
    made = at_times(
        frame_tokens(values, MediaSpec(kind, grid.t), grid, grid.t), torch.arange(float(grid.t)).expand(2, -1)
    )
    if relevance:
        made.extras["relevance"] = (3 * torch.randn(2, grid.tokens, generator=g)).softmax(1)
    return made


def pool(given: VisualTokens, **arguments: object) -> PromptPool:
    """The part over such tokens."""
    return PromptPool(Site((given.spec,)), **arguments)


def channels_second(given: VisualTokens) -> Tensor:
    """[B, C, T, h, w]."""
    return given.as_grid().movedim(-1, 1)


# Windows


def test_equal_scores_give_the_librarys_means():
    given = tokens(Grid(4, 6, 9), relevance=False)
    theirs = nn.functional.avg_pool3d(channels_second(given), (2, 3, 3))
    torch.testing.assert_close(channels_second(pool(given, kernel=(2, 3, 3))(given)), theirs)
    for size in ((3, 4, 5), (1, 1, 1), (4, 6, 9), (6, 2, 2)):
        theirs = nn.functional.adaptive_avg_pool3d(channels_second(given), size)
        torch.testing.assert_close(channels_second(pool(given, grid=size)(given)), theirs)


@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(2, 3, 5), Grid(7, 24, 24), Grid(33, 9, 2)], ids=str)
def test_any_clip_gives_the_grid_that_was_asked_for(grid):
    given = tokens(grid)
    out = pool(given, grid=(4, 3, 3))(given)
    assert out.grid == Grid(4, 3, 3)
    assert out.values.shape == (2, 36, 5)
    assert out.values.isfinite().all()


def test_what_is_left_over_is_pooled_too():
    windows = resolve_windows((7, 1, 4), kernel=(2, 2, 3), stride=(2, 2, 2))
    assert windows.starts == ((0, 2, 4, 6), (0,), (0, 2))
    assert windows.ends == ((2, 4, 6, 7), (1,), (3, 4))
    authors = resolve_windows((7, 2, 4), kernel=(2, 2, 2), stride=(2, 2, 2), reference=True)
    assert authors.grid == (3, 1, 2)
    given = tokens(Grid(7, 1, 4))
    out = pool(given, kernel=(2, 2, 2))(given)
    assert out.grid == Grid(4, 1, 2)
    last = given.as_grid()[:, 6:, :, 2:]
    assert (out.as_grid()[:, -1, 0, -1] <= last.amax((1, 2, 3)) + 1e-6).all()


def test_windows_that_do_not_fit_name_the_axis_and_the_numbers():
    with pytest.raises(ValueError, match="rows: stride 3 is above kernel 2"):
        resolve_windows((4, 4, 4), kernel=(2, 2, 2), stride=(2, 3, 2))
    with pytest.raises(ValueError, match=r"time: no such windows, \{'size': 1, .*'kernel': 2"):
        resolve_windows((1, 4, 4), kernel=(2, 2, 2), stride=(2, 2, 2), reference=True)
    with pytest.raises(ValueError, match="columns: no such windows"):
        resolve_windows((4, 4, 2), grid=(2, 2, 3), reference=True)
    with pytest.raises(ValueError, match="give grid, or kernel and stride"):
        resolve_windows((4, 4, 4), kernel=(2, 2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        resolve_windows((4, 4, 4), grid=(0, 2, 2))


# Weights


@pytest.mark.parametrize("asked", [{"kernel": (2, 2, 3)}, {"grid": (3, 2, 4)}], ids=str)
def test_temperature_goes_from_the_mean_to_the_most_relevant_token(asked):
    given = tokens(Grid(5, 4, 6))
    windows = pool(given, **asked).windows(given.media, given.grid)
    scores = given.as_grid(given.extras["relevance"])
    flat = windowed_softmax_pool(given.as_grid(), scores, windows, 1e6)
    torch.testing.assert_close(flat, windowed_softmax_pool(given.as_grid(), None, windows, 1.0), atol=1e-5, rtol=0)
    sharp = windowed_softmax_pool(given.as_grid(), scores, windows, 1e-7)
    for t, h, w in ((0, 0, 0), (1, 1, 1), (2, 1, 1)):
        cut = tuple(slice(windows.starts[a][i], windows.ends[a][i]) for a, i in enumerate((t, h, w)))
        best = scores[1][cut].flatten().argmax()
        torch.testing.assert_close(sharp[1, t, h, w], given.as_grid()[1][cut].flatten(0, 2)[best])


def test_every_channel_stays_within_its_window():
    given = tokens(Grid(4, 4, 6))
    out = pool(given, kernel=(2, 2, 3), temperature=0.001)(given)
    high = nn.functional.max_pool3d(channels_second(given), (2, 2, 3))
    low = -nn.functional.max_pool3d(-channels_second(given), (2, 2, 3))
    assert (channels_second(out) <= high + 1e-5).all()
    assert (channels_second(out) >= low - 1e-5).all()


def test_the_order_inside_a_window_does_not_matter():
    given = tokens(Grid(2, 2, 2))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = replace(given, values=given.values[:, order], extras={"relevance": given.extras["relevance"][:, order]})
    part = pool(given, kernel=(2, 2, 2))
    torch.testing.assert_close(part(moved).values, part(given).values)


@pytest.mark.parametrize("asked", [{"kernel": (2, 2, 3)}, {"grid": (3, 3, 4)}], ids=str)
def test_pooling_and_a_linear_layer_change_places(asked):
    given, layer = tokens(Grid(5, 4, 6)), nn.Linear(5, 7)
    part = pool(given, **asked)
    torch.testing.assert_close(part(given.with_values(layer(given.values))).values, layer(part(given).values))


@pytest.mark.parametrize(
    "asked", [{"kernel": (2, 2, 3)}, {"grid": (3, 3, 4)}, {"kernel": (2, 2, 2), "stride": (1, 2, 1)}]
)
def test_positions_and_sizes_move_with_the_tokens(asked):
    given = tokens(Grid(5, 4, 6))
    part = pool(given, **asked)
    out = part(given)
    torch.testing.assert_close(out.sizes.sum(1), given.sizes.sum(1))
    scores = given.as_grid(given.extras["relevance"])
    windows = part.windows(given.media, given.grid)
    places = windowed_softmax_pool(given.as_grid(given.positions), scores, windows, 0.01).flatten(1, 3)
    torch.testing.assert_close(out.positions, places)
    assert "relevance" not in out.extras


def test_views_of_an_image_stay_apart():
    given = tokens(Grid(3, 4, 6), kind="image")
    assert pool(given, kernel=(2, 2, 3))(given).grid == Grid(3, 2, 2)
    assert pool(given, grid=(8, 2, 2))(given).grid == Grid(3, 2, 2)
    assert pool(given, kernel=(2, 2, 3), still_kernel=(1, 4, 2))(given).grid == Grid(3, 1, 3)
    assert pool(given, kernel=(2, 2, 3), still_grid=(1, 1, 2))(given).grid == Grid(1, 1, 2)


def test_bfloat16_stays_and_weights_are_float32():
    given = tokens(Grid(4, 4, 6))
    exact = pool(given, kernel=(2, 2, 3), temperature=0.001)(given).values
    half = replace(given, values=given.values.bfloat16())
    out = pool(half, kernel=(2, 2, 3), temperature=0.001)(half).values
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = pool(given, kernel=(2, 2, 3), temperature=0.001)(given).values
    assert torch.equal(again, exact)


def test_the_distance_from_the_mean_is_told():
    given = tokens(Grid(4, 4, 6))
    part = pool(given, kernel=(2, 2, 3))
    assert part.statistics() == {}
    told = []
    for temperature in (1e6, 0.01, 0.001, 1e-8):
        part.temperature = temperature
        part(given)
        told.append(float(part.statistics()["distance"]))
    assert told == sorted(told)
    assert told[0] < 1e-6
    assert told[-1] == pytest.approx(1 - 1 / 12, abs=1e-4)


@pytest.mark.parametrize(
    ("frames", "spread", "expected", "within"),
    [(1, 2.0, 0.142, 0.03), (8, 2.0, 0.021, 0.004), (32, 2.0, 0.0043, 0.0006), (32, 1.0, 0.0020, 0.0002)],
)
def test_at_the_papers_size_pooling_is_almost_flat(frames, spread, expected, within):
    """Mean distance from the mean with normal logits on 24 x 24 patches."""
    windows = resolve_windows((frames, 24, 24), kernel=(min(2, frames), 3, 3), stride=(min(2, frames), 3, 3))
    found = []
    for seed in range(8):
        logits = spread * torch.randn(1, frames * 576, generator=torch.Generator().manual_seed(seed))
        scores = logits.softmax(1).view(1, frames, 24, 24)
        found.append(float(distance_from_mean(window_weights(scores, windows, 0.01, scores.device), windows)))
    assert sum(found) / len(found) == pytest.approx(expected, abs=within)


def test_an_automatic_temperature_is_the_papers_at_its_size():
    given = tokens(Grid(2, 3, 3))
    part = pool(given, kernel=(1, 3, 3), temperature="auto")
    assert part._temperature(Grid(32, 24, 24)) == pytest.approx(0.01)
    assert part._temperature(Grid(1, 24, 24)) == pytest.approx(0.32)
    with pytest.raises(ValueError, match="above 0"):
        pool(given, kernel=(1, 3, 3), temperature=0.0)


# Relevance


def said(present: tuple[bool, ...] = (True, True), joint: int = 4, seed: int = 3) -> PromptFeatures:
    """Random prompts in the joint space."""
    ids = torch.ones(len(present), 2, dtype=torch.long)
    pooled = torch.randn(len(present), joint, generator=torch.Generator().manual_seed(seed))
    return PromptFeatures(ids, ids, pooled=pooled, present=torch.tensor(present))


def relevance(given: VisualTokens, joint: int = 4, **arguments: object) -> PromptRelevance:
    """The part over such tokens, with random weights."""
    torch.manual_seed(0)
    return PromptRelevance(Site((given.spec,), 0, None, joint), **arguments).eval()


@torch.no_grad()
def test_scores_of_a_clip_sum_to_one_and_the_tokens_pass():
    given = tokens(Grid(3, 2, 4), relevance=False)
    out = relevance(given)(given, prompt=said())
    torch.testing.assert_close(out.extras["relevance"].sum(1), torch.ones(2))
    assert out.extras["relevance"].std(1).min() > 0
    assert torch.equal(out.values, given.values)
    assert given.extras == {}
    visual, prompt = torch.randn(2, 5, 4), torch.randn(2, 4)
    torch.testing.assert_close(cosine(visual * torch.rand(2, 5, 1).add(0.1), 3 * prompt), cosine(visual, prompt))


@torch.no_grad()
def test_a_clip_without_a_prompt_has_equal_scores_and_others_are_as_alone():
    given = tokens(Grid(3, 2, 4), relevance=False)
    part = relevance(given)
    both, one = part(given, prompt=said()).extras["relevance"], part(given, prompt=said((True, False)))
    assert torch.equal(one.extras["relevance"][0], both[0])
    torch.testing.assert_close(one.extras["relevance"][1], torch.full((24,), 1 / 24))
    torch.testing.assert_close(part(given).extras["relevance"], torch.full((2, 24), 1 / 24))
    flat = pool(one, kernel=(2, 2, 2))(one).values[1]
    torch.testing.assert_close(flat, pool(given, kernel=(2, 2, 2))(given).values[1])
    alone = part(given.select(torch.tensor([1])), prompt=said().select([1])).extras["relevance"][0]
    torch.testing.assert_close(alone, both[1])


def test_without_a_prompt_scores_are_equal_whatever_the_probe_looks_at():
    torch.manual_seed(0)
    given = tokens(Grid(2, 2, 3), width=12, relevance=False)
    part = PromptRelevance(Site((given.spec,), prompt_joint=12), head="siglip", heads=3, probe_attention=True)
    asked = PromptFeatures(torch.ones(2, 1), torch.ones(2, 1), pooled=torch.randn(2, 12))
    asked.present = torch.tensor([True, False])
    scores = part(given, prompt=asked).extras["relevance"]
    assert scores[0].std() > 1e-3
    for absent in (scores[1], part(given, prompt=None).extras["relevance"][0]):
        torch.testing.assert_close(absent, torch.full((12,), 1 / 12))


def test_scores_are_float32_under_autocast():
    values, prompt = torch.randn(2, 40, 16), torch.randn(2, 16)
    exact = cosine(values, prompt)
    by_hand = torch.nn.functional.cosine_similarity(values, prompt[:, None], dim=-1)
    torch.testing.assert_close(exact, by_hand, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosine(values, prompt), exact)


def test_zero_features_and_zero_prompts_give_no_nan():
    given = tokens(Grid(2, 2, 2), relevance=False)
    given = given.with_values(torch.zeros_like(given.values).requires_grad_())
    for head, joint in (("clip", 4), ("siglip", 5)):
        part = relevance(given, joint, head=head, heads=5)
        prompt = said((True, False), joint)
        prompt.pooled[1] = 0
        out = part(given, prompt=prompt)
        assert out.extras["relevance"].isfinite().all()
        (0 * pool(out, kernel=(1, 2, 2))(out).values.sum() + 0 * out.extras["relevance"].sum()).backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in part.parameters())
    assert given.values.grad.isfinite().all()


@torch.no_grad()
def test_scores_may_be_left_to_the_windows():
    given = tokens(Grid(32, 6, 6), relevance=False)
    scored = relevance(given, normalise="window")(given, prompt=said())
    part = relevance(given)
    torch.testing.assert_close(scored.extras["relevance"].softmax(1), part(given, prompt=said()).extras["relevance"])
    lively, flat = pool(scored, kernel=(2, 3, 3), temperature=1.0), pool(scored, kernel=(2, 3, 3))
    lively(scored)
    flat(part(given, prompt=said()))
    assert lively.last_distance > 0.3 > flat.last_distance


def test_heads_that_do_not_fit_are_refused():
    given = tokens(Grid(2, 2, 2), relevance=False)
    with pytest.raises(NoPrompt, match="give it a text source"):
        relevance(given, None)
    with pytest.raises(ValueError, match="no space that it shares with an image tower"):
        PromptRelevance(Site((given.spec,), 0, 6, None))
    with pytest.raises(ValueError, match="keeps the width of 5, the text source's space has 4"):
        relevance(given, head="siglip")
    with pytest.raises(ValueError, match="only a SigLIP head"):
        relevance(given, probe_attention=True)


@torch.no_grad()
def test_head_and_scale_are_those_of_the_model_that_is_named(tmp_path):
    torch.manual_seed(1)
    pair = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)).eval()
    nn.init.normal_(pair.vision_model.post_layernorm.weight)
    pair.logit_scale.fill_(3.0)
    pair.save_pretrained(tmp_path)
    given = tokens(Grid(1, 2, 2), width=16, relevance=False)
    part = relevance(given, 12, weights=str(tmp_path))
    part.load_weights()
    pixels = torch.randn(2, 3, 28, 28)
    states = pair.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    theirs = pair.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(part.head(states[:, 0]), theirs)
    assert float(part.logit_scale) == pytest.approx(3.0)
    alone = ClipHead(Site((given.spec,), 0), width=12, weights=str(tmp_path))
    alone.load_weights()
    assert torch.equal(alone(given).values, part.head(given.values))
    with pytest.raises(UserError, match="has no such head"):
        relevance(given, 13, weights=str(tmp_path)).load_weights()
    with pytest.raises(UserError, match=r"clip_head.weights: .* has no such head"):
        ClipHead(Site((given.spec,), 0), width=13, weights=str(tmp_path)).load_weights()
    with pytest.raises(UserError, match="cannot fetch"):
        relevance(given, 12, weights=str(tmp_path / "none")).load_weights()


# All of it


@torch.no_grad()
def test_a_question_moves_what_the_model_sees():
    torch.manual_seed(0)
    section = {
        "media": {"frames": 4},
        "encoders": {"clip": {"type": "clip_bt_adapter", "config": VISION, "depth": 2}},
        "text": {"said": {"type": "clip_text", "config": {**TEXT, "projection_dim": 12}}},
        "connector": [
            {"type": "prompt_relevance", "name": "relevance", "in": ["clip"]},
            {"type": "linear", "name": "hidden", "in": ["relevance"], "width": 20, "activation": "gelu"},
            {"type": "prompt_pool", "name": "pooled", "in": ["hidden"], "kernel": [2, 2, 1], "temperature": 0.001},
            {"type": "linear", "name": "project", "in": ["pooled"]},
        ],
        "output": "project",
    }
    front = FrontEnd(section, 8).eval()
    geometry = next(iter(front.plan.geometries.values()))
    pixels = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    clip = {"spec": MediaSpec("video", 4), "times": torch.arange(4.0), "pixels": {geometry: pixels}}
    prompts = front.prompts.collate([{"said": [48, 3, 4, 49]}, {"said": [48, 7, 49]}, {}])
    visual = {"media": [clip], "pairs": [(0, 0), (0, 1), (0, 2)], "prompts": prompts}
    rows, _ = front(visual)
    first, second, none = rows.unflatten(0, (3, -1))
    assert first.shape == (4, 8)
    assert (first - second).abs().max() > 1e-4
    assert (first - none).abs().max() > 1e-4
    alone, _ = front({**visual, "pairs": [(0, 1)]})
    torch.testing.assert_close(alone, second)
    blind, _ = front({"media": [clip], "pairs": [(0, -1)]})
    torch.testing.assert_close(blind, none)
    assert float(front.parts["pooled"].statistics()["distance"]) == pytest.approx(0, abs=1e-6)
