"""The Python API: load a model, ask it about media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.contract.errors import UserError


@dataclass(frozen=True)
class Video:
    """A video for `generate`.

    Attributes:
        path: a local file or a folder of frames. start, end: seconds. frames: how many to sample (default: the
            model's own sampling). fps: of a folder of frames.
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


def model_folder(path: str | Path) -> Path:
    """The model folder that a run folder or a model folder means.

    Raises:
        UserError: there is no model.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    what = "no model in this folder" if path.is_dir() else "no such folder"
    raise UserError(
        path, what, expected="a run folder or a model folder", hint="mmllm train nano/llava --out runs/mine"
    )


def load(path: str | Path, *, device: str | None = None, dtype: Any = "auto") -> tuple[Any, Any]:
    """(model, processor) of a run folder or a model folder, ready to answer.

    Raises:
        UserError: no model there, or its weights are not exactly those that its config needs.
    """
    from mmllm.model import MMLLMForConditionalGeneration
    from mmllm.processing import MMLLMProcessor

    folder = model_folder(path)
    model, info = MMLLMForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    _refuse_holes(folder, info)
    processor = MMLLMProcessor.from_pretrained(folder)
    if processor.model_section != model.config.model_section:
        from mmllm.recipe import differences

        keys = differences(processor.model_section, model.config.model_section)
        raise UserError(folder, f"config.json and processor_config.json differ at {', '.join(keys[:5])}")
    return model.eval().to(device) if device else model.eval(), processor


def load_weights(model: Any, path: str | Path, modules: list[Any] | None = None) -> None:
    """The weights of another run into a model of the same recipe, or into some of its modules.

    Raises:
        UserError: they do not fit; lists missing, unexpected and mismatched keys.
    """
    from safetensors.torch import load_file

    folder = model_folder(path)
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    own = model.state_dict()
    if modules is not None:
        inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is one for one in modules))
        own, state = ({key: side[key] for key in side if key.startswith(inside)} for side in (own, state))
        if not own:
            raise UserError(folder, f"nothing to take: {' and '.join(inside)} has no weights")
    tied = set(model.all_tied_weights_keys or {})
    mismatched = [
        (key, state[key].shape, own[key].shape) for key in own if key in state and state[key].shape != own[key].shape
    ]
    info = {
        "missing_keys": [key for key in own if key not in state and key not in tied],
        "unexpected_keys": [key for key in state if key not in own],
        "mismatched_keys": mismatched,
    }
    _refuse_holes(folder, info)
    model.load_state_dict(state, strict=False)


def _refuse_holes(folder: Path, info: dict[str, Any]) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else _shapes(*key) for key in info[kind])
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{len(keys)} {kind.split('_')[0]}: {', '.join(keys[:4])}{more}")
    if problems:
        raise UserError(folder, "checkpoint of another recipe; " + "; ".join(problems))


def _shapes(key: str, found: Sequence[int], own: Sequence[int]) -> str:
    return f"{key} is {list(found)}, expected {list(own)}"


def generate(
    model: Any,
    processor: Any,
    question: str,
    *media: Video | Image,
    max_new_tokens: int = 64,
    stream: bool = False,
    **options: Any,
) -> str | Iterator[str]:
    """The answer to a question about media; with `stream` its pieces as they come.

    Args:
        options: passed on to the model's `generate` (`num_beams`, `do_sample`, ...).
    """
    content = [*(item.content() for item in media), {"type": "text", "text": question}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    ).to(model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
    if stream:
        return stream_answer(model, processor, batch, **options)
    output = model.generate(**batch, **options)
    return processor.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def stream_answer(model: Any, processor: Any, batch: Any, **options: Any) -> Iterator[str]:
    """The answer to one prepared conversation, piece by piece as it is generated; greedy unless `options` say else."""
    options = {"do_sample": False, **options}
    from threading import Thread

    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(**batch, **options, streamer=streamer)
        except BaseException as error:  # handed to the caller's thread, which would else wait for ever
            failed.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]


def evaluate(
    model: Any,
    processor: Any,
    benchmark: str,
    *,
    root: str | Path,
    out: str | Path | None = None,
    protocol: str = "canonical",
    **options: Any,
) -> Any:
    """A benchmark's report: scores with their floors and denominators.

    Args:
        root: the benchmark's folder. out: where predictions and report go (default: a temporary folder).
        options: `limit`, `missing`, `baselines`, `batch_size`, `frames`, `progress`.

    Raises:
        UserError: unknown benchmark, clips missing, or `out` holds another model's answers.
    """
    import tempfile

    from mmllm.eval.answerer import evaluate_model

    out = tempfile.mkdtemp(prefix="mmllm-eval-") if out is None else out
    return evaluate_model(model, processor, benchmark, Path(root), Path(out), protocol, **options)
