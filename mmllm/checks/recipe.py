"""Whether a recipe holds together as a whole model, checked on random pixels."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from mmllm.checks.summary import short, walk
from mmllm.contract.batch import VisualInputs
from mmllm.contract.errors import UserError
from mmllm.contract.types import MediaSpec
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_model
from mmllm.model.front_end_plan import FrontEndPlan

SMALL = 50_000_000


def check_recipe(blueprint: Blueprint) -> dict[str, Any]:
    """A real forward, gradients, save = load of a small recipe; the shapes of a large one hold by its blueprint.

    Returns:
        facts, and under "says" the line to print.

    Raises:
        UserError: something does not hold.
    """
    recipe, plan = blueprint.recipe, blueprint.plan
    parameters = sum(row.parameters for row in walk(blueprint))
    facts: dict[str, Any] = {"parameters": parameters, "full": parameters <= SMALL}
    if parameters > SMALL:
        facts["says"] = f"ok: shapes fit ({short(parameters)} parameters, too large to run here); parts checked small"
        return facts
    torch.manual_seed(0)
    model = build_model(blueprint, weights=False).eval()
    visual, length = visual_input(plan, [plan.nominal("video"), MediaSpec("image", 1)])
    ids = torch.zeros(1, length, dtype=torch.long)
    logits = model(ids, visual=visual).logits
    logits.sum().backward()
    for name, part in model.model.front_end.parts.items():
        gradients = [parameter.grad for parameter in part.parameters()]
        if gradients and all(gradient is None for gradient in gradients):
            raise UserError(recipe.where(f"model.connector.{name}"), "no gradient reaches it")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
        if not torch.equal(again(ids, visual=visual).logits, logits):
            raise UserError(recipe.file, "a saved and reloaded model gives different logits")
    facts["says"] = "ok: declared = real; gradient reaches it; batch = single; save = load"
    return facts


def visual_input(plan: FrontEndPlan, specs: list[MediaSpec]) -> tuple[VisualInputs, int]:
    """A `visual` dict of random media, all in row 0 one after the other, and the row's length."""
    generator = torch.Generator().manual_seed(1)
    media, spans, start = [], [], 1
    for index, spec in enumerate(specs):
        pixels = {
            geometry: torch.randint(
                0, 256, (spec.frames, 3, geometry.height, geometry.width), dtype=torch.uint8, generator=generator
            )
            for geometry in dict.fromkeys(plan.geometries.values())
        }
        media.append({"spec": spec, "times": torch.arange(spec.frames).float(), "pixels": pixels})
        for stream, tokens in enumerate(plan.streams(spec)):
            spans.append((0, start, index, stream))
            start += tokens.tokens
    pairs = [(index, -1) for index in range(len(specs))]
    return {"media": media, "pairs": pairs, "spans": torch.tensor(spans)}, start + 1
