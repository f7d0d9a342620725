"""MERV's fusion and projectors: what must hold whatever the weights are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.tiny import frames, tiny_model, tiny_processor, tiny_recipe, write_video

from mmllm.checks.summary import walk
from mmllm.cli import main
from mmllm.config.recipe import load
from mmllm.contract import registry
from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Part, Site
from mmllm.contract.types import Grid, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import at_times, frame_tokens
from mmllm.model.blueprint import Blueprint

PROJECTORS = {
    "pool": lambda t, h, w: {"grid": (t, h, w)},
    "conv3d_pool": lambda t, h, w: {"grid": (t, h, w), "still_grid": (t, h, w), "width": 8},
    "c_abstractor": lambda t, h, w: {"grid": (h, w), "width": 8},
    "attentive_pool": lambda t, h, w: {"grid": (h, w)},
}
GRID = Grid(2, 3, 2)
SUMS = ("cross_attentive_fusion", "static_fusion", "mean_fusion")


def tokens(seed: int, grid: Grid = GRID, width: int = 8, batch: int = 3) -> VisualTokens:
    """Random tokens on a grid, a frame a second, gradients wanted."""
    values = torch.randn(batch, grid.tokens, width, generator=torch.Generator().manual_seed(seed))
    made = frame_tokens(values.requires_grad_(), MediaSpec("video", grid.t), grid, grid.t)
    return at_times(made, torch.arange(float(grid.t)).expand(batch, -1))


def part(name: str, inputs: list[VisualTokens], **arguments: object) -> Part:
    """A connector over such tokens, its random weights large enough to matter."""
    torch.manual_seed(0)
    made = registry.find("connector", name)(Site(tuple(given.spec for given in inputs), 8), **arguments)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Equal to a tolerance."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SUMS)
def test_weights_sum_to_one_and_say_what_was_mixed(name):
    inputs = [tokens(seed) for seed in range(3)]
    out = part(name, inputs)(*inputs)
    weights = out.extras["fusion"]
    assert weights.shape == (3, 3)
    close(weights.sum(1), torch.ones(3))
    assert (weights > 0).all()
    mixed = torch.einsum("be,ebtd->btd", weights, torch.stack([given.values for given in inputs]))
    close(out.values, mixed)
    assert torch.equal(out.positions, inputs[0].positions)


def test_each_clip_has_its_own_weights_and_only_there():
    inputs = [tokens(seed) for seed in range(3)]
    own = part("cross_attentive_fusion", inputs)(*inputs).extras["fusion"]
    assert (own[0] - own[1]).abs().max() > 0.05
    static = part("static_fusion", inputs)(*inputs).extras["fusion"]
    assert torch.equal(static[0], static[1])


@pytest.mark.parametrize("keys", [{}, {"keys": "flat", "tokens": 12}, {"attn_dim": None}])
def test_encoders_in_another_order_have_their_weights_in_that_order(keys):
    inputs = [tokens(seed) for seed in range(4)]
    fusion = part("cross_attentive_fusion", inputs, **keys)
    order = [2, 0, 3, 1]
    first, second = fusion(*inputs), fusion(*[inputs[index] for index in order])
    close(second.extras["fusion"], first.extras["fusion"][:, order])
    close(second.values, first.values)


@pytest.mark.parametrize("attn_dim", [6, 8])  # 8 = the width: torch packs the three matrices
@pytest.mark.parametrize("options", [{}, {"positions": True}, {"keys": "flat", "tokens": 12}])
def test_the_cheap_form_equals_the_authors_in_values_and_gradients(attn_dim, options):
    options = {"attn_dim": attn_dim, **options}
    results = []
    for reference in (True, False):
        inputs = [tokens(0), tokens(1, Grid(1, 1, 1)), tokens(2)]
        fusion = part("cross_attentive_fusion", inputs, reference=reference, **options)
        if reference:
            weights = {name: value.detach() * 0.3 for name, value in fusion.attention.state_dict().items()}
        fusion.load_authors(weights)
        out = fusion(*inputs)
        (out.values.square().sum() + (out.extras["fusion"][:, 0] * 3).sum()).backward()
        results.append([out.values, out.extras["fusion"], *(given.values.grad for given in inputs)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 2e-5)
    assert results[0][1].std() > 0.01


def test_gradients_of_the_mixture_equal_those_of_its_formula():
    from mmllm.connectors.merv.attention import Mixture, blend

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator) for size in [(4,), (3,), *[(2, 5, 4)] * 3]]
    upstream = torch.randn(2, 5, 4, generator=generator)

    def formula(query, own, *streams):
        means = torch.stack([stream.mean(1) for stream in streams], dim=1)
        weights = (means @ query + own).softmax(1)
        return blend(list(streams), weights), weights

    gradients = []
    for mixture in (Mixture.apply, formula):
        leaves = [value.clone().requires_grad_() for value in inputs]
        values, weights = mixture(*leaves)
        gradients.append(torch.autograd.grad((values * upstream).sum() + 3 * weights[:, 1].sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    leaves = [value.clone().requires_grad_(index != 3) for index, value in enumerate(inputs)]
    Mixture.apply(*leaves)[0].sum().backward()  # a stream that needs no gradient gets none
    assert [leaf.grad is None for leaf in leaves] == [False, False, False, True, False]


def test_only_what_matters_is_stored():
    inputs = [tokens(seed, width=4096, grid=Grid(1, 1, 2), batch=1) for seed in range(4)]
    with torch.device("meta"):
        made = registry.find("connector", "cross_attentive_fusion")
        site = Site(tuple(given.spec for given in inputs), 4096)
        sizes = [sum(p.numel() for p in made(site, reference=form).parameters()) for form in (False, True)]
    assert sizes == [4096, 44_055_552]


def test_both_forms_start_with_the_same_spread():
    from mmllm.connectors.merv.attention import collapse

    inputs = tuple(tokens(seed, width=96).spec for seed in range(2))
    for attn_dim in (64, 96):
        made = registry.find("connector", "cross_attentive_fusion")
        torch.manual_seed(1)
        theirs = torch.stack(
            [
                collapse(made(Site(inputs, 8), attn_dim=attn_dim, reference=True).attention.state_dict())[0]
                for _ in range(40)
            ]
        )
        ours = torch.stack([made(Site(inputs, 8), attn_dim=attn_dim).attention.query for _ in range(40)])
        assert float(ours.detach().std() / theirs.detach().std()) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("grid", [Grid(2, 3, 2), Grid(1, 1, 1)])
def test_one_encoder_is_the_identity(name, grid):
    given = tokens(0, grid)
    out = part(name, [given])(given)
    assert torch.equal(out.values, given.values)
    assert torch.equal(out.extras["fusion"], torch.ones(3, 1))


@pytest.mark.parametrize("reference", [False, True])
def test_a_stream_of_one_token_stands_for_all_places(reference):
    inputs = [tokens(1, Grid(1, 1, 1)), tokens(0)]
    repeated = [inputs[1].with_values(inputs[0].values.expand(-1, 12, -1)), inputs[1]]
    fusion = part("cross_attentive_fusion", inputs, attn_dim=8, reference=reference)
    first, second = fusion(*inputs), fusion(*repeated)
    close(first.values, second.values)
    assert first.grid == inputs[1].grid
    assert torch.equal(first.positions, inputs[1].positions)


def test_softmax_is_in_float32_and_the_tokens_keep_their_dtype():
    inputs = [tokens(seed) for seed in range(2)]
    half = [replace(given, values=given.values.detach().bfloat16().requires_grad_()) for given in inputs]
    fusion = part("cross_attentive_fusion", inputs).bfloat16()
    out = fusion(*half)
    assert out.values.dtype == torch.bfloat16
    assert out.extras["fusion"].dtype == torch.float32
    close(out.extras["fusion"].sum(1), torch.ones(3))
    out.values.sum().backward()
    assert {given.values.grad.dtype for given in half} == {torch.bfloat16}
    assert fusion.attention.query.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*SUMS, "channel_concat"])
def test_streams_that_do_not_fit_are_named(name):
    site = [tokens(0), tokens(1)]
    made = part(name, site)
    good = site[0].spec
    for bad, says in (
        (TokenSpec(good.media, 12, 8, Grid(2, 2, 3)), "stream 2 is on a grid of 2x2x3, stream 1 is on a grid of 2x3x2"),
        (TokenSpec(good.media, 12, 9, Grid(2, 3, 2)), "stream 2 has width 9, stream 1 has 8"),
        (TokenSpec(good.media, 7, 8), "stream 2 is 7 tokens without a grid"),
    ):
        with pytest.raises(ValueError, match=says):
            made.output_spec(good, bad)


def test_a_recipe_whose_grids_differ_names_its_streams():
    recipe = load("nano/merv", ["model.connector.shape_grid.grid=8,2,3"])
    with pytest.raises(UserError) as error:
        Blueprint.of(recipe)
    for word in ("model.connector.fusion", "shape_stream: 48 tokens", "stream 2 is on a grid of 8x2x3"):
        assert word in str(error.value)


def test_flat_keys_are_for_one_number_of_tokens():
    site = [tokens(0), tokens(1)]
    with pytest.raises(ValueError, match="tokens: set this"):
        part("cross_attentive_fusion", site, keys="flat")
    made = part("cross_attentive_fusion", site, keys="flat", tokens=6)
    with pytest.raises(ValueError, match="flat keys of 6 tokens, a stream has 12"):
        made.output_spec(*(given.spec for given in site))


def test_sequences_one_after_the_other():
    inputs = [tokens(0), tokens(1, Grid(1, 2, 2))]
    out = part("sequence_concat", inputs)(*inputs)
    assert torch.equal(out.values[:, 12:], inputs[1].values)
    assert torch.equal(out.positions[:, :12], inputs[0].positions)
    assert (out.grid, out.values.shape[1]) == (None, 16)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize(
    ("given", "target"),
    [
        (Grid(3, 4, 6), (3, 2, 3)),
        (Grid(2, 7, 5), (2, 4, 3)),  # windows overlap
        (Grid(1, 4, 4), (1, 2, 2)),
        (Grid(2, 2, 2), (2, 3, 3)),  # more cells than there were
    ],
    ids=str,
)
def test_projectors_on_any_grid(name, given, target):
    inputs = tokens(0, given)
    made = part(name, [inputs], **PROJECTORS[name](*target))
    out = made(inputs)
    assert out.spec == made.output_spec(inputs.spec)
    assert (out.grid.t, out.grid.h, out.grid.w) == target
    close(out.sizes.sum(1), inputs.sizes.sum(1), 1e-4)
    assert torch.equal(out.positions[0, :, 0].round(decimals=4).unique(), torch.arange(float(given.t)))
    # rows and columns are not mixed up: a clip that is mirrored across its columns gives other tokens
    mirrored = inputs.with_values(inputs.as_grid().flip(3).flatten(1, 3))
    changed = (made(mirrored).values - out.values).abs().max() > 1e-3
    assert bool(changed) == (name != "attentive_pool")  # its queries know no places


def test_a_mean_over_time_and_space_is_a_mean_over_each_frame_where_no_frames_are_joined():
    inputs = tokens(0, Grid(4, 7, 5))
    three = part("pool", [inputs], grid=(4, 3, 2))(inputs).as_grid()
    maps = inputs.as_grid().flatten(0, 1).movedim(-1, 1)
    two = torch.nn.functional.adaptive_avg_pool2d(maps, (3, 2)).movedim(1, -1).unflatten(0, (3, 4))
    close(three, two, 1e-6)


def test_two_cells_become_three():
    inputs = tokens(0, Grid(1, 1, 2))
    out = part("pool", [inputs], grid=(1, 1, 3))(inputs).values
    left, right = inputs.values[:, 0], inputs.values[:, 1]
    close(out, torch.stack([left, (left + right) / 2, right], dim=1), 1e-6)


def test_the_paper_size_recipe_has_the_specs_figures():
    rows = {row.part: row for row in walk(Blueprint.of(load("merv")))}
    grids = {"languagebind": "16x16x16", "dinov2": "16x16x16", "vivit": "16x14x14", "siglip": "16x14x14"}
    assert {name: rows[name].grid for name in grids} == grids
    assert sum(rows[f"{name}_stream"].parameters for name in grids) == 4096 * (1024 + 1024 + 768 + 768) + 4 * 4096
    geometries = Blueprint.of(load("merv")).plan.geometries
    assert geometries.keys() == grids.keys() and len(set(geometries.values())) == 1, "frames are resized once"
    assert rows["fusion"].parameters == 4096
    assert (rows["fusion"].tokens, rows["llm"].tokens) == (1024, 1024)
    macs = {name: rows[name].macs / 1e12 for name in grids}
    assert sum(rows[name].parameters for name in grids) == pytest.approx(0.89e9, rel=0.01)
    assert macs["languagebind"] == pytest.approx(1.30 + 0.41, abs=0.05)
    assert macs["dinov2"] == pytest.approx(1.32, abs=0.06)
    assert macs["vivit"] == pytest.approx(0.45, abs=0.03)
    still = {row.part: row for row in walk(Blueprint.of(load("merv")), "image")}
    assert still["llm"].tokens == 64


def view(sees: str, pixels: torch.Tensor) -> torch.Tensor:
    """What the layers of a nano encoder get."""
    encoder = registry.find("encoder", "nano_view")(Site(), sees=sees)
    return encoder.normalise(pixels)


def clip(colour: tuple[int, int, int], starts: list[int], width: int = 12) -> torch.Tensor:
    """A block of this colour on grey, its left edge at a place in each frame: uint8 [1, F, 3, 48, 48]."""
    made = torch.full((1, len(starts), 3, 48, 48), 92, dtype=torch.uint8)
    for frame, start in enumerate(starts):
        made[0, frame, :, 16:28, start : start + width] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return made


def test_each_nano_view_sees_one_thing():
    red, blue = clip((228, 40, 40), [4, 12, 20]), clip((60, 115, 255), [4, 12, 20])
    close(view("shape", red), view("shape", blue), 0.05)
    close(view("motion", red), view("motion", blue), 0.05)
    assert (view("colour", red) - view("colour", blue)).abs().max() > 0.5
    wide = clip((228, 40, 40), [4, 4, 4], 16)
    assert (view("motion", wide) == -1).all()
    assert (view("shape", wide)[0, 0] != view("shape", red)[0, 0]).any()
    back = clip((228, 40, 40), [20, 12, 4])
    there, other = view("motion", red)[0, 1], view("motion", back)[0, 1]
    assert torch.equal(there[[1, 0, 2]], other)  # before and after change places when a clip runs backwards
    noisy = (red.int() + torch.randint(-3, 4, red.shape)).clamp(0, 255).to(torch.uint8)
    assert view("shape", noisy)[0, 0, :, 30:, 30:].max() < -0.8
    colour = view("colour", red)[0, 0].unflatten(1, (3, 16)).unflatten(3, (3, 16))
    assert (colour - colour[:, :, :1, :, :1]).abs().max() == 0


@pytest.mark.parametrize("sees", ["shape", "motion"])
def test_gradients_stay_small_where_there_is_nothing_to_see(sees):
    torch.manual_seed(0)
    encoder = registry.find("encoder", "nano_view")(Site(), sees=sees)
    still = torch.full((2, 4, 3, 48, 48), 92, dtype=torch.uint8)
    encoder(still, MediaSpec("video", 4), Needs()).values.square().mean().backward()
    assert max(float(parameter.grad.abs().max()) for parameter in encoder.parameters()) < 100


def test_one_encoder_of_the_bank_can_read_fewer_frames():
    arguments = bind(registry.find("encoder", "nano_view"), {"sees": "shape", "frames": 1}, "x")
    encoder = registry.find("encoder", "nano_view")(Site(), **arguments)
    assert encoder.output_spec(MediaSpec("video", 8)).grid == Grid(1, 3, 3)
    assert encoder(clip((0, 0, 0), [0]), MediaSpec("video", 8), Needs()).grid == Grid(1, 3, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny MERV."""
    folder = tmp_path_factory.mktemp("merv")
    recipe = tiny_recipe("nano/merv", overrides=("model.connector.fusion.attn_dim=8",))
    made = tiny_model(recipe)
    with torch.no_grad():
        made.model.front_end.parts["fusion"].attention.query.normal_()
    made.save_pretrained(folder)
    tiny_processor(recipe).save_pretrained(folder)
    return folder


def test_inspecting_a_fusion(model, tmp_path, capsys):
    videos = [write_video(tmp_path / f"{name}.mp4", frames(seed, 16)) for seed, name in enumerate("ab")]
    words = ["inspect", "fusion", "--model", str(model), "--video", str(videos[0]), "--video", f"{videos[1]}#t=0,1"]
    assert main([*words, "--json", "--out", str(tmp_path / "fusion.png")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(row["fusion"]) for row in rows] == [["colour", "shape", "motion"]] * 2
    for row in rows:
        assert sum(row["fusion"].values()) == pytest.approx(1, abs=1e-5)
    assert rows[0]["fusion"] != rows[1]["fusion"]
    assert (tmp_path / "fusion.png").stat().st_size > 5000
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fusion", "colour", "shape", "motion"]
    assert lines[1].split()[1] == f"{rows[0]['fusion']['colour']:.3f}"


def test_a_model_that_mixes_nothing_is_refused(tmp_path, capsys):
    recipe = tiny_recipe()
    tiny_model(recipe).save_pretrained(tmp_path)
    tiny_processor(recipe).save_pretrained(tmp_path)
    assert main(["inspect", "fusion", "--model", str(tmp_path), "--video", "a.mp4"]) == 2
    assert "does not mix encoders. Try: a recipe with a fusion: nano/merv" in capsys.readouterr().err
