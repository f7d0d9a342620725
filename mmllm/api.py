"""The Python API: load a model, ask it about media."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmllm.contract.arguments import Count, parse
from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.library import pretrained
from mmllm.device import check_device
from mmllm.model.folder import check_generation, check_model_folder, check_tokenizer, model_folder

if TYPE_CHECKING:
    import torch
    from transformers import Pipeline, PreTrainedModel

    from mmllm.eval.report import Report
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor

logger = logging.getLogger(__name__)

EVALUATION: dict[str, Any] = {
    "frames": Count | None,
    "limit": Count | None,
    "tasks": tuple[str, ...],
    "missing": Literal["error", "skip"],
    "baselines": tuple[str, ...],
    "batch_size": Count,
    "progress": Any,
}
"""The arguments of `evaluate` besides the benchmark."""


@dataclass(frozen=True)
class Video:
    """A video for `generate`.

    Attributes:
        path: a local file or a folder of frames.
        start: seconds.
        end: seconds.
        frames: number of frames to sample (default: the model's own sampling).
        fps: frame rate of a folder of frames.
    """

    path: str
    start: float | None = None
    end: float | None = None
    frames: int | None = None
    fps: float | None = None

    def content(self) -> dict[str, Any]:
        """As a content entry of a chat message."""
        fields = {key: value for key, value in vars(self).items() if value is not None}
        return {"type": "video", **fields}


@dataclass(frozen=True)
class Image:
    """An image for `generate`: a local file."""

    path: str

    def content(self) -> dict[str, Any]:
        """As a content entry of a chat message."""
        return {"type": "image", "path": self.path}


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    reduce: str | Path | dict[str, Any] | None = None,
    keep: float | None = None,
) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """Load the (model, processor) of a run folder, a model folder or a published checkpoint, ready to answer.

    Args:
        path: a run folder, a model folder, or a folder or hub id of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision or
            Video-LLaVA in the format of transformers; told apart by config.json.
        device: where to; None = the CPU.
        dtype: number format; "auto" = that of the files.
        reduce, keep: see `mmllm.reduce`.

    Raises:
        UserError: there is no model, a file is damaged, or the weights are not exactly those that the config requires.
    """
    import torch

    from mmllm.model.foreign.convert import family_of, load_published
    from mmllm.model.reduction.setting import read_setting

    check_device(None if device is None else str(device))
    family = family_of(path)
    if family is None:
        folder = model_folder(path)
        model, processor = _load_own(folder, dtype)
    else:
        folder = Path(path)
        model, processor, _ = load_published(path, family, dtype)
    check_generation(model, folder)
    check_tokenizer(processor, folder)
    model = model.eval().to(device) if device else model.eval()
    # sums, since they read the weights once and copy nothing
    bad = [name for name, value in model.named_parameters() if not bool(value.sum(dtype=torch.float32).isfinite())]
    if bad:
        logger.warning(
            "%s: %d of its weights are not finite (%s ...): its answers are meaningless", folder, len(bad), bad[0]
        )
    setting = read_setting(reduce, keep)
    if setting is not None:
        model.model.reduce(setting)
    return model, processor


def _load_own(folder: Path, dtype: torch.dtype | str) -> tuple[MMLLMForConditionalGeneration, MMLLMProcessor]:
    """From a model folder of ours."""
    from mmllm.config.recipe import differences
    from mmllm.model.adapters import ADAPTER, load_adapter
    from mmllm.model.checkpoint import refuse_holes
    from mmllm.model.modeling import MMLLMForConditionalGeneration
    from mmllm.processing.processor import MMLLMProcessor

    check_model_folder(folder)
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = pretrained(MMLLMForConditionalGeneration, str(folder), **options)
        processor = pretrained(MMLLMProcessor, str(folder))
    except (OSError, ValueError) as error:
        raise UserError(folder, f"cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    refuse_holes(folder, info)
    if (folder / ADAPTER).is_dir():
        load_adapter(model, folder / ADAPTER)
    if processor.model_section != model.config.model_section:
        keys = differences(processor.model_section, model.config.model_section)
        raise UserError(folder, f"config.json and processor_config.json differ at {', '.join(keys[:5])}")
    return model, processor


def reduce(
    model: PreTrainedModel, reduce: str | Path | dict[str, Any] | None, keep: float | None = None
) -> PreTrainedModel:
    """Let a loaded model read fewer visual tokens; it is changed in place and returned.

    Args:
        model: one of ours, or a vision-language model of transformers.
        reduce: a reducer by name ("aim", "random", ...), a file or section `{type: aim, l1: 14, ...}`, or None = off.
        keep: the budget beside a name: visual tokens averaged over the LLM's layers, as a share of all.

    Raises:
        UserError: no such reducer, a budget that it cannot meet, or a model that cannot be reduced.
    """
    from mmllm.model.reduction.setting import read_setting
    from mmllm.model.reduction.stock import body_of

    body_of(model).reduce(read_setting(reduce, keep))
    return model


def generate(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    question: str,
    *media: Video | Image | str | os.PathLike,
    max_new_tokens: int = 64,
    stream: bool = False,
    **options: Any,
) -> str | Iterator[str]:
    """The answer to a question about media; with `stream` its pieces as they come.

    Args:
        media: the suffix of a path tells a video from an image; `clip.mp4#t=3,8` means seconds 3 to 8.
        options: passed on to the model's `generate` (`num_beams`, `do_sample`, ...).
    """
    if not isinstance(question, str):
        raise UserError("question", "wrong type", expected="a text", got=shown(question))
    if options.get("return_dict_in_generate") or options.get("num_return_sequences", 1) != 1:
        hint = "model.generate(**processor.apply_chat_template(...))"
        raise UserError("generate", "returns the text of a single answer", hint=hint)
    check_new_tokens(processor, max_new_tokens)
    content = [*(_medium(item).content() for item in media), {"type": "text", "text": question}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device)
    check_new_tokens(processor, max_new_tokens, prompt=batch["input_ids"].shape[1])
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
    if stream:
        return stream_answer(model, processor, batch, **options)
    output = model.generate(**batch, **options)
    return processor.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def check_new_tokens(processor: MMLLMProcessor, count: int, where: str = "max_new_tokens", prompt: int = 0) -> None:
    """Refuse an answer longer than the model can hold after `prompt` tokens.

    Raises:
        UserError: states the longest possible answer.
    """
    most = None if processor.max_length is None else processor.max_length - prompt
    if parse(count, Count, where) > (count if most is None else most):
        behind = f" after a prompt of {prompt} tokens" if prompt else ""
        raise UserError(where, f"more than this model can hold{behind}", expected=f"at most {most}", got=count)


def _medium(given: Video | Image | str | os.PathLike) -> Video | Image:
    """The medium that a path refers to."""
    if isinstance(given, Video | Image):
        return given
    if not isinstance(given, str | os.PathLike):
        raise UserError("media", "wrong type", expected="a path, Video(...) or Image(...)", got=type(given).__name__)
    from mmllm.data.media.types import IMAGE_SUFFIXES, MediaRef

    text = os.fspath(given)
    if Path(text).suffix.lower() in IMAGE_SUFFIXES:
        return Image(text)
    ref = MediaRef.parse("video", text)
    return Video(ref.path, ref.start, ref.end)


def pipeline(path: str | Path, **options: Any) -> Pipeline:
    """transformers' image-text-to-text pipeline of a run folder or a model folder.

    Args:
        options: for the library's `pipeline` (`device`, `batch_size`, `dtype`, ...).

    Raises:
        UserError: there is no model, or a damaged one.
    """
    import transformers

    model, processor = load(path, dtype=options.pop("dtype", "auto"))
    options = {"model": model, "processor": processor, "tokenizer": processor.tokenizer, **options}
    return transformers.pipeline("image-text-to-text", **options)


def stream_answer(
    model: MMLLMForConditionalGeneration, processor: MMLLMProcessor, batch: VisualBatch, **options: Any
) -> Iterator[str]:
    """The answer to one prepared conversation, piece by piece as it is generated; greedy unless `options` differ."""
    options = {"do_sample": False, "num_beams": 1, **options}
    from threading import Event, Thread

    import torch
    from transformers import StoppingCriteria, TextIteratorStreamer

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []
    unheard = Event()

    class Unheard(StoppingCriteria):
        """Stops generating when nobody consumes the pieces any more."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), unheard.is_set(), device=input_ids.device)

    criteria = [*options.pop("stopping_criteria", ()), Unheard()]

    def run() -> None:
        try:
            model.generate(**batch, **options, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # handed to the caller's thread, which would otherwise wait forever
            failed.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:  # a thread still computing at exit would crash the whole program
        unheard.set()
        thread.join()
    if failed:
        raise failed[0]


def evaluate(
    model: MMLLMForConditionalGeneration,
    processor: MMLLMProcessor,
    benchmark: str,
    *,
    root: str | Path,
    out: str | Path | None = None,
    protocol: str = "canonical",
    **options: Any,
) -> Report:
    """Evaluate on a benchmark; returns the report: scores with their floors and denominators.

    Args:
        root: the benchmark's folder.
        out: folder for predictions and report (default: a temporary folder).
        options: `limit`, `tasks` (some of the benchmark's), `missing`, `baselines`, `batch_size`, `frames`, `progress`.

    Raises:
        UserError: unknown benchmark, missing clips, or `out` holds another model's answers.
    """
    import tempfile

    from mmllm.eval.answerer import evaluate_model

    for name, value in options.items():
        if name not in EVALUATION:
            raise UserError(f"evaluate: {name}", "unknown argument", hint=nearest(name, list(EVALUATION)))
        options[name] = parse(value, EVALUATION[name], f"evaluate: {name}")
    for name, value in {"root": root, "out": out or "."}.items():
        if not isinstance(value, str | os.PathLike):
            raise UserError(f"evaluate: {name}", "wrong type", expected="a folder", got=shown(value))
    out = tempfile.mkdtemp(prefix="mmllm-eval-") if out is None else out
    return evaluate_model(model, processor, benchmark, Path(root), Path(out), protocol, **options)
