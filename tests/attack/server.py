"""Runs cases in processes forked from this one, which has imported everything: an input costs what it does itself."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from attack.bench import Bench
from attack.case import HARNESS, Case, Name, Ran, Verdict, judge

MEMORY = 6 << 30
"""Bytes of private memory that a case may ask for; above, the allocation fails."""
FILE = 2 << 30
"""Bytes of the largest file that a case may write."""
FORK = multiprocessing.get_context("fork")


def import_everything() -> None:
    """Import what a command may need, so that the forked processes need not; starts no thread."""
    import torch

    torch.set_num_threads(1)
    import mmllm

    for module in pkgutil.walk_packages(mmllm.__path__, "mmllm."):
        if not module.name.endswith(("__main__", "guard_child")):
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(module.name)
    others = ("accelerate", "matplotlib.figure", "transformers.generation", "transformers.trainer")
    for name in (*others, *(f"transformers.models.{llm}.modeling_{llm}" for llm in ("llama", "qwen3"))):
        importlib.import_module(name)


def forked(target: Callable[..., Any], *arguments: Any) -> None:
    """Call something in a process of its own and wait for it.

    Raises:
        RuntimeError: it failed.
    """
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target.__name__} ended with {process.exitcode}")


@dataclass
class _Running:
    name: Name
    process: Any
    folder: Path
    began: float = field(default_factory=time.monotonic)


def run_cases(
    names: Sequence[Name],
    bench: Bench,
    scratch: Path,
    *,
    workers: int = 2,
    limit: float = 60.0,
    keep: bool = False,
    told: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """The verdicts of cases, in the order in which they ended.

    Args:
        scratch: where each case gets a folder of its own. keep: leave the folders of the bad ones.
        workers: how many run at a time. limit: seconds after which one is stopped.
        told: called with each verdict as it comes.
    """
    left, running, verdicts = list(reversed(names)), [], []
    try:
        while left or running:
            while left and len(running) < workers:
                running.append(_start(left.pop(), bench, scratch))
            wait([one.process.sentinel for one in running], timeout=0.5)
            for one in list(running):
                late = time.monotonic() - one.began > limit
                if one.process.is_alive() and not late:
                    continue
                running.remove(one)
                verdict = _finish(one, late and one.process.is_alive())
                if not keep or verdict.column in ("answered", "refused"):
                    shutil.rmtree(one.folder, ignore_errors=True)
                verdicts.append(verdict)
                told(verdict)
    finally:
        for one in running:
            end(one.process)
    return verdicts


def _start(name: Name, bench: Bench, scratch: Path) -> _Running:
    folder = scratch / str(name)
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("work", "home", "tmp"):
        (folder / part).mkdir(parents=True)
    process = FORK.Process(target=_child, args=(name, bench, folder))
    process.start()
    return _Running(name, process, folder)


def _finish(one: _Running, late: bool) -> Verdict:
    """End a case and judge it."""
    seconds = time.monotonic() - one.began
    end(one.process)
    made = _read(one.folder / "case.json")
    result = _read(one.folder / "result.json")
    texts = {name: _text(one.folder / name) for name in ("stdout", "stderr")}
    failed = made.get("harness") or result.get("harness") or ("" if made else f"ended with {one.process.exitcode}")
    if failed:
        return Verdict(str(one.name), one.name.generator, one.name.seed, HARNESS, failed, made.get("note", ""))
    code = result.get("code", one.process.exitcode)
    ran = Ran(-signal.SIGKILL if code is None else code, texts["stdout"], texts["stderr"], seconds, late)
    case = Case(made["argv"], made["note"], made["expect"], reports=made["reports"])
    column, why = judge(case, ran, result.get("complaint"))
    lines = [line for line in texts["stderr"].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return Verdict(
        name=str(one.name),
        generator=one.name.generator,
        seed=one.name.seed,
        column=column,
        why=why,
        note=case.note,
        argv=case.argv,
        code=ran.code,
        seconds=round(seconds, 2),
        last=(errors or lines or [""])[-1][:300],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _descendants(pid: int) -> list[int]:
    """Processes below one, by the system's own lists."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def end(process: Any) -> None:
    """End a process and all that it has started."""
    below = _descendants(process.pid) if process.is_alive() else []
    for pid in below:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()


def _child(name: Name, bench: Bench, folder: Path) -> None:
    """Make a case, run it, look at what came of it; everything goes into files of its folder."""
    from attack.generators import GENERATORS

    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder / "work")
    os.environ.update(HOME=str(folder / "home"), XDG_CACHE_HOME=str(folder / "home/cache"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    try:
        case = GENERATORS[name.generator].case(name, folder / "work", bench)
        made = {"argv": case.argv, "note": case.note, "expect": case.expect, "reports": case.reports}
    except BaseException:
        made = {"harness": traceback.format_exc()}
    _write(folder / "case.json", made)
    if "harness" in made:
        return
    began = time.monotonic()
    code = run_case(case, folder)
    ran = Ran(code, _text(folder / "stdout"), _text(folder / "stderr"), time.monotonic() - began)
    result: dict[str, Any] = {"code": code}
    try:
        result["complaint"] = case.check(ran) if case.check is not None else None
    except BaseException:
        result["harness"] = traceback.format_exc()
    _write(folder / "result.json", result)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def run_case(case: Case, folder: Path) -> int:
    """Run a case's command here, with its streams in files of a folder; returns the exit code."""
    from mmllm.cli import main

    (folder / "stdin").write_text("y\n" * 1000 if case.yes else "")
    fresh = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", fresh), (2, "stderr", fresh)):
        file = os.open(folder / name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # as Python has it
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    sys.argv = ["mmllm", *case.argv]
    try:
        code = case.call() if case.call is not None else main(case.argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def verdict_rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Verdicts ready for JSON."""
    return [asdict(verdict) for verdict in verdicts]
