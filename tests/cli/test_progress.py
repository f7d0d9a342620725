"""The line on stderr, and its estimate."""

from __future__ import annotations

from mmllm import progress


def test_what_was_done_before_does_not_enter_the_estimate(monkeypatch, capsys):
    """Ten of a hundred steps in ten seconds, after forty of an earlier run: fifty seconds for the other fifty."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress("steps", 100, start=40, every=1.0)
    now[0] = 110.0
    bar.update(50, {"loss": "2.5"})
    assert capsys.readouterr().err == "steps 50/100  loss 2.5  ETA 0:50\n"
    now[0] = 110.5
    bar.update(51)
    assert capsys.readouterr().err == ""


def test_hours_have_their_own_place():
    assert [progress._clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
