"""Flags and conventions that the verbs share."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmllm.contract.arguments import Seed, Within, parse
from mmllm.contract.errors import UserError

if TYPE_CHECKING:
    from mmllm.data.media.damage import OnDamage
    from mmllm.data.media.guard import GuardedReader
    from mmllm.data.media.types import MediaRef
    from mmllm.processing.collate import VisualBatch
    from mmllm.processing.processor import MMLLMProcessor


def flag(annotation: Any) -> Callable[[str], Any]:
    """A reader of a flag's text for argparse, by the annotation, as for a recipe's arguments."""

    def read(text: str) -> Any:
        try:
            return parse(text, annotation, "")
        except UserError as error:
            raise argparse.ArgumentTypeError(f"{error.what}, expected {error.expected}, got {text[:80]!r}") from None

    return read


def given_path(text: str) -> Path:
    """Reader of the path of a file or folder for argparse: an empty one would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty, expected a path")
    return Path(text)


def common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of the common flags by name."""
    flags: dict[str, dict[str, Any]] = {
        "--json": {"action": "store_true", "help": "print one JSON object on stdout"},
        "--quiet": {"action": "store_true", "help": "no progress on stderr"},
        "--plugin": {"action": "append", "metavar": "FILE.py", "help": "a file that registers parts (may repeat)"},
        "--jobs": {"type": flag(Annotated[int, Within(least=0, most=1024)]), "help": "worker processes"},
        "--seed": {"type": flag(Seed), "default": 0, "help": "random seed (default 0)"},
        "--device": {"help": "cpu, cuda, cuda:1, ... (default: an accelerator if there is one)"},
        "--dtype": {"choices": ["float32", "bfloat16", "float16"], "help": "number format"},
        "--cache-dir": {"type": given_path, "help": "where shared work is kept (default ~/.cache/mmllm)"},
        "--trust-remote-code": {"action": "store_true", "help": "run Python code that comes with a model or tokenizer"},
        "--dry-run": {"action": "store_true", "help": "check everything, load no weights, write nothing"},
    }
    for name in names:
        parser.add_argument(name, **flags[name])


def reader_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verbs that read media."""
    parser.add_argument("--backend", default="pyav", help="video decoder: pyav (default), decord, or a plug-in's")
    limit = {"type": flag(Annotated[float, Within(above=0, most=86_400)]), "default": 60.0, "metavar": "SECONDS"}
    parser.add_argument("--time-limit", **limit, help="time limit per file (default 60)")
    what = "refuse clips whose frames the decoder finds damaged, or read them and warn (default warn)"
    parser.add_argument("--corrupt", choices=["error", "warn"], default="warn", help=what)


def media_reader(backend: str, seconds: float, corrupt: OnDamage = "warn") -> GuardedReader:
    """The reader that these flags describe.

    Raises:
        UserError: no such back end, one that cannot detect the damage to refuse, or an impossible time limit.
    """
    from mmllm.contract.registry import find, plugins
    from mmllm.data.media.guard import GuardedReader
    from mmllm.data.media.limits import Limits

    find("backend", backend, f"--backend {backend}")
    return GuardedReader(backend, Limits(timeout=seconds), plugins(), corrupt)


def question_about(
    processor: MMLLMProcessor, media: list[MediaRef], question: str, **sampling: float | None
) -> VisualBatch:
    """The prompt of a question about media, ready for a model.

    Args:
        sampling: `frames` or `fps` of every video; None = the model's own.
    """
    content: list[dict[str, Any]] = [
        {"type": ref.kind, "path": ref.path, "start": ref.start, "end": ref.end, "fps": ref.fps} for ref in media
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs=sampling,
    )


def reduce_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verbs whose model may read fewer visual tokens."""
    what = "none, random, stride, pool, merge, pixels, aim, fastv, divprune, visionzip, or a file {type: aim, ...}"
    parser.add_argument("--reduce", action="append", metavar="NAME", help=f"{what} (may repeat)")
    what = "visual tokens averaged over the LLM's layers, as a share of all: one budget for all --reduce"
    parser.add_argument("--keep", type=flag(Annotated[float, Within(above=0, most=1)]), metavar="SHARE", help=what)


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """{name: section of a reducer, or None} for every `--reduce`; one without any where none is given.

    Raises:
        UserError: no budget, one for nothing, or a reducer given twice.
    """
    from mmllm.model.reduction.setting import build_reducer, label, read_setting

    given = options.reduce or ["none"]
    plain = [name for name in given if name != "none" and not name.endswith((".yaml", ".yml"))]
    if options.keep is not None and not plain:
        raise UserError("--keep", "nothing to keep less of", expected="a --reduce by name beside it")
    sections = [read_setting(name, options.keep if name in plain else None) for name in given]
    for section in sections:
        if section is not None:
            build_reducer(section)  # what it does not take is said before anything is loaded
    found = {label(section): section for section in sections}
    if len(found) < len(given):
        raise UserError("--reduce", "given twice", got=", ".join(given))
    return found


SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def cache_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verbs that read many media more than once."""
    what = "keep frames, features (of frozen encoders) or frames,features on disk"
    parser.add_argument("--cache", default="", metavar="WHAT", help=what)
    parser.add_argument("--cache-size", default="50GB", help="size limit of each (default 50GB)")


def kept_kinds(options: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """The values of `--cache` and `--cache-size`: kinds of caches, and bytes.

    Raises:
        UserError: an unknown kind, or not a size.
    """
    kinds = tuple(kind for kind in options.cache.split(",") if kind)
    for kind in kinds:
        if kind not in ("frames", "features"):
            raise UserError(f"--cache {kind}", "unknown", expected="frames, features or frames,features")
    text = options.cache_size.strip().upper()
    number, unit = text[:-2], text[-2:]
    try:
        size = int(float(number) * SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--cache-size {options.cache_size}", "not a size", expected="a number and MB, GB or TB")
    return kinds, size


def cache_dir(options: argparse.Namespace) -> Path:
    """The cache folder: the flag, otherwise XDG_CACHE_HOME/mmllm, otherwise ~/.cache/mmllm."""
    if options.cache_dir is not None:
        return options.cache_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmllm"


def calm_libraries() -> None:
    """Silence the libraries' progress bars and chatter: stderr is for what the user asked for."""
    import logging

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("transformers", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its own level when it is imported, and writes to stdout.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()


def print_json(value: object) -> None:
    """Print one object on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def pairs(values: list[str] | None, flag: str) -> dict[str, str]:
    """Parse `NAME=VALUE` flags into a dict.

    Raises:
        UserError: one has no `=`.
    """
    result = {}
    for value in values or []:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise UserError(f"{flag} {value}", "not of the form NAME=VALUE")
        if name in result:
            raise UserError(f"{flag} {value}", f"{name} is given twice", got=result[name])
        result[name] = rest
    return result
