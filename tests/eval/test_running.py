"""Runs with answerers made up for the purpose: resuming, baselines, holes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_answers import Fake, lines, run

from mmllm.contract.errors import UserError
from mmllm.eval.mvbench import load
from mmllm.eval.predictions import Predictions


def test_constant_letter_scores_chance(mvbench_root: Path, tmp_path: Path) -> None:
    fake, ticks = Fake(constant="(B)"), []
    report = run(mvbench_root, tmp_path / "out", fake, progress=lambda done, total: ticks.append((done, total)))
    assert (report.average, report.scored, report.missing, report.unparsed) == (25.0, 80, 0, 0)
    assert [report.mean(floor) for floor in ("chance", "blind", "single_frame")] == [25.0, 25.0, 25.0]
    assert ticks[0] == (0, 240)
    assert ticks[-1] == (240, 240)
    assert fake.tokens == {16}
    assert "words" not in json.loads((tmp_path / "out/report.json").read_text())  # letters alone
    blind = [key for key in fake.asked if key[0].startswith("Question")]
    assert len(blind) == 20  # one per group of four equal questions
    assert set(fake.asked.values()) == {1}
    assert Counter(frames for _, frames in fake.asked) == {None: 100, 1: 80}
    assert set(lines(tmp_path / "out")[0]) == {
        "id",
        "task",
        "condition",
        "response",
        "letter",
        "gold",
        "correct",
        "clip",
    }


def test_gold_oracle_scores_100_and_blind_cannot(mvbench_root: Path, tmp_path: Path) -> None:
    oracle = {str(item.media_path): f"({item.gold}) {item.answer}" for item in load(mvbench_root)}
    report = run(mvbench_root, tmp_path / "out", Fake(oracle))
    assert (report.average, report.mean("blind"), report.mean("single_frame")) == (100.0, 25.0, 100.0)


def test_right_words_are_counted_beside_the_letter(mvbench_root: Path, tmp_path: Path) -> None:
    """The letter decides; the words say whether it was the video or the list of options that was not understood."""
    items = load(mvbench_root)
    said = {str(item.media_path): f"{item.answer} ({'B' if item.gold == 'A' else 'A'})" for item in items[::2]}
    report = run(mvbench_root, tmp_path / "out", Fake(said, constant="nothing (A)"), baselines=())
    assert report.mean("words") == pytest.approx(100 * len(items[::2]) / len(items))
    assert report.average < report.mean("words")
    assert json.loads((tmp_path / "out/report.json").read_text())["words"] == report.mean("words")
    assert "| task | score | words | chance |" in (tmp_path / "out/report.md").read_text()


def test_empty_answers_score_0_loudly(mvbench_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = run(mvbench_root, tmp_path / "out", Fake(constant=" "), baselines=())
    assert (report.average, report.unparsed, report.empty) == (0.0, 80, 80)
    assert "80 of 80 responses are EMPTY" in caplog.text
    assert report.mean("blind") is None


def test_a_crashed_run_continues_and_repeats_nothing(mvbench_root: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "out", Fake(fail_after=50)
    with pytest.raises(UserError, match=r"clip\.mp4: cannot be decoded"):
        run(mvbench_root, out, first, batch_size=7)
    kept = lines(out)
    assert len(kept) == 56
    second, ticks = Fake(), []
    report = run(mvbench_root, out, second, batch_size=7, progress=lambda done, total: ticks.append(done))
    assert ticks[0] == 56
    assert lines(out)[:56] == kept
    assert len(lines(out)) == 240
    assert len({(row["id"], row["condition"]) for row in lines(out)}) == 240
    assert set((first.asked + second.asked).values()) == {1}
    assert report.scored == 80
    third = Fake()
    assert run(mvbench_root, out, third).to_dict() == report.to_dict()
    assert not third.asked


def test_a_torn_last_line_is_redone(mvbench_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    run(mvbench_root, out, Fake())
    whole = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(whole[:-9])
    again = Fake()
    run(mvbench_root, out, again)
    assert again.asked.total() == 1
    assert (out / "predictions.jsonl").read_bytes() == whole
    assert "torn" in caplog.text


def test_blind_answers_of_a_group_are_copied_across_runs(mvbench_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(mvbench_root, out, Fake(constant="C"), baselines=("blind",), limit=1)
    second = Fake(constant="D")
    run(mvbench_root, out, second, baselines=("blind",))
    assert not [key for key, _ in second.asked if key.startswith("Question")]
    assert {row["response"] for row in lines(out) if row["condition"] == "blind"} == {"C"}


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    good = json.dumps({"id": "a", "task": "t", "condition": "model", "response": "A"})
    path.write_text(f"{good}\n{{broken\n{good}\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: damaged line"):
        Predictions(path)


def test_missing_clips(mvbench_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, fake = tmp_path / "out", Fake()
    for place in (0, 1, 2, 3):
        (mvbench_root / "video" / "nturgbd" / f"fine_grained_pose_{place}.mp4").unlink()
    with pytest.raises(UserError, match=r"Fine-grained Pose 4 of 4.*fine_grained_pose_0\.mp4.*--missing skip"):
        run(mvbench_root, out, fake)
    assert not fake.asked
    assert len((out / "missing.txt").read_text().splitlines()) == 4
    report = run(mvbench_root, out, fake, missing="skip", baselines=())
    assert (report.scored, report.missing, report.total) == (76, 4, 80)
    assert report.tasks["Fine-grained Pose"].score is None
    assert "Fine-grained Pose 4 of 4" in caplog.text
    assert any("no item scored in Fine-grained Pose" in warning for warning in report.warnings)


def test_limit_baselines_and_bad_answerers(mvbench_root: Path, tmp_path: Path) -> None:
    report = run(mvbench_root, tmp_path / "a", Fake(), limit=2, baselines=("blind",))
    assert (report.scored, report.average) == (40, 50.0)
    assert report.mean("single_frame") is None
    with pytest.raises(UserError, match="unknown baseline 'blnd'"):
        run(mvbench_root, tmp_path / "b", Fake(), baselines=("blnd",))
    with pytest.raises(ValueError, match="1 responses to 32"):
        run(mvbench_root, tmp_path / "c", lambda chats, **_: ["A"])


def test_the_next_batch_is_announced_before_each_call(mvbench_root: Path, tmp_path: Path) -> None:
    class Ahead(Fake):
        """Notes what was announced before each call."""

        def __init__(self) -> None:
            super().__init__()
            self.announced: list[list[dict[str, Any]]] = []
            self.known: list[bool] = []

        def prefetch(self, conversations: list[Any], *, frames: int | None) -> None:
            self.announced.append((conversations, frames))

        def __call__(self, conversations: list[Any], *, frames: int | None, max_new_tokens: int) -> list[str]:
            self.known.append((conversations, frames) in self.announced)
            return super().__call__(conversations, frames=frames, max_new_tokens=max_new_tokens)

    answer = Ahead()
    run(mvbench_root, tmp_path / "out", answer, batch_size=20, baselines=("single_frame",))
    assert answer.known == [False, True, True, True] * 2
