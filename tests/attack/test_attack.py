"""A small share of the attack, and that the attack itself can see what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack import kills
from attack.case import Case, Ran, judge
from attack.generators import FULL, GENERATORS, SHARES, names
from attack.media import same_frames
from helpers.tiny import image

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("expect", "ran", "complaint", "column"),
    [
        ("either", Ran(0, "left", ""), None, "answered"),
        ("answer", Ran(3, "", "warning: x"), None, "answered"),
        ("refuse", Ran(2, "", "warning: x\nerror: x.mp4: empty\n"), None, "refused"),
        ("refuse", Ran(2, "", "usage: mmllm\nmmllm train: error: argument --jobs\n"), None, "refused"),
        ("refuse", Ran(2, "", "error: a\nerror: b\n"), None, "silent"),
        ("refuse", Ran(2, "", ""), None, "silent"),
        ("refuse", Ran(0, "left", ""), None, "silent"),
        ("answer", Ran(2, "", "error: x\n"), None, "silent"),
        ("either", Ran(0, "left", ""), "other frames", "silent"),
        ("either", Ran(0, "left", ""), "untold: other frames", "answered"),
        ("either", Ran(1, "", "error: KeyError: 1"), None, "exit 1"),
        ("either", Ran(-11, "", ""), None, "exit 1"),
        ("either", Ran(2, "", "Traceback (most recent call last):\n"), None, "traceback"),
        ("either", Ran(-9, "", "", late=True), None, "hang"),
        ("refuse", Ran(1, "", "Traceback (most recent call last):\n"), "canary: it ran", "silent"),
    ],
)
def test_every_column_is_seen(expect, ran, complaint, column):
    assert judge(Case([], "", expect), ran, complaint)[0] == column


def test_an_attack_is_the_same_for_the_same_seed_and_covers_every_generator():
    assert names(60, 0) == names(60, 0) != names(60, 1)
    assert names(FULL, 0)[:60] == names(60, 0)
    assert {name.generator for name in names(FULL, 0)} == set(GENERATORS) == set(SHARES)
    assert {name.generator for name in names(60, 0)} == set(GENERATORS)


def test_an_answer_about_other_frames_is_seen_unless_a_warning_names_the_file(tmp_path):
    for number, name in enumerate(("clean.png", "other.png")):
        image(number).save(tmp_path / name)
    same = same_frames(tmp_path / "clean.png", tmp_path / "clean.png")
    other = same_frames(tmp_path / "clean.png", tmp_path / "other.png")
    assert same(Ran(0, "left", "")) is None
    assert other(Ran(0, "left", "")).startswith("untold: answered about other frames")  # a good file, but another one
    assert other(Ran(0, "left", "warning: other.png is damaged\n")) is None


def test_answers_that_a_kill_lost_or_doubled_are_seen(tmp_path):
    file = tmp_path / "out/eval/predictions.jsonl"
    file.parent.mkdir(parents=True)
    lines = [json.dumps({"id": name, "condition": "model", "response": "A"}) + "\n" for name in "ab"]
    file.write_text("".join(lines))
    ended = Ran(0, "", "")
    place = kills.Place(tmp_path, None, [ended, ended])
    straight = kills.Straight(kills.KINDS["eval"].result(place.out), 1.0, 1, 1)
    assert kills.compare("eval", straight, place, ended) == ("answered", "")
    for text in (lines[0], lines[0] + lines[1] * 2, lines[1] + lines[0], lines[0] + lines[1].replace("A", "B")):
        file.write_text(text)
        assert kills.compare("eval", straight, place, ended)[0] == "silent"


def test_nothing_breaks_and_nothing_is_taken_silently(tmp_path):
    command = [sys.executable, "-m", "attack", "--inputs", "60", "--kills", "2", "--limit", "30"]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    print(ran.stdout)
    assert ran.returncode == 0, f"again: bash scripts/attack.sh --case NAME\n{ran.stdout}\n{ran.stderr[-2000:]}"
    assert not list(tmp_path.iterdir())
