"""The command `mmllm`: one module per verb, results on stdout, progress on stderr, errors in one line."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from mmllm.contract.errors import UserError
from mmllm.contract.files import disk_error
from mmllm.contract.library import trusting_remote_code
from mmllm.progress import say

VERBS = {
    "recipe": "list, show and check recipes",
    "world": "make NanoWorld, show it",
    "data": "check training data and its media",
    "train": "train a recipe's stages",
    "eval": "evaluate on benchmarks",
    "ask": "ask a model about videos and images",
    "convert": "published checkpoints into ours, and back",
    "flops": "what an answer costs, by arithmetic",
    "inspect": "look inside a model while it watches",
    "lab": "compare recipes over seeds",
    "doctor": "versions, back ends, and what is missing",
}
EPILOG = """\
examples:
  mmllm recipe list
  mmllm world make --out runs/world --level nano
  mmllm train nano/llava --out runs/mine
  mmllm eval --model runs/mine --tasks mvbench,mlvu
  mmllm ask --model runs/mine --video clip.mp4 "What does the red square do?"

exit codes: 0 done, 1 a bug, 2 the input does not fit, 3 done with holes, 130 or 143 stopped and saved
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Print what does not fit, and exit with 2."""
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}. Try: {self.prog} --help\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        SystemExit: it does not parse; stderr says why.
    """
    verb = next((word for word in arguments if not word.startswith("-")), None)
    parser = Parser(
        prog="mmllm",
        description="Build, train, evaluate and ask video and image LLMs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        command = verbs.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == verb:
            importlib.import_module(f"mmllm.cli.{name}").configure(command)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one contiguous run only; overrides may appear anywhere.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unknown: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *overrides]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a name or an answer need not be in the terminal's character set
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # no child process imports files from its working folder
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped\n")
        return 130
    except BrokenPipeError:  # the shell's code for a program ended by SIGPIPE
        return 141
    except Exception as error:
        found = disk_error(error) if isinstance(error, OSError) else _out_of_memory(error)
        if found is not None:
            print(f"error: {found}", file=sys.stderr)
            return 2
        return _crash(error, Path(getattr(options, "out", None) or "."))


def _out_of_memory(error: Exception) -> UserError | None:
    """A lack of memory as a user error; torch reports it in error types of its own."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return UserError("memory", f"out of memory ({text})", hint="fewer frames, a smaller batch or a smaller model")
    return None


def _run(options: argparse.Namespace) -> int:
    from mmllm.contract.registry import load_plugin

    for plugin in getattr(options, "plugin", None) or []:
        load_plugin(plugin)
    with trusting_remote_code(getattr(options, "trust_remote_code", False)):
        return options.run(options)


def _version() -> str:
    from mmllm import __version__

    return f"mmllm {__version__}"


def _crash(error: Exception, out: Path) -> int:
    from mmllm.contract.registry import plugins, raised_at

    text = traceback.format_exc()
    file = (out if out.is_dir() else Path(".")) / "crash.txt"
    try:
        file.write_text(text, encoding="utf-8")
        where = f"in {file}"
    except OSError as reason:  # no space for it, which may be why it crashed
        where = f"here, since {file} cannot be written ({reason.strerror}):\n{text}"
    last = text.strip().splitlines()[-1]
    line = next(filter(None, (raised_at(error, plugin) for plugin in plugins())), None)
    whose = f"raised below {line}" if line else "this is a bug of mmllm"
    print(f"error: {last}\n{whose}; the traceback is {where}", file=sys.stderr)
    return 1
