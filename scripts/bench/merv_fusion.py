"""MERV's cross-attentive fusion: the exact cheap form against the authors', side by side in one run.

    python scripts/bench/merv_fusion.py --out merv_fusion.json

Both get the same streams and the same weights. Seconds of forward and backward are medians over alternating turns.
Memory is measured twice: what autograd keeps for the backward pass, and the peak of a child process that runs one
form once, minus what it held after its imports; streams, weights and gradients are included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmllm.contract.parts import Part

FORMS = ("reference", "cheap")
MIB = 2**20


def make(options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """The streams [B, T, d], and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens, options.width)
    rows = [torch.randn(shape, generator=generator).to(options.device) for _ in range(options.encoders + 1)]
    return [row.requires_grad_() for row in rows[:-1]], rows[-1]


def build(form: str, options: argparse.Namespace) -> Part:
    """One form of the fusion, with the authors' random weights."""
    from mmllm.contract.parts import Site
    from mmllm.contract.registry import find
    from mmllm.contract.types import MediaSpec, TokenSpec

    specs = (TokenSpec(MediaSpec("video", 1), options.tokens, options.width),) * options.encoders
    part = find("connector", "cross_attentive_fusion")
    torch.manual_seed(0)
    return part(Site(specs, options.width), attn_dim=options.attn_dim, reference=form == "reference").to(options.device)


def step(part: Part, streams: list[Tensor], upstream: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Forward and backward: output, weights, gradients of the streams."""
    out, weights = part.mix(streams)
    wanted = [*streams, *part.parameters()]
    gradients = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
    if out.is_cuda:
        torch.cuda.synchronize()
    return out.detach(), weights.detach(), list(gradients[: len(streams)])


def kept(part: Part, streams: list[Tensor]) -> float:
    """MiB that autograd keeps for the backward pass, weights and streams included, each storage once."""
    sizes: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        result = part.mix(streams)  # hold it, or the storages' addresses would be reused
    del result
    return sum(sizes.values()) / MIB


def child(form: str, options: argparse.Namespace) -> None:
    """Run one form once and print its peak memory in MiB."""
    import mmllm.connectors.merv.fusion  # noqa: F401 - imports are not what is measured

    torch.ones(64, 64) @ torch.ones(64, 64)
    cuda = torch.device(options.device).type == "cuda"
    before = 0 if cuda else resident("VmRSS")
    streams, upstream = make(options)
    step(build(form, options), streams, upstream)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    print((peak - before) / MIB)


def resident(which: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM; `getrusage` would count the parent's peak), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def peak_mib(form: str) -> float:
    """The peak of a child process with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", form]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both forms on the same streams."""
    streams, upstream = make(options)
    parts = {form: build(form, options) for form in FORMS}
    parts["cheap"].load_authors(parts["reference"].attention.state_dict())
    results = {form: step(part, streams, upstream) for form, part in parts.items()}
    (out, weights, gradients), (out2, weights2, gradients2) = results.values()
    differences = {
        "output": float((out - out2).abs().max()),
        "weights": float((weights - weights2).abs().max()),
        "gradients": max(float((a - b).abs().max()) for a, b in zip(gradients, gradients2, strict=True)),
    }
    largest = {"output": float(out.abs().max()), "gradients": max(float(value.abs().max()) for value in gradients)}
    del results, out, out2, gradients, gradients2
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(options.turns):
        for form in sorted(FORMS, reverse=bool(turn % 2)):
            start = time.perf_counter()
            step(parts[form], streams, upstream)
            seconds[form].append(time.perf_counter() - start)
    forms = {
        form: {
            "seconds": statistics.median(seconds[form]),
            "parameters": sum(value.numel() for value in parts[form].parameters()),
            "saved_mib": kept(parts[form], streams),
        }
        for form in FORMS
    }
    return {"forms": forms, "largest_difference": differences, "largest_value": largest}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--encoders", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--attn-dim", type=int, default=3072)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    result = compare(options)
    for form, facts in result["forms"].items():
        facts["peak_mib"] = peak_mib(form)
    reference, cheap = (result["forms"][form] for form in FORMS)
    result["faster"] = reference["seconds"] / cheap["seconds"]
    result["share_of_peak"] = cheap["peak_mib"] / reference["peak_mib"]
    result["share_of_saved"] = cheap["saved_mib"] / reference["saved_mib"]
    names = ("batch", "encoders", "tokens", "width", "attn_dim", "device")
    result |= {name: getattr(options, name) for name in names} | {"threads": torch.get_num_threads()}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
