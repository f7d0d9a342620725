#!/usr/bin/env python
"""The head's scores in chunks against the plain forms: time and peak memory of cross-entropy, KD and DPO.

    python scripts/bench/losses.py                     vocabulary 151,936, width 896, 2,048 scored positions
    python scripts/bench/losses.py --rows 512 --repeats 1 --out losses.json

Each form is a forward and a backward into rows and weight, in a process of its own for its memory (beyond weights,
rows and their gradients), and in turns with the other form for its time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmllm.model.head import Head, log_probs
from mmllm.train.objectives.divergences import forward
from mmllm.train.objectives.preference_losses import Pairs, Settings, sigmoid

Form = Callable[[], Tensor]
TERMS = ("cross_entropy", "distillation", "preference")
PAIRS = 16


class Bench:
    """Rows, a head and a teacher's, and both forms of every loss.

    Args:
        rows: scored positions.
        width: of the hidden states.
        vocabulary: rows of the head.
        device: where it runs.
    """

    def __init__(self, rows: int, width: int, vocabulary: int, device: str) -> None:
        torch.manual_seed(0)
        self.rows = torch.randn(rows, width, device=device, requires_grad=True)
        self.head = Head(width, vocabulary).to(device)
        self.teacher = Head(width, vocabulary).to(device).requires_grad_(False)
        self.theirs = torch.randn(rows, width, device=device)
        self.targets = torch.randint(0, vocabulary, (rows,), device=device)
        self.lengths = torch.full((2 * PAIRS,), rows // (2 * PAIRS), device=device)

    def plain(self, term: str) -> Tensor:
        """All logits at once."""
        logits = self.head(self.rows).float()
        if term == "cross_entropy":
            return nn.functional.cross_entropy(logits, self.targets, reduction="sum")
        if term == "distillation":
            with torch.no_grad():
                theirs = self.teacher(self.theirs).float()
            return forward(logits, theirs).sum()
        tokens = logits.log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]
        return self._preference(tokens, self.lengths)

    def chunked(self, term: str) -> Tensor:
        """The head's own way."""
        groups = None

        def score(logits: Tensor, which: slice) -> dict[str, Tensor]:
            if term == "cross_entropy":
                return {term: -log_probs(logits, self.targets[which]).sum()}
            if term == "distillation":
                with torch.no_grad():
                    theirs = self.teacher(self.theirs[which]).float()
                return {term: forward(logits, theirs).sum()}
            own = int(self.lengths[0])
            lengths = self.lengths[which.start // own : which.stop // own]
            return {term: self._preference(log_probs(logits, self.targets[which]), lengths)}

        if term == "preference":
            groups = self.lengths.view(-1, 2).sum(1).tolist()
        return self.head(self.rows, score, groups=groups)[term]

    @staticmethod
    def _preference(tokens: Tensor, lengths: Tensor) -> Tensor:
        answers = tokens.view(len(lengths), -1).sum(1)
        zero = torch.zeros_like(answers[::2])
        pairs = Pairs(answers[::2], answers[1::2], zero, zero, lengths[::2], lengths[1::2])
        return sigmoid(pairs, Settings(beta=0.01)).sum()

    def step(self, form: str, term: str) -> float:
        """Seconds of a forward and a backward."""
        self.rows.grad = self.head.weight.grad = None
        begin = time.perf_counter()
        getattr(self, form)(term).backward()
        if self.rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def kept(self) -> int:
        """Bytes of the gradients that a step leaves."""
        return sum(value.numel() * value.element_size() for value in (self.rows, self.head.weight))


def peak(options: argparse.Namespace, form: str, term: str) -> float:
    """Megabytes beyond weights, rows and their gradients, in a fresh process."""
    sizes = ["--rows", str(options.rows), "--width", str(options.width), "--vocabulary", str(options.vocabulary)]
    command = [sys.executable, __file__, *sizes, "--device", options.device, "--memory", form, term]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(bench: Bench, form: str, term: str) -> float:
    """The same in this process."""
    if bench.rows.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        bench.step(form, term)
        return (torch.cuda.max_memory_allocated() - before - bench.kept()) / 1e6
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    bench.step(form, term)
    return (_resident("VmHWM") - before) / 1e3 - bench.kept() / 1e6


def _resident(name: str) -> int:
    """Kilobytes, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("FORM", "TERM"), help="print the peak of one form alone")
    options = parser.parse_args()
    bench = Bench(options.rows, options.width, options.vocabulary, options.device)
    if options.memory:
        print(measure_peak(bench, *options.memory))
        return
    found = {}
    for term in TERMS:
        seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
        for turn in range(options.repeats + 1):
            for form in sorted(seconds, reverse=bool(turn % 2)):
                taken = bench.step(form, term)
                if turn:
                    seconds[form].append(taken)
        times = {form: sorted(values)[len(values) // 2] for form, values in seconds.items()}
        memory = {form: peak(options, form, term) for form in seconds}
        found[term] = {
            "seconds": times,
            "megabytes": memory,
            "time": times["chunked"] / times["plain"],
            "memory": memory["chunked"] / memory["plain"],
        }
        print(
            f"{term}: {times['chunked']:.2f} s against {times['plain']:.2f} s ({found[term]['time']:.2f} x), "
            f"{memory['chunked']:.0f} MB against {memory['plain']:.0f} MB ({found[term]['memory']:.3f} x)",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, **vars(options), "found": found}, default=str))


if __name__ == "__main__":
    main()
