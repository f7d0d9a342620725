"""One test over every registered part, and the rules of the registry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmllm.checks.part import check_part
from mmllm.contract import registry
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Part, Site
from mmllm.contract.types import Grid, MediaSpec, TokenSpec, VisualTokens

PARTS = [(kind, name) for kind in ("encoder", "connector") for name in sorted(registry.parts(kind))]


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=lambda value: value)
def test_part_keeps_the_contract(kind, name):
    assert check_part(kind, name) >= 1


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=lambda value: value)
def test_no_submodule_is_hidden_by_a_method(kind, name):
    cls = registry.find(kind, name)
    for arguments, inputs in cls.examples():
        specs = () if kind == "encoder" else inputs
        for module in cls(Site(specs, 16, 16, 12), **arguments).modules():
            for child in module._modules:
                assert not hasattr(nn.Module, child), f"{name}: {child} hides a method"


class Liar(Part):
    """Declares one token more than it makes."""

    def __init__(self, site: Site, *, lie: bool = True) -> None:
        super().__init__(site)
        self.lie = lie
        self.weight = nn.Parameter(torch.ones(1))

    def output_spec(self, *inputs):
        return TokenSpec(inputs[0].media, inputs[0].tokens + self.lie, inputs[0].width)

    def forward(self, *inputs):
        index = torch.arange(inputs[0].values.shape[1])
        return inputs[0].derive(inputs[0].values * self.weight, None, index=index)

    @classmethod
    def examples(cls):
        yield {}, (TokenSpec(MediaSpec("video", 2), 8, 4, Grid(2, 2, 2)),)


class Unwritten(Liar):
    """Leaves its raw weight to chance when a checkpoint lacks it."""

    @classmethod
    def examples(cls):
        yield {"lie": False}, (TokenSpec(MediaSpec("video", 2), 8, 4, Grid(2, 2, 2)),)


class Wide(Unwritten):
    """Raises in its forward, as it declares what its input cannot give."""

    def forward(self, *inputs):
        return inputs[0].derive(inputs[0].values[:, [99]], None, index=torch.zeros(1, dtype=torch.long))


class Detached(Unwritten):
    """Lets no gradient through to what stands before it."""

    def __init__(self, site: Site, *, lie: bool = True) -> None:
        super().__init__(site, lie=lie)
        del self.weight

    def forward(self, *inputs):
        return inputs[0].derive(inputs[0].values.detach(), None, index=torch.arange(inputs[0].values.shape[1]))


class HalfDetached(Detached):
    """Lets none through to one of two that it joins."""

    def forward(self, *inputs):
        values = inputs[0].values + inputs[1].values.detach()
        return inputs[0].derive(values, None, index=torch.arange(values.shape[1]))

    @classmethod
    def examples(cls):
        spec = TokenSpec(MediaSpec("video", 2), 8, 4, Grid(2, 2, 2))
        yield {"lie": False}, (spec, spec)


class Endless(Detached):
    """Gives numbers that are none."""

    def forward(self, *inputs):
        values = inputs[0].values * 0 - inputs[0].values / 0
        return inputs[0].derive(values, None, index=torch.arange(values.shape[1]))


class Random(Detached):
    """Is another one at every call."""

    def forward(self, *inputs):
        values = inputs[0].values * torch.rand(())
        return inputs[0].derive(values, None, index=torch.arange(values.shape[1]))


class Untyped(Unwritten):
    """Takes an argument that nobody can read from a recipe."""

    def __init__(self, site: Site, *, lie=False) -> None:
        super().__init__(site, lie=lie)


class Unnamed(Unwritten):
    """Takes an argument of a type that its file does not have."""

    def __init__(self, site: Site, *, lie: Nobody = False) -> None:  # noqa: F821
        super().__init__(site, lie=lie)


class NoExample(Unwritten):
    """Has examples that cannot be made."""

    @classmethod
    def examples(cls):
        yield {}, (TokenSpec(MediaSpec("video", 2), 9, 4, Grid(2, 2, 2)),)


class Learned(Unwritten):
    """Gives tokens of its own, whatever it reads: no gradient has to reach that."""

    def __init__(self, site: Site, *, lie: bool = True) -> None:
        super().__init__(site, lie=lie)
        self.reset_parameters()

    def reset_parameters(self):
        from transformers import initialization as init

        init.constant_(self.weight, 2.0)

    def forward(self, *inputs):
        values = torch.ones_like(inputs[0].values) * self.weight
        return inputs[0].derive(values, None, index=torch.arange(values.shape[1]))


class InPlace(Learned):
    """Writes into what it gets, and what other nodes read."""

    def forward(self, *inputs):
        values = inputs[0].values.mul_(self.weight)
        return inputs[0].derive(values, None, index=torch.arange(values.shape[1]))


class Annotating(Learned):
    """Hangs what it finds beside the tokens of its input."""

    def forward(self, *inputs):
        inputs[0].extras["found"] = inputs[0].values
        return super().forward(*inputs)


BROKEN = [
    (Liar, "differs from what it declares"),
    (Unwritten, "stays unwritten"),
    (Wide, r"example 1 \{'lie': False\}: IndexError: .*test_parts.py:\d+"),
    (Detached, "no gradient reaches input 1"),
    (HalfDetached, "no gradient reaches input 2"),
    (Random, "not the same twice in eval mode"),
    (Endless, "non-finite"),
    (Untyped, "argument lie has no type"),
    (Unnamed, "arguments: NameError: name 'Nobody' is not defined"),
    (InPlace, "input 1: changes values in place"),
    (Annotating, "changes the extras of input 1 in place: found"),
    (NoExample, r"examples\(\): ValueError: .*test_parts.py:\d+"),
]


@pytest.mark.parametrize(("cls", "says"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_the_check_finds_what_breaks_the_contract(cls, says, monkeypatch):
    registry.parts("connector")
    monkeypatch.setitem(registry._parts["connector"], "bad", cls)
    with pytest.raises(UserError, match=says):
        check_part("connector", "bad")


def test_names_are_exact_and_unknown_ones_get_the_nearest():
    with pytest.raises(UserError, match="Try: linear"):
        registry.find("connector", "liner")
    with pytest.raises(UserError):
        registry.find("connector", "LINEAR")


def test_a_duplicate_is_an_error_and_the_same_source_is_not(tmp_path):
    with pytest.raises(UserError, match="the name is taken"):
        registry.register("connector", "linear")(Liar)
    plugin = tmp_path / "twice.py"
    plugin.write_text(
        "from mmllm.contract.parts import Part\nfrom mmllm.contract.registry import register\n\n"
        "@register('connector', 'twice')\nclass Twice(Part):\n    pass\n"
    )
    registry.load_plugin(plugin)
    registry.load_plugin(plugin)
    del registry._parts["connector"]["twice"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import torch\n\nclass X(:\n", r"mine.py:3: not Python: "),
        ("import torch\nx = 1\nx.y\n", r"mine.py:3: AttributeError: "),
    ],
)
def test_a_plug_in_that_cannot_be_loaded_is_named_with_its_line(tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=says):
        registry.load_plugin(tmp_path / "mine.py")
    assert (tmp_path / "mine.py").resolve() not in registry.plugins()


def test_the_check_lets_be_what_is_unusual_and_right(monkeypatch):
    registry.parts("connector")
    monkeypatch.setitem(registry._parts["connector"], "good", Learned)
    assert check_part("connector", "good") == 1


def tokens(grid: Grid, width: int = 3, seed: int = 0) -> VisualTokens:
    """Random tokens on a grid."""
    from mmllm.encoders.common.tokens import at_times, frame_tokens

    values = torch.randn(2, grid.tokens, width, generator=torch.Generator().manual_seed(seed))
    made = frame_tokens(values, MediaSpec("video", grid.t), grid, grid.t)
    return at_times(made, torch.arange(float(grid.t)).expand(2, -1))


@pytest.mark.parametrize("name", ["pool", "newline", "temporal_spatial_mean"])
def test_sizes_are_kept_in_sum_and_positions_stay_inside(name):
    cls = registry.find("connector", name)
    for arguments, inputs in cls.examples():
        spec = inputs[0]
        given = tokens(spec.grid, spec.width)
        given.media = spec.media
        out = cls(Site(inputs, 16), **arguments)(given)
        torch.testing.assert_close(out.sizes.sum(1), given.sizes.sum(1), atol=1e-4, rtol=0)
        assert out.positions[..., 1:].min() >= 0
        assert out.positions[..., 1:].max() <= 1
        assert out.positions[..., 0].max() <= spec.grid.t


def test_pooling_equals_the_librarys():
    pool = registry.find("connector", "pool")
    given = tokens(Grid(5, 7, 6), 4)
    grid = given.as_grid().permute(0, 4, 1, 2, 3)
    ours = pool(Site((given.spec,), 16), grid=(2, 3, 4))(given)
    theirs = nn.functional.adaptive_avg_pool3d(grid, (2, 3, 4))
    torch.testing.assert_close(ours.as_grid().permute(0, 4, 1, 2, 3), theirs, atol=1e-6, rtol=0)
    ours = pool(Site((given.spec,), 16), kernel=(1, 2, 2), mode="bilinear")(given)
    frames = grid.transpose(1, 2).flatten(0, 1)
    theirs = nn.functional.interpolate(frames, size=(4, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours.as_grid().flatten(0, 1).permute(0, 3, 1, 2), theirs, atol=1e-6, rtol=0)
    even = tokens(Grid(4, 6, 6), 4)
    ours = pool(Site((even.spec,), 16), kernel=(2, 3, 2))(even)
    theirs = nn.functional.avg_pool3d(even.as_grid().permute(0, 4, 1, 2, 3), (2, 3, 2))
    torch.testing.assert_close(ours.as_grid().permute(0, 4, 1, 2, 3), theirs, atol=1e-6, rtol=0)


def test_newlines_stand_where_they_are_asked_for():
    newline = registry.find("connector", "newline")
    given = tokens(Grid(2, 2, 3), 4)
    for at, places in {"one": [12], "frame": [6, 13], "row": [3, 7, 11, 15]}.items():
        part = newline(Site((given.spec,), 16), at=at)
        out = part(given)
        assert [i for i in range(out.values.shape[1]) if bool((out.sizes[0, i] == 0).all())] == places
        for place in places:
            assert torch.equal(out.values[1, place], part.embedding)
        rest = [i for i in range(out.values.shape[1]) if i not in places]
        assert torch.equal(out.values[:, rest], given.values)
