#!/usr/bin/env python
"""Fewer visual tokens inside an LLM: everything read (SDPA), tokens hidden (the authors' way), tokens removed.

    python scripts/bench/aim.py                              Qwen2-0.5B's shape, 1,568 visual and 100 text tokens
    python scripts/bench/aim.py --merge 1                    the same budget by pruning alone
    python scripts/bench/aim.py --visual 6272 --repeats 1 --out aim.json
    python scripts/bench/aim.py --stock                      Qwen2.5-VL's and LLaVA-OneVision's classes, few layers
    python scripts/bench/aim.py --end-to-end                 a tower of SigLIP-so400m's shape in front, 32 answer tokens

Random weights, in turns in one process. Promised is the ratio of multiply-adds that are really executed, the reducer's
own included; memory is the peak beyond what stands before a prefill.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.masking_utils import eager_mask

import mmllm
from mmllm.checks.flops import LLMCost, entering
from mmllm.contract.types import Grid, LLMInputs, MediaSpec, VisualSpan, VisualTokens
from mmllm.device import PeakMemory
from mmllm.encoders.common.tokens import frame_tokens
from mmllm.model.reduction.attention import attend, reducible
from mmllm.model.reduction.cache import ReducedCache
from mmllm.model.reduction.run import run_reduced
from mmllm.reducers.aim import AIM

QWEN2 = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 32768,
}
PER_FRAME = 14
Form = Callable[[], None]


class Timed(AIM):
    """AIM that notes how long its importance takes."""

    seconds = 0.0

    def score(self, q: Tensor, k: Tensor, visual: Tensor, voting: Tensor) -> Tensor:
        """As AIM's."""
        begin = time.perf_counter()
        found = super().score(q, k, visual, voting)
        self.seconds += time.perf_counter() - begin
        return found


def authors() -> str:
    """Eager attention that computes every layer's importance on the way, as AIM's code does."""

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
        scores = q.float() @ keys.transpose(2, 3) * (q.shape[-1] ** -0.5 / 0.1)
        votes = (scores + mask.float() / 0.1).softmax(-1)
        p = torch.full((*q.shape[:2], 1, q.shape[2]), 1 / q.shape[2], device=q.device)
        for _ in range(5):
            p = p @ votes
        return attend("eager", module, q, k, v, mask, **kwargs)

    AttentionInterface.register("authors", attention)
    AttentionMaskInterface.register("authors", eager_mask)
    return "authors"


class Bench:
    """An LLM of random weights and one prompt with a video in its middle."""

    def __init__(self, visual: int, text: int, keep: float, merge: float | None, device: str) -> None:
        torch.manual_seed(0)
        self.llm = Qwen2Model(Qwen2Config(**QWEN2)).to(device).eval()
        frames = visual // PER_FRAME**2
        values = torch.randn(1, frames * PER_FRAME**2, QWEN2["hidden_size"], device=device)
        grid = Grid(frames, PER_FRAME, PER_FRAME)
        tokens: VisualTokens = frame_tokens(values, MediaSpec("video", frames), grid, frames)
        embeds = torch.randn(1, visual + text, QWEN2["hidden_size"], device=device)
        place = torch.arange(visual + text, device=device)[None]
        seen = (place >= text // 2) & (place < text // 2 + visual)
        self.inputs = LLMInputs(embeds, torch.ones_like(place), None, seen, spans=(VisualSpan(0, text // 2, tokens),))
        self.keep = keep
        self.reducer, self.text, self.visual = Timed(keep=keep, merge=merge), text, visual
        self.held: dict[str, int] = {}

    def off(self) -> None:
        """Everything is read, under SDPA."""
        self.llm.config._attn_implementation = "sdpa"
        output = self.llm(inputs_embeds=self.inputs.embeds, attention_mask=self.inputs.mask, use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
        self.held["off"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def as_many(self) -> None:
        """A plain prompt of as many tokens as the budget means on average: what this machine can reach."""
        self.llm.config._attn_implementation = "sdpa"
        count = int(self.visual * self.keep) + self.text
        self.llm(
            inputs_embeds=self.inputs.embeds[:, :count], attention_mask=self.inputs.mask[:, :count], use_cache=True
        )

    def masked(self) -> None:
        """The same schedule as the authors' code runs it: masks of eager attention over all tokens, importance of all
        heads at once in every layer. Merging is real there too."""
        self._reduced(authors(), "mask")

    def dropped(self) -> None:
        """Tokens removed, under SDPA."""
        self._reduced(reducible("sdpa"), "drop")

    def _reduced(self, attention: str, mode: str) -> None:
        self.llm.config._attn_implementation = attention
        cache = ReducedCache()
        run_reduced(self.llm, self.inputs, self.reducer, cache, mode)
        self.held["masked" if mode == "mask" else "dropped"] = cache.bytes()

    def promised(self) -> tuple[float, dict[str, int]]:
        """Multiply-adds of everything over those that dropping executes; and bytes of the caches as computed."""
        cost, schedule = LLMCost(self.llm.config), self.reducer.schedule(QWEN2["num_hidden_layers"])
        door = int(schedule.door * self.visual)
        read = entering(schedule, door, self.text)
        passed = [count + self.text for count in schedule.counts(door, self.text)]
        whole = [self.visual + self.text] * len(read)
        executed = cost.prefill(read, passed) + cost.votes(read, passed, self.text)
        token = 2 * QWEN2["num_key_value_heads"] * (QWEN2["hidden_size"] // QWEN2["num_attention_heads"]) * 4
        return cost.prefill(whole, whole) / executed, {"off": sum(whole) * token, "dropped": sum(read) * token}


def measure(forms: dict[str, Form], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Memory in a first turn, which also warms up; then seconds in turns (or of the first, if it is the only one)."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, float] = {}
    with torch.inference_mode():
        for name, form in forms.items():
            with extra_memory(device) as extra:
                taken = timed(form, device)
            peaks[name] = extra[0]
            if repeats == 0:
                seconds[name].append(taken)
        for _ in range(repeats):
            for name, form in forms.items():
                seconds[name].append(timed(form, device))
    return {
        name: {"seconds": statistics.median(values), "all": values, "megabytes": peaks[name]}
        for name, values in seconds.items()
    }


def timed(form: Form, device: torch.device) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    form()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


@contextmanager
def extra_memory(device: torch.device) -> Iterator[list[float]]:
    """Megabytes at the peak beyond what is in use now."""
    gc.collect()
    if device.type == "cpu":  # what was freed may still count as ours
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    found = [0.0]
    before = torch.accelerator.memory_allocated() if device.type != "cpu" else resident()
    with PeakMemory(device) as peak:
        yield found
    found[0] = ((peak.bytes or before) - before) / 1e6


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def prefill(options: argparse.Namespace) -> dict:
    """The table of three columns."""
    bench = Bench(options.visual, options.text, options.keep, options.merge, options.device)
    forms = {"off": bench.off, "masked": bench.masked, "dropped": bench.dropped, "as many": bench.as_many}
    found = measure(forms, options.repeats, torch.device(options.device))
    bench.reducer.seconds = 0.0
    with torch.inference_mode():
        bench.dropped()
    promised, computed = bench.promised()
    reached = found["off"]["seconds"] / found["dropped"]["seconds"]
    for name, row in found.items():
        row["cache_megabytes"] = bench.held.get(name, 0) / 1e6
        say(f"{name}: {row['seconds']:.2f} s, {row['megabytes']:.0f} MB, cache {row['cache_megabytes']:.1f} MB")
    same = all(bench.held[name] == value for name, value in computed.items())
    found["summary"] = {
        "speedup": reached,
        "promised": promised,
        "reached": reached / promised,
        "of_as_many": found["as many"]["seconds"] / found["dropped"]["seconds"],
        "over_masked": found["masked"]["seconds"] / found["dropped"]["seconds"],
        "importance_share": bench.reducer.seconds / found["dropped"]["seconds"],
        "cache_as_computed": same,
    }
    say(json.dumps(found["summary"]))
    return found


def end_to_end(options: argparse.Namespace) -> dict:
    """Tower, projector, prefill and answer through our model, with and without reducing."""
    from mmllm.config.recipe import load
    from mmllm.model.blueprint import Blueprint
    from mmllm.model.build import build_model

    frames = options.visual // PER_FRAME**2
    overrides = [f"model.media.frames={frames}", "model.encoders.siglip.name=null", "model.llm.name=null"]
    recipe = load("llava_onevision_video", overrides)
    recipe.model["llm"]["config"] = {"model_type": "qwen2", **QWEN2, "eos_token_id": None}
    model = build_model(Blueprint.of(recipe), weights=False).to(options.device).eval()
    geometry = next(iter(model.model.front_end.plan.geometries.values()))
    spec = MediaSpec("video", frames)
    pixels = torch.randint(0, 256, (frames, 3, geometry.height, geometry.width), dtype=torch.uint8)
    clip = {"spec": spec, "times": torch.arange(frames) * 1.0, "pixels": {geometry: pixels}}
    count = model.model.front_end.plan.streams(spec)[0].tokens
    ids = torch.randint(3, 1000, (1, count + options.text))
    visual = {"media": [clip], "pairs": [(0, -1)], "spans": torch.tensor([[0, options.text // 2, 0, 0]])}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "visual": visual}

    def answer(reducer: str | None) -> Form:
        def run() -> None:
            mmllm.reduce(model, reducer, keep=reducer and options.keep)
            model.generate(**batch, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)

        return run

    def tower() -> None:
        mmllm.reduce(model, None)
        model.model.front_end.streams(visual)

    forms = {"off": answer(None), "aim": answer("aim"), "pixels": answer("pixels"), "tower": tower}
    found = measure(forms, options.repeats, torch.device(options.device))
    for name, row in found.items():
        say(f"{name}: {row['seconds']:.2f} s [{min(row['all']):.2f}, {max(row['all']):.2f}]")
    found["summary"] = {}
    for name in ("aim", "pixels"):
        ratios = [a / b for a, b in zip(found["off"]["all"], found[name]["all"], strict=True)]
        found["summary"][name] = {"speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    say(json.dumps(found["summary"]))
    return found


def stock_models(options: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel, dict]]:
    """Classes of transformers with a small tower, few layers and as many visual tokens as asked."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    torch.manual_seed(0)
    llm = {**QWEN2, "num_hidden_layers": options.layers}
    frames = options.visual // PER_FRAME**2
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower, "image_size": 27 * 4, "patch_size": 4},
        text_config={"model_type": "qwen2", **llm},
        image_token_index=1000,
        video_token_index=1001,
    )
    pixels = torch.randn(1, frames, 3, 27 * 4, 27 * 4)
    yield (
        "llava_onevision",
        LlavaOnevisionForConditionalGeneration(config).eval(),
        {"input_ids": prompt(frames * PER_FRAME**2 + 1, options.text), "pixel_values_videos": pixels},
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        text_config={**llm, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "num_heads": 2,
            "hidden_size": 64,
            "out_hidden_size": QWEN2["hidden_size"],
            "intermediate_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
        },
        image_token_id=1000,
        video_token_id=1001,
    )
    ids = prompt(frames * PER_FRAME**2, options.text)
    grid = torch.tensor([[frames, 2 * PER_FRAME, 2 * PER_FRAME]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4)
    kinds = torch.where(ids == 1001, 2, 0)
    given = {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": grid, "mm_token_type_ids": kinds}
    yield "qwen2_5_vl", Qwen2_5_VLForConditionalGeneration(config).eval(), given


def prompt(visual: int, text: int) -> Tensor:
    """Ids with placeholders of a video in the middle."""
    ids = torch.randint(3, 900, (1, visual + text))
    ids[:, text // 2 : text // 2 + visual] = 1001
    return ids


def stock(options: argparse.Namespace) -> dict:
    """Prefills of stock classes, with and without reducing."""
    tables = {}
    for name, model, given in stock_models(options):
        given["attention_mask"] = torch.ones_like(given["input_ids"])

        def run(keep: float | None, model: PreTrainedModel = model, given: dict = given) -> Form:
            def form() -> None:
                mmllm.reduce(model, None if keep is None else "aim", keep=keep)
                model(**given, use_cache=True, logits_to_keep=1)

            return form

        forms = {"off": run(None), "dropped": run(options.keep)}
        found = measure(forms, options.repeats, torch.device("cpu"))
        found["speedup"] = found["off"]["seconds"] / found["dropped"]["seconds"]
        say(
            f"{name}: {found['off']['seconds']:.2f} s, dropped {found['dropped']['seconds']:.2f} s "
            f"({found['speedup']:.2f} x), {found['off']['megabytes']:.0f} and {found['dropped']['megabytes']:.0f} MB"
        )
        tables[name] = found
    return tables


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, default=1568)
    parser.add_argument("--text", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--merge", type=float, help="share that is left after merging (1: pruning alone)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="of the stock models (default 6)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = (stock if options.stock else end_to_end if options.end_to_end else prefill)(options)
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, **vars(options), "found": found}, default=str))


if __name__ == "__main__":
    main()
