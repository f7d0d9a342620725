"""Running a study: every arm with every seed, one process at a time or several; finished work is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from mmllm.config.recipe import differences
from mmllm.contract.documents import read_yaml
from mmllm.contract.errors import UserError
from mmllm.contract.files import read_record, write_json, write_text
from mmllm.eval.report_files import report_name
from mmllm.lab.settings import commands
from mmllm.lab.study import StudyFile
from mmllm.progress import Progress
from mmllm.run_folder import RunFolder

if TYPE_CHECKING:
    from types import FrameType

THEN = "then.txt"
"""In the run folder of a preliminary run: its follow-up command, once that has succeeded."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C."""


@dataclass(frozen=True)
class Run:
    """One arm, or one preliminary run, with one seed, in its own folder."""

    arm: str
    seed: int
    out: Path

    @property
    def label(self) -> str:
        """Its name in progress lines and errors."""
        return f"{self.arm} seed {self.seed}"


class Lab:
    """Runs the unfinished parts of a study.

    Args:
        file: the study.
        out: its folder.
        cache: where shared stages are kept.
        device: passed on to the verbs.
        quiet: no progress.
        jobs: runs at a time; None = one per GPU, or one.
    """

    def __init__(
        self,
        file: StudyFile,
        out: Path,
        *,
        cache: Path,
        device: str | None = None,
        jobs: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.file, self.out, self.cache, self.device, self.quiet = file, out, cache, device, quiet
        self.slots = _slots(device, jobs)
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()
        # seeds in the outer loop: if killed midway, all arms have about the same number of seeds
        self.runs = [self._run_of(arm, seed) for seed in file.study.seeds for arm in file.arms]
        self.first = [self._run_of(name, seed) for seed in file.study.seeds for name in file.first]

    def _run_of(self, arm: str, seed: int) -> Run:
        return Run(arm, seed, self.out / "runs" / f"{arm}-{seed}")

    def todo(self) -> list[Run]:
        """The unfinished runs, in the order in which they start: preliminary runs, with all seeds, before any arm."""
        arms = [run for run in self.runs if self.result(run) is None]
        needed = {one for run in arms for one in self._before(run)}
        return [run for run in self.first if run in needed and not self._trained(run)] + arms

    def _before(self, run: Run) -> list[Run]:
        """The runs that must be trained before an arm."""
        return [one for one in self.first if one.seed == run.seed] if run.arm in self.file.arms else []

    def run_all(self) -> list[UserError]:
        """Train and evaluate; a failing run does not stop the others, and its error is in the returned list."""
        todo, count = self.todo(), len(self.first) + len(self.runs)
        progress = Progress("run", count, start=count - len(todo), quiet=self.quiet, every=0.0)
        free: Queue[dict[str, str]] = Queue()
        for slot in self.slots:
            free.put(slot)
        with ThreadPoolExecutor(len(self.slots)) as pool, _terminated_as_interrupt():
            # a run waiting for another cannot block it: the other was submitted earlier, and has started
            waiting: dict[Run, Future] = {}
            failed: dict[str, UserError] = {}  # by message: arms that waited for a failed run raise the same error
            for run in todo:
                before = [waiting[one] for one in self._before(run) if one in waiting]
                waiting[run] = pool.submit(self._run, run, free, before)
            try:
                for done, future in enumerate(as_completed(waiting.values()), start=count - len(todo) + 1):
                    try:
                        progress.update(done, {"finished": future.result().label})
                    except UserError as error:
                        failed[str(error)] = error
                        progress.update(done, {"failed": error.where})
            except BaseException:
                self._stop(list(waiting.values()))
                raise
        progress.close()
        return list(failed.values())

    def _stop(self, waiting: list[Future]) -> None:
        """Start nothing more, and ask running runs to save and end."""
        self.stopping.set()
        for future in waiting:
            future.cancel()
        running = list(self.running)
        if running and not self.quiet:
            print(f"waiting for {len(running)} of the runs to save and end", file=sys.stderr)
        for process in running:
            process.terminate()

    def result(self, run: Run) -> dict[str, dict[str, Any]] | None:
        """{title of a setting: {benchmark: average, ...}} of a finished run, otherwise None."""
        found = {}
        for title, setting in self.file.settings.items():
            path = setting.place(run.out) / f"{report_name(self.file.study.limit)}.json"
            if not path.is_file():
                return None
            self._refuse_another(run)
            reported = read_record(path).get("benchmarks", {})
            found[title] = {
                task: own for task in self.file.study.tasks if (own := _of_task(reported, task)) is not None
            }
        complete = all(task in own for own in found.values() for task in self.file.study.tasks)
        return found if complete else None

    def _trained(self, run: Run) -> bool:
        """Whether a preliminary run has finished all its stages and its follow-up command."""
        finished = RunFolder(run.out).status["stages"]
        if finished:
            self._refuse_another(run)
        if command := self.file.then_of(run.arm, run.out):
            path = run.out / THEN
            if not path.is_file() or path.read_text().strip() != shlex.join(command):
                return False
        return all(stage in finished for stage in self.file.recipes[run.arm].stages)

    def _facts(self, run: Run) -> dict[str, Any]:
        """What a run's scores depend on, as plain JSON; machine and number format are left to the user."""
        recipes, before = self.file.recipes, self._before(run)
        facts: dict[str, Any] = {"recipe": recipes[run.arm].data}
        if run.arm in self.file.arms:
            facts["limit"] = self.file.study.limit
        if before:
            facts["first"] = {one.arm: recipes[one.arm].data for one in before}
        if then := {one.arm: self.file.first[one.arm].then for one in before if one.arm in self.file.then}:
            facts["then"] = then
        if self.file.plugins:
            facts["plugins"] = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.file.plugins]
        return json.loads(json.dumps(facts))

    def _refuse_another(self, run: Run) -> None:
        """Raise if a folder holds a run of an earlier version of the study."""
        path = run.out / "lab.json"
        known = read_record(path) if path.is_file() else {}
        if different := differences(known, self._facts(run)):
            keys = ", ".join(different[:5])
            raise UserError(run.out, f"holds a run of another study; these differ: {keys}", hint="--out NEW")

    def _run(self, run: Run, free: Queue[dict[str, str]], before: list[Future]) -> Run:
        for future in before:
            future.result()
        slot = free.get()
        environment = {**os.environ, **slot}
        try:
            if (run.out / "recipe.yaml").is_file():
                self._refuse_another(run)
            write_json(run.out / "lab.json", self._facts(run))
            self._call(run, self._train(run), environment)
            if run.arm in self.file.arms:
                for command in commands(tuple(self.file.settings.values()), self._evaluate(run)):
                    self._call(run, command, environment)
            elif command := self.file.then_of(run.arm, run.out):
                self._call(run, command, environment)
                write_text(run.out / THEN, shlex.join(command) + "\n")
        finally:
            free.put(slot)
        return run

    def _train(self, run: Run) -> list[str]:
        command = ["train", self.file.recipe_of(run.arm), "--out", str(run.out), "--seed", str(run.seed)]
        roots = [f"roots.{one.arm}={one.out.resolve()}" for one in self._before(run)]
        return [*command, "--cache-dir", str(self.cache), *self._common(), *self.file.overrides_of(run.arm), *roots]

    def _evaluate(self, run: Run) -> list[str]:
        study = self.file.study
        command = ["eval", "--model", str(run.out), "--tasks", ",".join(study.tasks), "--baselines", "none"]
        return [*command, *self._common(), *(["--limit", str(study.limit)] if study.limit else [])]

    def _common(self) -> list[str]:
        words = [word for plugin in self.file.plugins for word in ("--plugin", plugin)]
        return [*words, *(["--device", self.device] if self.device else [])]

    def _call(self, run: Run, command: list[str], environment: dict[str, str]) -> None:
        log = run.out / "lab.log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%F %T')} mmllm {' '.join(command)}\n")
            file.flush()
            # -P: a yaml.py in the user's folder is not the library
            words = [sys.executable, "-P", "-m", "mmllm", *command]
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            # In its own session: a second signal besides ours would stop it before it has saved.
            process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
            self.running.add(process)
            if self.stopping.is_set():  # it may have started just after the others were asked to end
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        if code not in (0, 3):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(run.label, f"mmllm {command[0]} ended with {code}: {lines[-1][:200]}", hint=f"see {log}")


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Make SIGTERM and a closed terminal act like Ctrl-C (only possible in the main thread; nohup is respected)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _slots(device: str | None, jobs: int | None) -> list[dict[str, str]]:
    """Slots for runs side by side, as environment variables: GPUs in turn, or shares of the cores."""
    import torch

    count = torch.cuda.device_count() if device in (None, "cuda") else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:count] if given else [str(index) for index in range(count)]
    jobs = jobs or max(1, count)
    slots = [{"CUDA_VISIBLE_DEVICES": names[index % count]} if count else {} for index in range(jobs)]
    if jobs > 1:  # two processes that each use all cores slow each other down
        threads = str(max(1, torch.get_num_threads() // jobs))
        slots = [{**slot, "OMP_NUM_THREADS": threads} for slot in slots]
    return slots


def samples_per_second(run: Path) -> float | None:
    """Training speed of a run's last stage, from its log and recipe; None if its log is too short."""
    stages = read_yaml(run / "recipe.yaml")["stages"]
    name = [key for key, value in stages.items() if value is not None][-1]
    rows = []
    for line in (run / "log.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill
            row = json.loads(line)
            rows += [{key: float(row[key]) for key in ("step", "time")}] if row["stage"] == name else []
    # the median: a run stopped overnight has one long gap
    rates = sorted(
        (after["step"] - before["step"]) / (after["time"] - before["time"])
        for before, after in pairwise(rows)
        if after["step"] > before["step"] and after["time"] > before["time"]
    )
    return rates[len(rates) // 2] * stages[name].get("batch", 32) if rates else None


def _of_task(reported: dict[str, Any], asked: str) -> dict[str, Any] | None:
    """What a report says of a benchmark, or of a single task, whose score is then the average."""
    name, colon, task = asked.partition(":")
    if not colon or asked in reported:
        return reported.get(asked)
    for title, own in reported.items():
        if title.partition(":")[0] == name and task in own["tasks"]:
            return {**own["tasks"][task], "average": own["tasks"][task]["score"]}
    return None
