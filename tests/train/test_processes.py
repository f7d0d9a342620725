"""Who trains together, on what, with how many threads; and that a folder has one run at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small_runs import options, recipe

from mmllm.contract.errors import UserError
from mmllm.contract.files import held
from mmllm.device import check_device, choose_threads
from mmllm.train.machine import deepspeed_config, join
from mmllm.train.run import check, train

JOINED = """
import os
from mmllm.train.machine import from_main, join
from mmllm.train.context import RunOptions
from mmllm.contract.errors import UserError
state = join(RunOptions())
def refuse():
    raise UserError("folder", "in use")
try:
    from_main(state, refuse)
except UserError as error:
    said = f"{state.num_processes} {state.device.type} {from_main(state, lambda: 7)} {error}\\n"
    os.write(1, said.encode())  # in one piece: both write to the same pipe
"""


def test_processes_without_an_accelerator_join_on_the_cpu_and_hear_what_the_main_one_hears(tmp_path):
    (tmp_path / "joined.py").write_text(JOINED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "joined.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.splitlines() == ["2 cpu 7 folder: in use"] * 2, done.stderr[-2000:]


def test_processes_that_did_not_join_are_refused(data, tmp_path, monkeypatch):
    join(options())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes are to train, but MASTER_ADDR is not set"):
        join(options())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(UserError, match="2 processes were started together, but 1 joined"):
        join(options())
    with pytest.raises(UserError, match="WORLD_SIZE"):
        train(recipe(data), tmp_path / "run", options())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["abc", "-2", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: (wrong type|out of range)"):
        join(options())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_is_not_there_is_refused_not_replaced(data, tmp_path):
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: this machine has no accelerator"):
            check_device(name)
    with pytest.raises(UserError, match="this machine has no accelerator"):
        train(recipe(data), tmp_path / "run", options(device="cuda"))


def test_a_device_that_is_none_is_refused():
    with pytest.raises(UserError, match="--device gpu: not a device"):
        check_device("gpu")
    check_device("cpu")
    check_device(None)


def test_the_dry_run_knows_the_number_of_processes(data, tmp_path):
    facts = check(recipe(data, batch=12), tmp_path, options(), processes=4)
    assert "3 x 1 x 4 processes" in facts["stage instruct"]
    with pytest.raises(UserError, match=r"stages\.instruct\.batch: 12 samples over 8 processes"):
        check(recipe(data, batch=12), tmp_path, options(), processes=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zer02", "no such file.*Try: zero2 or zero1"),
        ("zero3", "unequal media.*Try: --deepspeed zero2"),
        ("three.json", "unequal media"),
        ("list.json", "not a map"),
        ("broken.json", "not JSON"),
    ],
)
def test_the_dry_run_knows_the_deepspeed_config(data, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("three.json").write_text('{"zero_optimization": {"stage": 3}}')
    Path("list.json").write_text("[1]")
    Path("broken.json").write_text('{"zero')
    with pytest.raises(UserError, match=message):
        check(recipe(data), tmp_path / "run", options(deepspeed=name))
    with pytest.raises(UserError, match=message):
        deepspeed_config(name, recipe(data).stages["instruct"])


HOLD = """
import os, sys, time
from pathlib import Path
from mmllm.contract.files import held
with held(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder, with a child as loader workers are."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def test_a_second_run_in_a_folder_is_refused_and_says_who_holds_it(data, tmp_path, holder):
    with pytest.raises(UserError, match=rf"run: in use by process {holder.pid} on .* since 2.*Try: wait for it"):
        train(recipe(data), tmp_path / "run", options())


def test_a_dead_process_holds_nothing_though_its_children_live(tmp_path, holder):
    os.kill(holder.pid, 9)
    holder.wait()
    with held(tmp_path / "run"):
        pass


def test_a_lock_leaves_nothing_behind(tmp_path):
    with held(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    for name in ("old", "empty"):
        with held(tmp_path / name):
            pass
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["file"]
    assert not list((tmp_path / "empty").iterdir())


HOLD_OFTEN = """
import sys
from pathlib import Path
from mmllm.contract.errors import UserError
from mmllm.contract.files import held
for _ in range(300):
    try:
        with held(Path(sys.argv[1])):
            pass
    except UserError as error:
        assert "in use by" in str(error), error
"""


def test_starts_at_the_same_moment_meet_a_holder_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", HOLD_OFTEN, str(tmp_path / "run")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in both] == ["", "", ""]


def test_threads_are_those_asked_for_else_those_of_the_run_else_the_free_ones(monkeypatch):
    from mmllm import device

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert choose_threads(3, before=2) == (3, "--threads")
    assert choose_threads(None, before=2) == (2, "as this run began")
    monkeypatch.setattr(device, "_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(device, "_busy", lambda cores: 2.9)
    assert choose_threads(None) == (1, "1.1 of 4 cores are free")
    monkeypatch.setattr(device, "_busy", lambda cores: 0.1)
    assert choose_threads(None)[0] == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(None, before=1) == (4, "OMP_NUM_THREADS")


def test_threads_sleep_beside_a_neighbour_and_spin_alone(monkeypatch):
    from mmllm import device

    monkeypatch.setattr(device, "_busy", lambda cores: 0.2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    device.sleep_beside_neighbours()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setattr(device, "_busy", lambda cores: 1.1)
    device.sleep_beside_neighbours()
    assert os.environ.pop("OMP_WAIT_POLICY") == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    device.sleep_beside_neighbours()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helpers.small_runs import options, recipe
from mmllm.cli.common import calm_libraries
from mmllm.train.context import Stopped
from mmllm.train.run import train
calm_libraries()
try:
    train(recipe(Path(sys.argv[2]), steps=4000), Path(sys.argv[3]), options(jobs=1, quiet=False))
except Stopped as stop:
    print("stopped", stop.checkpoint.name, flush=True)
"""


def started(data: Path, out: Path, **pipes: object) -> subprocess.Popen:
    """A long training in a group of its own, once it has logged a step."""
    command = [sys.executable, "-c", TRAIN, str(Path(__file__).parents[1]), str(data), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **pipes)
    until = time.monotonic() + 100
    while not (out / "log.jsonl").is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    return process


def test_a_signal_to_the_whole_group_saves_though_workers_hear_it_too(data, tmp_path):
    process = started(data, tmp_path / "run", stderr=subprocess.DEVNULL)
    time.sleep(1)
    os.killpg(process.pid, 15)
    said, _ = process.communicate(timeout=100)
    assert said.startswith("stopped checkpoint-") and process.returncode == 0


def test_a_training_whose_listener_has_gone_goes_on(data, tmp_path):
    reading, writing = os.pipe()
    process = started(data, tmp_path / "run", stderr=writing)
    os.close(writing)
    os.close(reading)
    lines = len((tmp_path / "run" / "log.jsonl").read_text().splitlines())
    time.sleep(2)
    os.kill(process.pid, 15)
    said, _ = process.communicate(timeout=100)
    assert said.startswith("stopped checkpoint-")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) > lines
