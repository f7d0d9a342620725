"""The walk of a recipe as a table: part, grid, tokens, width, parameters, multiply-adds; on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mmllm.contract.grounding import AXES, Coordinates, Tables
from mmllm.contract.parts import Encoder, Part, TextSource
from mmllm.contract.types import MediaSpec, Needs, PromptFeatures, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.blueprint import Blueprint
from mmllm.tables import aligned


@dataclass(frozen=True)
class Row:
    """One line of the walk. `macs`: multiply-adds per clip; `reaches`: whether its stream enters the LLM."""

    part: str
    type: str
    grid: str
    tokens: int
    width: int
    parameters: int
    macs: int
    reaches: bool = False


def walk(
    blueprint: Blueprint, kind: str = "video", frames: int | None = None, size: tuple[int, int] | None = None
) -> list[Row]:
    """The rows of a recipe for one clip or image; builds on the meta device and loads nothing.

    Args:
        kind: "video" or "image".
        frames: of a video; default: the recipe's own sampling.
        size: (height, width) of an image, for recipes that cut it into tiles; default: one view.

    Raises:
        UserError: a part is unknown, its arguments are wrong or parts do not fit.
    """
    plan = blueprint.plan
    own = plan.sampling.frames or plan.sampling.max_frames or 8
    media = MediaSpec("image", 1) if kind == "image" else MediaSpec("video", frames or own)
    if kind == "image" and size is not None and plan.tiling is not None:
        media = plan.tiling.spec(*size)
    rows: list[Row] = []
    for name, source in plan.prompts.sources.items():
        if name in plan.text_needs:
            count, parameters = _text_macs(source, plan.text_needs[name]), _parameters(source)
            rows.append(Row(name, source.registered_name, "-", source.length, source.width, parameters, count))
    for name, module, inputs, spec in plan.walk(media):
        reaches = name in plan.output[kind]
        grid = str(spec.grid) if spec.grid else "-"
        count = macs(module, inputs, media, plan.vocabulary)
        rows.append(
            Row(name, module.registered_name, grid, spec.tokens, spec.width, _parameters(module), count, reaches)
        )
    if plan.vocabulary is not None:
        bins, width = "+".join(str(plan.vocabulary.bins(axis)) for axis in AXES), plan.llm_width
        rows.append(
            Row("vocabulary", "coordinates", bins, len(plan.vocabulary), width, 2 * len(plan.vocabulary) * width, 0)
        )
    rows.append(_llm_row(blueprint, sum(stream.tokens for stream in plan.streams(media))))
    return rows


def as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for `--json`."""
    return [asdict(row) for row in rows]


def render(rows: list[Row]) -> str:
    """The rows as a plain-text table."""
    head = ("part", "type", "grid", "tokens", "width", "parameters", "multiply-adds")
    lines = [
        (
            row.part + (" ->" if row.reaches else ""),
            row.type,
            row.grid,
            str(row.tokens),
            str(row.width),
            short(row.parameters),
            short(row.macs),
        )
        for row in rows
    ]
    total = ("total", "", "", "", "", short(sum(r.parameters for r in rows)), short(sum(r.macs for r in rows)))
    text = aligned((head, *lines, total), left=3)
    return "\n".join([text[0], "-" * len(text[0]), *text[1:-1], "-" * len(text[0]), text[-1]])


def short(number: int) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _text_macs(source: TextSource, needs: Needs) -> int:
    """Multiply-adds for a prompt of the source's full length."""
    if not any(True for _ in source.parameters()):
        return 0
    with torch.device("meta"):
        ids = torch.zeros(1, source.length, dtype=torch.long)
        return count_macs(source, ids, torch.ones_like(ids), needs)


def blank_context(part: Part, length: int = 8, layout: Coordinates | None = None) -> dict[str, Any]:
    """The prompt and the tables that a part reads, as its keywords, if it reads any. On the current default device."""
    needs, site = part.needs(), part.site
    if needs.tables:
        layout = layout or Coordinates(first=0)
        return {"tables": Tables(*(torch.zeros(len(layout), site.inputs[0].width) for _ in range(2)), layout)}
    if not (needs.prompt or needs.prompt_hidden_states):
        return {}
    ids, states = torch.zeros(1, length, dtype=torch.long), len(needs.prompt_hidden_states)
    features = PromptFeatures(
        ids,
        torch.ones_like(ids),
        tokens=torch.zeros(1, length, site.prompt_width) if "tokens" in needs.prompt else None,
        pooled=torch.zeros(1, site.prompt_joint) if "pooled" in needs.prompt else None,
        hidden_states=torch.zeros(1, length, states, site.prompt_width) if states else None,
        present=torch.ones(1, dtype=torch.bool),
    )
    return {"prompt": features}


def macs(module: nn.Module, inputs: tuple[TokenSpec, ...], media: MediaSpec, layout: Coordinates | None = None) -> int:
    """Multiply-adds of an encoder over such media, or of a part over such inputs, in a model with these coordinates."""
    if isinstance(module, Part) and (known := module.multiply_adds(*inputs)) is not None:
        return known
    with torch.device("meta"):
        if isinstance(module, Encoder):
            shape = (1, module.frames_of(media), 3, module.geometry.height, module.geometry.width)
            return count_macs(module, torch.zeros(shape, dtype=torch.uint8), media, Needs())
        return count_macs(module, *(blank_tokens(spec) for spec in inputs), **blank_context(module, layout=layout))


def blank_tokens(spec: TokenSpec) -> VisualTokens:
    """Zero tokens of a shape, on the current default device; extras included."""
    frames = spec.grid.t if spec.grid else 1
    tokens = frame_tokens(torch.zeros(1, spec.tokens, spec.width), spec.media, spec.grid, frames)
    tokens.extras = {name: torch.zeros(1, *shape) for name, shape in spec.extras.items()}
    return tokens


def count_macs(module: nn.Module, *arguments: Any, **keywords: Any) -> int:
    """Multiply-adds of one forward, by the library's counter (which counts two operations each)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*arguments, **keywords)
    return counter.get_total_flops() // 2


def _llm_row(blueprint: Blueprint, visual: int) -> Row:
    """The LLM reading the visual tokens alone; the parameters include the head."""
    from transformers import AutoModelForCausalLM

    config = blueprint.config.text_config
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
        length = max(visual, 1)
        ids = torch.zeros(1, length, dtype=torch.long)
        # An explicit mask: the library would read the values of the positions, which meta tensors lack.
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
        macs = count_macs(llm.base_model, input_ids=ids, attention_mask=mask, use_cache=False)
    return Row("llm", config.model_type, "-", visual, config.hidden_size, _parameters(llm), macs)
