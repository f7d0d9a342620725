"""MERV against the authors' code: fusion, projectors, and all that reaches the LLM."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mmllm.connectors.merv.attention import collapse
from mmllm.contract import registry
from mmllm.contract.parts import Encoder, Part, Site
from mmllm.contract.types import Geometry, Grid, MediaSpec, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.config import MMLLMConfig
from mmllm.model.modeling import MMLLMModel
from mmllm.processing.collate import Example, Medium, collate

FORMS = pytest.mark.parametrize("reference", [False, True], ids=["default", "reference"])


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the tolerance of the reference values."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def part(name: str, inputs: list[VisualTokens], width: int, **arguments: object) -> Part:
    """A connector over such tokens."""
    cls = registry.find("connector", name)
    return cls(Site(tuple(tokens.spec for tokens in inputs), width), **arguments).eval()


def streams(golden) -> list[VisualTokens]:
    """The streams x0, x1, ... of a file, gradients wanted."""
    names = [f"x{index}" for index in range(golden.number("meta/num_encoders"))]
    media = MediaSpec("video", 1)
    return [frame_tokens(golden[name].requires_grad_(), media, None, 1) for name in names]


def cross_attention(golden, case: str, inputs: list[VisualTokens], reference: bool) -> Part:
    """The fusion of a case with the authors' weights."""
    weights = {key: golden[f"{case}/{key}"] for key in names_under(golden, case) if is_weight(key)}
    tokens = golden.number("meta/tokens")
    keys = {"keys": "flat", "tokens": tokens} if case.startswith("xattn_flat") else {}
    fusion = part(
        "cross_attentive_fusion",
        inputs,
        golden.number("meta/llm_dim"),
        attn_dim=golden.number("meta/attn_dim"),
        positions="pe" in weights,
        reference=reference,
        **keys,
    )
    fusion.load_authors(weights)
    if f"{case}/collapsed_vector" in golden:
        close(collapse(weights)[0][None], golden[f"{case}/collapsed_vector"])
    return fusion


def names_under(golden, case: str) -> list[str]:
    """Names below a case, without it."""
    return [name.removeprefix(f"{case}/") for name in golden if name.startswith(f"{case}/")]


def is_weight(key: str) -> bool:
    """Whether a name is one of the authors' parameters."""
    return key in ("Q", "pe") or key.startswith("attention.")


@FORMS
@pytest.mark.golden("merv_fusion", cases=r"(xattn_\w+)/out")
def test_cross_attention(golden, case, reference):
    inputs = streams(golden)
    out = cross_attention(golden, case, inputs, reference)(*inputs)
    close(out.values, golden[f"{case}/out"])
    close(out.extras["fusion"], golden[f"{case}/weights"])


@pytest.mark.golden("merv_fusion", cases=r"(xattn_\w+)/grad_upstream")
def test_gradients_of_the_authors_weights_and_of_the_streams(golden, case):
    theirs, ours = ({}, streams(golden)), ({}, streams(golden))
    for (parameters, inputs), reference in ((theirs, True), (ours, False)):
        fusion = cross_attention(golden, case, inputs, reference)
        (fusion(*inputs).values * golden[f"{case}/grad_upstream"]).sum().backward()
        parameters.update(fusion.attention.named_parameters())
    for cheap, full in zip(ours[1], theirs[1], strict=True):
        close(cheap.values.grad, full.values.grad)
    # The chain rule over the collapse turns the gradients of the default form into those of the authors' weights.
    weights = {key: golden[f"{case}/{key}"].requires_grad_() for key in names_under(golden, case) if is_weight(key)}
    collapsed = [value for value in collapse(weights) if value is not None]
    upstream = [ours[0][name].grad.flatten() for name in ("query", "bias")[: len(collapsed)]]
    torch.autograd.backward(collapsed, upstream)
    for name, expected in golden.under(f"{case}/grad/").items():
        for parameter in (theirs[0][name], weights[name]):
            close(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, expected)


@pytest.mark.golden("merv_fusion", cases=r"(scalar\w*)/out")
def test_static_weights(golden, case):
    inputs = streams(golden)
    fusion = part("static_fusion", inputs, golden.number("meta/llm_dim"))
    fusion.load_state_dict({"logits": golden[f"{case}/scalar"]})
    out = fusion(*inputs)
    close(out.values, golden[f"{case}/out"])
    close(out.extras["fusion"], golden[f"{case}/weights"].expand(len(out.values), -1))


@pytest.mark.golden("merv_fusion", cases=r"(concat_channel\w*)/out")
def test_joined_channels(golden, case):
    inputs = streams(golden)
    weights = golden.under(f"{case}/")
    out = weights.pop("out")
    norm = "0.weight" in weights
    names = {"0.": "norm.", "1.projector.": "linear.", "projector.": "linear."}
    joined = part("channel_concat", inputs, golden.number("meta/llm_dim"), norm=norm)
    joined.load_state_dict({renamed(name, names): value for name, value in weights.items()})
    close(joined(*inputs).values, out)


@pytest.mark.golden("merv_fusion", cases=r"(concat_seq\w*)/out")
def test_joined_sequences(golden, case):
    inputs = streams(golden)
    close(part("sequence_concat", inputs, 0)(*inputs).values, golden[f"{case}/out"])


def renamed(name: str, names: dict[str, str]) -> str:
    """A name with its beginning in our words."""
    start = next(start for start in names if name.startswith(start))
    return names[start] + name.removeprefix(start)


HEADS = {"linear": "linear", "mlp": "mlp", "fusedmlp": "fused_mlp"}
RESAMPLED = {"conv3d": "conv3d_pool", "conv2d": "c_abstractor", "attn2d": "attentive_pool"}
BLOCKS = {
    "conv1.conv": "widen.conv",
    "conv1.bn": "widen.norm",
    "conv2.conv": "around.conv",
    "conv2.bn": "around.norm",
    "conv3.conv": "merge.conv",
    "conv3.bn": "merge.norm",
    "downsample.conv": "skip.conv",
    "downsample.bn": "skip.norm",
    "se.fc1": "squeeze",
    "se.fc2": "excite",
}
ATTENTION = {
    "query_tokens": "queries",
    "cross_attn.norm1": "norm",
    "cross_attn.norm2": "inner_norm",
    "cross_attn.xattn.q": "to_query",
    "cross_attn.xattn.kv": "to_keys_values",
    "cross_attn.xattn.proj": "merge",
    "cross_attn.mlp.fc1": "widen",
    "cross_attn.mlp.fc2": "narrow",
}


def our_name(name: str) -> str:
    """The name that a weight of the authors' resamplers has here."""
    block = re.fullmatch(r"convolution_pooling\.([02])\.b(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        where = {"0": "before", "2": "after"}[block[1]]
        return f"{where}.{int(block[2]) - 1}.{BLOCKS[block[3]]}.{block[4]}"
    layer, _, kind = name.rpartition(".")
    if layer == "convolution_pooling.0":
        return f"conv.{kind}"
    return ATTENTION[name] if name in ATTENTION else f"{ATTENTION[layer]}.{kind}"


@pytest.fixture
def two_threads():
    """With a single thread torch takes other kernels for small convolutions, which round differently by 3e-6."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.golden("merv_projectors", cases=r"(\w+/\w+)/out")
def test_projectors(golden, case):
    encoder, variant = case.split("/")
    kind, time, head = re.fullmatch(r"([a-z]+\dd)(_time)?_(linear|mlp|fusedmlp)(?:_\w+)?", variant).groups()
    frames, rows, columns, width = golden[f"{encoder}/grid"].tolist()
    tokens = frame_tokens(
        golden[f"{encoder}/features"].flatten(1, 2), MediaSpec("video", frames), Grid(frames, rows, columns), frames
    )
    assert tokens.values.shape[-1] == width
    side, factor = golden.number("meta/output_size"), golden.number("meta/time_factor")
    steps = frames // factor if time else frames
    weights = golden.under(f"{case}/")
    out = weights.pop("out")
    pooled = weights.pop("pooled", None)
    if not weights:  # an average with those of the average over time and space
        weights = golden.under(f"{encoder}/avg3d_{head}/")
        del weights["out"]
        weights.pop("pooled", None)
    head_weights = {
        name.removeprefix("projector.").removeprefix("projector."): weights.pop(name)
        for name in list(weights)
        if name.startswith("projector.")
    }
    made = resampled(kind, tokens, (steps, side, side), weights, golden.number("meta/llm_dim"))
    if pooled is not None:
        close(made.values, pooled)
    last = part(HEADS[head], [made], golden.number("meta/llm_dim"))
    inner = {"linear": "linear.", "mlp": "layers.", "fusedmlp": "layers."}[head]
    last.load_state_dict({inner + name: value for name, value in head_weights.items()})
    result = last(made)
    close(result.values, out)
    assert (result.grid.t, result.grid.h, result.grid.w) == (steps, side, side)


def resampled(
    kind: str, tokens: VisualTokens, grid: tuple[int, int, int], weights: dict[str, Tensor], width: int
) -> VisualTokens:
    """The tokens on the grid, before the head."""
    if kind not in RESAMPLED:
        return part("pool", [tokens], width, grid=grid)(tokens)
    arguments = {"grid": grid if kind == "conv3d" else grid[1:]}
    if kind == "conv2d":
        arguments["depth"] = max(int(name.split(".b")[1].split(".")[0]) for name in weights)
    made = part(RESAMPLED[kind], [tokens], width, **arguments)
    states = {our_name(name): value for name, value in weights.items()}
    if "queries" in states:
        states["queries"] = states["queries"][0]
    made.load_state_dict(states)
    return made(tokens)


class Given(Encoder):
    """An encoder whose features are always given, as a cache gives them."""

    geometry = Geometry(8, 8)

    def __init__(self, site: Site, *, grid: tuple[int, int, int], width: int) -> None:
        super().__init__(site)
        self.grid, self.width = Grid(*grid), width

    def output_spec(self, media: MediaSpec) -> TokenSpec:
        return TokenSpec(media, self.grid.tokens, self.width, self.grid)


def front_of(golden, reference: bool) -> MMLLMModel:
    """The model of the file: its encoders, projectors and fusion before a language model that only has a table."""
    width, side = golden.number("meta/llm_dim"), golden.number("meta/output_size")
    count = sum(name.endswith("/features") for name in golden)
    encoders, connector = {}, []
    for index in range(count):
        *grid, features = golden[f"enc{index}/grid"].tolist()
        encoders[f"enc{index}"] = {"type": "given", "grid": grid, "width": features}
        size = [grid[0], side, side]
        pool = {"name": f"grid{index}", "type": "pool", "in": [f"enc{index}"], "grid": size, "still_grid": size}
        connector += [pool, {"name": f"stream{index}", "type": "linear", "in": [f"grid{index}"]}]
    connector.append(
        {
            "name": "fusion",
            "type": "cross_attentive_fusion",
            "in": [f"stream{index}" for index in range(count)],
            "attn_dim": golden.number("meta/attn_dim"),
            "reference": reference,
        }
    )
    section = {"media": {"frames": grid[0]}, "encoders": encoders, "connector": connector, "output": "fusion"}
    table = golden["token_embedding"]
    llm = {"model_type": "llama", "vocab_size": len(table), "hidden_size": width, "intermediate_size": 8}
    llm |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    model = MMLLMModel(MMLLMConfig(text_config=llm, model_section=section)).eval()
    model.get_input_embeddings().weight.data = table
    parts = model.front_end.parts
    for index in range(count):
        states = golden.under(f"projector{index}/projector.projector.")
        parts[f"stream{index}"].linear.load_state_dict(states)
    parts["fusion"].load_authors(golden.under("fusion/"))
    return model


def batch_of(golden, tokens: int) -> dict:
    """The rows of the file as our processor makes them: visual positions after BOS in the rows with a clip."""
    ids, mask, labels = golden["input_ids"], golden["attention_mask"], golden["labels"]
    with_clip = golden["multimodal_indices"].tolist()
    features = {name.split("/")[0]: golden[name] for name in golden if name.endswith("/features")}
    examples = []
    for row in range(len(ids)):
        length = int(mask[row].sum())
        own, wanted = ids[row, :length].tolist(), labels[row, :length].tolist()
        if row not in with_clip:
            examples.append(Example(own, wanted))
            continue
        kept = {}
        for name, values in features.items():
            *grid, _ = golden[f"{name}/grid"].tolist()
            clip = frame_tokens(values[row : row + 1], MediaSpec("video", grid[0]), Grid(*grid), grid[0])
            kept[name] = {key: getattr(clip, key)[0] for key in ("values", "positions", "sizes", "times")}
        medium = Medium(row, MediaSpec("video", grid[0]), torch.zeros(grid[0]), {}, kept)
        fill = [0] * tokens, [-100] * tokens
        examples.append(Example(own[:1] + fill[0] + own[1:], wanted[:1] + fill[1] + wanted[1:], [medium], [(1, 0, 0)]))
    return collate(examples, 0, "right", lambda rows: {})


@FORMS
@pytest.mark.golden("merv_pipeline")
@torch.no_grad()
def test_all_that_reaches_the_language_model(golden, reference, monkeypatch):
    registry.parts("encoder")
    monkeypatch.setitem(registry._parts["encoder"], "given", Given)
    model = front_of(golden, reference)
    tokens = golden["out/visual_tokens"].shape[1]
    batch = batch_of(golden, tokens)
    sequence = model.embed(batch["input_ids"], batch["attention_mask"], visual=batch["visual"])

    fused = model.front_end.tokens_of(batch["visual"], "fusion")
    place = golden["multimodal_indices"].argsort().argsort()  # theirs are in the order of these, ours in the rows'
    close(torch.cat([row.values for row in fused])[place], golden["out/visual_tokens"])
    close(torch.cat([row.extras["fusion"] for row in fused])[place], golden["out/fusion_weights"])
    spliced = sequence.embeds[sequence.visual].view_as(golden["out/visual_tokens"])
    close(spliced[place], golden["out/visual_tokens"])

    # The authors put the rows without a clip last and pad them with as many zero embeddings as a clip has tokens; here
    # the rows stay in place and are padded with the padding id.
    with_clip = golden["multimodal_indices"].tolist()
    order = with_clip + [row for row in range(len(sequence.embeds)) if row not in with_clip]
    theirs_embeds, theirs_mask = golden["out/inputs_embeds"], golden["out/attention_mask"]
    length = theirs_mask.shape[1]
    embeds = nn.functional.pad(sequence.embeds, (0, 0, 0, length - sequence.embeds.shape[1]))[order]
    mask = nn.functional.pad(sequence.mask, (0, length - sequence.mask.shape[1]))[order]
    labels = nn.functional.pad(batch["labels"], (0, length - sequence.mask.shape[1]), value=-100)[order]
    assert torch.equal(mask, theirs_mask)
    assert torch.equal(labels, golden["out/labels"])
    real = theirs_mask.bool()
    close(embeds[real], theirs_embeds[real])
    padding = model.get_input_embeddings().weight[0]
    without = theirs_embeds[len(with_clip) :]
    assert (without[:, length - tokens :] == 0).all()
    kept = ~real
    kept[len(with_clip) :, length - tokens :] = False
    close(theirs_embeds[kept], padding.expand_as(theirs_embeds[kept]))
