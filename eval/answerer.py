"""A model as an answerer, and the single entry point for evaluating a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmllm.contract.errors import UserError, nearest
from mmllm.contract.files import held, read_record, write_json
from mmllm.contract.registry import plugins
from mmllm.eval.benchmarks import find_benchmark
from mmllm.eval.likelihood import option_ids, score_options
from mmllm.eval.protocol import PROTOCOLS, Protocol
from mmllm.eval.report import Report
from mmllm.eval.runner import run_benchmark
from mmllm.model.checkpoint import weights_digest
from mmllm.model.reduction.read import tokens_read

if TYPE_CHECKING:
    from mmllm.contract.grounding import Coordinates
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor

SUBJECT = "subject.json"
"""The file that records whose answers a folder holds."""


class ModelAnswerer:
    """Answers conversations in batches, greedily, left-padded.

    Args:
        model, processor: as returned by `mmllm.load`.
        sampler: the protocol's frame sampler, whatever the model's own; None = the model's own.
        frames: per video, where a call gives no number; None = the model's own number.

    Attributes:
        damaged: files in which the decoder has found damaged frames so far.
        visual_tokens: of each conversation of the last call, how many were read, averaged over the LLM's layers.
    """

    def __init__(
        self,
        model: MMLLMForConditionalGeneration,
        processor: MMLLMProcessor,
        sampler: str | None = None,
        frames: int | None = None,
    ) -> None:
        self.model, self.processor, self.sampler, self.frames = model, processor, sampler, frames
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._ahead: list[tuple[Any, Future]] = []
        self.damaged: set[str] = set()
        self.visual_tokens: list[float] = []

    @property
    def vocabulary(self) -> Coordinates | None:
        """The coordinates that it writes, or None."""
        return self.processor.plan.vocabulary

    def prefetch(self, conversations: list[list[dict]], *, frames: int | None) -> None:
        """Read and tokenise the next questions while the model is still answering."""
        coming = ((conversations, frames), self._pool.submit(self._prepare, conversations, frames))
        self._ahead = [*self._ahead[-1:], coming]

    @torch.inference_mode()
    def __call__(self, conversations: list[list[dict]], *, frames: int | None, max_new_tokens: int) -> list[str]:
        """One raw response per conversation; `frames` overrides the number of frames."""
        batch = self._taken(conversations, frames).to(self.model.device)
        self.damaged |= {clip["damaged"] for clip in batch["visual"]["media"] if "damaged" in clip}
        output = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        self._note(batch)
        answers = output[:, batch["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def score_options(
        self, conversations: list[list[dict]], options: list[list[str]], *, frames: int | None
    ) -> list[list[float]]:
        """For each conversation the summed log-probability of each option as the answer."""
        ids = [option_ids(self.processor, asked, some) for asked, some in zip(conversations, options, strict=True)]
        batch = self._taken(conversations, frames).to(self.model.device)
        self.damaged |= {clip["damaged"] for clip in batch["visual"]["media"] if "damaged" in clip}
        scores = score_options(self.model, batch, ids)
        self._note(batch)
        return scores

    def _note(self, batch: VisualBatch) -> None:
        self.visual_tokens = [sum(layers) / len(layers) for layers in tokens_read(self.model, batch)]

    def _taken(self, conversations: list[list[dict]], frames: int | None) -> VisualBatch:
        """The batch that was prepared ahead, if it is this one."""
        for index, (asked, prepared) in enumerate(self._ahead):
            if asked == (conversations, frames):
                self._ahead = self._ahead[index + 1 :]
                return prepared.result()
        return self._prepare(conversations, frames)

    def _prepare(self, conversations: list[list[dict]], frames: int | None) -> VisualBatch:
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"frames": frames or self.frames, "sampler": self.sampler, "padding_side": "left"},
        )


def evaluate_model(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    benchmark: str,
    root: Path,
    out: Path,
    protocol: str = "canonical",
    *,
    frames: int | None = None,
    limit: int | None = None,
    tasks: tuple[str, ...] = (),
    missing: Literal["error", "skip"] = "error",
    baselines: tuple[str, ...] = ("blind", "single_frame"),
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate below `out/BENCHMARK/PROTOCOL-HASH/`; an interrupted evaluation continues.

    A different number of frames, root or reducer gets its own folder beside it.

    Raises:
        UserError: unknown benchmark or protocol, the folder holds answers of another model, or is in use.
    """
    chosen, items = find_protocol(protocol), find_benchmark(benchmark)
    subject = {**subject_of(model, processor), "frames": frames, "root": str(root.resolve())}
    setting = {key: subject[key] for key in ("frames", "root", "reduce")}
    folder = _folder(out / benchmark / chosen.folder, setting)
    with held(folder):
        _same_subject(folder, subject)
        return run_benchmark(
            items,
            root,
            ModelAnswerer(model, processor, chosen.sampler, frames),
            folder,
            chosen,
            baselines=baselines,
            limit=limit,
            tasks=tasks,
            missing=missing,
            batch_size=batch_size,
            progress=progress,
            subject=subject,
        )


def subject_of(model: MMLLMForConditionalGeneration, processor: MMLLMProcessor) -> dict[str, Any]:
    """What answers depend on besides the question: weights, number format, front end, reducer, tokenizer, and so on."""
    tokenizer, reduction = processor.tokenizer, getattr(model, "reduction", None)
    decoding = model.generation_config.to_dict()
    return {
        "weights": weights_digest(model),
        "dtype": str(model.dtype),
        "front_end": _digest(processor.model_section),
        "reduce": None if reduction is None else reduction.section,
        "tokenizer": _digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]),
        "decoding": _digest({key: value for key, value in decoding.items() if key != "transformers_version"}),
        "reader": [processor.loader.reader.backend, processor.loader.reader.corrupt],
        "plugins": sorted(_digest(path.read_text(encoding="utf-8")) for path in plugins()),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _folder(base: Path, setting: dict[str, Any]) -> Path:
    """The folder of answers with this setting: a protocol's first setting has its folder, others get one beside it."""
    path = base / SUBJECT
    if not path.is_file():
        return base
    known = read_record(path)
    if all(known.get(key) == value for key, value in setting.items()):
        return base
    return base.with_name(f"{base.name}-{_digest(setting)[:8]}")


def find_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        UserError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}", "no such protocol", hint=nearest(name, list(PROTOCOLS)))
    return PROTOCOLS[name]


def _same_subject(folder: Path, subject: dict[str, Any]) -> None:
    path = folder / SUBJECT
    if path.is_file():
        old = read_record(path)
        different = [key for key in subject if old.get(key) != subject[key]]
        if different:
            raise UserError(
                folder, f"holds answers of another run; these differ: {', '.join(different)}", hint="--out NEW"
            )
        return
    write_json(path, subject)
