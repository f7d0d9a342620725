"""LLaVA-ST against the authors' code: positions from the vocabulary, both packed streams, and coordinates as tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmllm.connectors.llava_st.lape import LanguageAlignedPositions
from mmllm.connectors.llava_st.packer import RegionalAttention
from mmllm.contract.grounding import AXES, Axis, Coordinates
from mmllm.contract.parts import Site
from mmllm.contract.types import Grid, MediaSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.head import Head
from mmllm.model.vocabulary import CoordinateTables, placed
from mmllm.train.targets import Targets

TABLES: dict[Axis, str] = {"time": "temporal", "height": "spatial_height", "width": "spatial_width"}
PLACEHOLDERS: dict[Axis, tuple[int, int]] = {"time": (20, 21), "height": (22, 23), "width": (24, 25)}
"""The authors' ids for a coordinate in a prompt and in an answer, in these files."""


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def as_clip(frames: Tensor, kind: str = "video") -> VisualTokens:
    """Frames [T, n, C] of square rasters as one clip."""
    side = round(frames.shape[1] ** 0.5)
    grid = Grid(len(frames), side, side)
    return frame_tokens(frames.flatten(0, 1)[None], MediaSpec(kind, len(frames)), grid, len(frames))


def tables_of(golden, first: int, sides: tuple[str, ...] = ("input", "output")) -> CoordinateTables:
    """Our tables with the file's rows; a side that the file lacks is zero."""
    sizes = {axis: len(golden[f"table_{name}_{sides[-1]}"]) for axis, name in TABLES.items()}
    width = golden[f"table_temporal_{sides[-1]}"].shape[1]
    tables = CoordinateTables(Coordinates(**sizes, first=first), width)
    for side, ours in (("input", tables.inputs), ("output", tables.outputs)):
        for axis, name in TABLES.items():
            given = golden[f"table_{name}_{side}"] if side in sides else torch.zeros_like(ours[axis])
            ours[axis].data.copy_(given)
    return tables


def project(golden, tokens: VisualTokens, name: str) -> VisualTokens:
    """Through the file's projector, a single linear layer."""
    return tokens.with_values(nn.functional.linear(tokens.values, golden[f"{name}_weight"], golden[f"{name}_bias"]))


@pytest.mark.parametrize("reference", [False, True], ids=["default", "reference"])
@pytest.mark.golden("llava_st_lape")
def test_positions_from_the_vocabulary(golden, reference):
    tables, total = tables_of(golden, 0), torch.zeros(())
    for axis, kind in (("time", "temporal"), ("height", "spatial"), ("width", "spatial")):
        places = torch.arange(tables.layout.bins(axis))
        close(0.5 ** (places[:, None] - places).abs().float(), golden[f"reparam_matrix_{kind}"])
    cases = [name.removesuffix("_vision_features") for name in golden if name.endswith("_vision_features")]
    for case in cases:
        kind = case.partition("_")[2]
        tokens = project(golden, as_clip(golden[f"{case}_vision_features"], kind), "proj")
        part = LanguageAlignedPositions(Site((tokens.spec,)), reference=reference)
        out = part(tokens, tables=tables()).by_frame()[0]
        close(out, golden[f"{case}_output"])
        total = total + (out * golden[f"{case}_grad_probe"]).sum()
    total.backward()
    for side, ours in (("input", tables.inputs), ("output", tables.outputs)):
        for axis, name in TABLES.items():
            close(ours[axis].grad, golden[f"grad_table_{name}_{side}"])


def packer(golden, tokens: VisualTokens, cell: tuple[int, int, int], block: str, heads: int) -> RegionalAttention:
    """A block with the authors' weights."""
    states = golden.under(f"packer.{block}.devide_attention.")
    width = len(states["ln_q.weight"])
    part = RegionalAttention(Site((tokens.spec,)), cell=cell, width=width, heads=heads)
    part.load_state_dict(states)
    return part


@pytest.mark.golden("llava_st_packer")
def test_packing(golden):
    settings = golden["config_raw_grid__grid1__grid2__frames_in__frames_out__ks__kt__heads"].int().tolist()
    raw, first, second, frames, slow_frames, _, _, heads = settings
    features = golden["video_features"].requires_grad_()
    clip = as_clip(features)
    assert (clip.grid.h, clip.grid.t) == (raw, frames)
    space = (1, raw // first, raw // first)
    region = packer(golden, clip, space, "token_packer", heads)(clip)
    close(region.by_frame()[0], golden["stage1_spatial_output"])
    slow = packer(golden, region, (frames // slow_frames, 1, 1), "token_packer_slow", heads)(region)
    fast = packer(golden, region, (1, first // second, first // second), "token_packer_fast", heads)(region)
    close(slow.by_frame()[0], golden["slow_output"])
    close(fast.by_frame()[0], golden["fast_output"])
    probes = ((slow, "grad_probe_slow"), (fast, "grad_probe_fast"))
    sum((stream.by_frame()[0] * golden[probe]).sum() for stream, probe in probes).backward()
    close(features.grad, golden["grad_video_features"])
    still = as_clip(golden["image_features"], "image")
    region = packer(golden, still, space, "token_packer", heads)(still)
    close(region.by_frame()[0], golden["image_stage1_output"])
    slow = packer(golden, region, (frames // slow_frames, 1, 1), "token_packer_slow", heads)(region)
    close(slow.by_frame()[0], golden["image_slow_output"])


def exact(layout: Coordinates, row: int, position: int, axis: Axis, share: float) -> tuple[list[int], list[int], float]:
    """(place, tokens on both sides, ratio) of a coordinate, as a batch has it."""
    low, high, ratio = layout.rows(axis, share)
    return [row, position], [layout.first + low, layout.first + high], ratio


def given_of(found: list) -> dict[str, Tensor]:
    """Such places as a batch's `coordinates`."""
    places, ids, ratio = zip(*found, strict=True) if found else ((), (), ())
    shape = torch.tensor(places, dtype=torch.long).reshape(-1, 2), torch.tensor(ids, dtype=torch.long).reshape(-1, 2)
    return {"places": shape[0], "ids": shape[1], "ratio": torch.tensor(ratio)}


@pytest.mark.golden("llava_st_coord_loss")
def test_places_between_bins(golden):
    table = golden["interp_table"]
    layout = Coordinates(time=len(table), first=0)
    found = [layout.rows("time", share) for share in golden["interp_positions"].tolist()]
    low, high = torch.tensor([one[0] for one in found]), torch.tensor([one[1] for one in found])
    ratio = torch.tensor([one[2] for one in found])
    assert torch.equal(low, golden["interp_floor"]) and torch.equal(high, golden["interp_ceil"])
    close(ratio, golden["interp_ratio"])
    close((1 - ratio[:, None]) * table[low] + ratio[:, None] * table[high], golden["interp_embedding"])


@pytest.mark.golden("llava_st_coord_loss")
def test_the_loss_of_coordinates(golden):
    weight = golden["lm_head_weight"]
    tables = tables_of(golden, len(weight), ("output",))
    head = Head(weight.shape[1], len(weight))
    head.load_state_dict({"weight": weight})
    head.use(tables)
    hidden, labels = golden["hidden_states"].requires_grad_(), golden["labels"].clone()
    for name in ("logits", "inference_logits"):
        close(head(hidden), golden[name])
    found = []
    for axis, name in TABLES.items():
        for row, own in enumerate(labels):
            shares = iter(golden[f"sample{row}_{name}_output_locations"].tolist())
            for position in (own == PLACEHOLDERS[axis][1]).nonzero()[:, 0].tolist():
                place, ids, ratio = exact(tables.layout, row, position, axis, next(shares))
                found.append((place, ids, ratio))
                labels[row, position] = ids[ratio >= 0.5]
            assert next(shares, None) is None
    targets = Targets.of({"labels": labels, "visual": {"coordinates": given_of(found)}})
    sums = []
    for row in range(len(labels)):
        wanted = targets.at((slice(row, row + 1), slice(1, None)))
        scored = wanted.ids != -100
        own, states = wanted.at(scored), hidden[row : row + 1, :-1][scored]

        def score(logits: Tensor, rows: slice, own: Targets = own) -> dict[str, Tensor]:
            return {"sum": -own.log_probs(logits, rows).sum()}

        sums.append(head(states, score)["sum"] / int(scored.sum()))
    close(torch.stack(sums), golden["loss_per_sample"])
    close(sum(sums), golden["loss_sum_over_batch"])
    sum(sums).backward()
    close(hidden.grad, golden["grad_hidden_states"])
    close(head.weight.grad, golden["grad_lm_head"])
    for axis, name in TABLES.items():
        close(tables.outputs[axis].grad, golden[f"grad_table_{name}_output"])


@pytest.mark.golden("llava_st_inputs_embeds")
def test_what_enters_the_llm(golden):
    table, ids = golden["embed_tokens_weight"], golden["input_ids"].clone()
    tables = tables_of(golden, len(table))
    clip = project(golden, as_clip(golden["vision_features"]), "projector")
    clip = LanguageAlignedPositions(Site((clip.spec,)))(clip, tables=tables())
    heads, side = 2, clip.grid.h
    region = packer(golden, clip, (1, 3, 3), "token_packer", heads)(clip)
    (fast_start, slow_start), (fast_end, slow_end) = _ends(ids[0], (13, 16)), _ends(ids[0], (14, 17))
    slow_frames = (slow_end - slow_start + 1) // (side // 3) ** 2
    fast = packer(golden, region, (1, 3, 3), "token_packer_fast", heads)(region)
    slow = packer(golden, region, (len(clip.times[0]) // slow_frames, 1, 1), "token_packer_slow", heads)(region)
    found, inputs = [], []
    for axis, name in TABLES.items():
        for kind, side_name in zip(PLACEHOLDERS[axis], ("input", "output"), strict=True):
            positions = (ids[0] == kind).nonzero()[:, 0].tolist()
            shares = golden[f"{name}_{side_name}_locations"].tolist()
            for position, share in zip(positions, shares, strict=True):
                found.append(exact(tables.layout, 0, position, axis, share))
                inputs.append((axis, side_name, position))
                ids[0, position] = found[-1][1][0]
    plain = ids.masked_fill(tables.rows_of(ids) >= 0, 0)
    embeds = placed(nn.functional.embedding(plain, table), ids, tables(), given_of(found))
    lost = embeds.clone()
    embeds[0, fast_start : fast_end + 1] = fast.values[0]
    for made in (embeds, lost):
        made[0, slow_start : slow_end + 1] = slow.values[0]
    close(embeds, golden["inputs_embeds_fixed"])
    # The authors' code loses the fast stream, and where a prompt's box is horizontally.
    for axis, side_name, position in inputs:
        if (axis, side_name) == ("width", "input"):
            lost[0, position] = table[PLACEHOLDERS[axis][0]]
    close(lost, golden["inputs_embeds_reference"])


def _ends(ids: Tensor, marks: tuple[int, int]) -> list[int]:
    return [int((ids == mark).nonzero()[0, 0]) for mark in marks]


def test_axes_are_in_the_authors_order():
    assert AXES == ("time", "height", "width")
