"""What a stage says of its speed."""

from __future__ import annotations

from types import SimpleNamespace

from mmllm.train import progress


def test_speed_after_a_resumption_is_that_of_the_steps_since(monkeypatch, tmp_path, capsys):
    """Forty steps of an earlier run, then ten of eight samples in four seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = progress.StageProgress(SimpleNamespace(path=tmp_path), "instruct", 8, quiet=True)
    rates = SimpleNamespace(facts=dict)
    shown.trainer = SimpleNamespace(data_seconds=1.0, looked_up=rates, skipped=[])
    state = SimpleNamespace(max_steps=100, global_step=40)
    shown.on_train_begin(None, state, None)
    facts = {}
    shown.bar.update = lambda done, said: facts.update(said)
    now[0], state.global_step = 4.0, 50
    shown.on_step_end(None, state, None)
    assert facts == {"samples/s": "20.0", "data wait": "25 %"}


def test_curves_are_drawn_of_what_a_log_has_that_is_a_record(tmp_path):
    good = '{"stage": "a", "step": 1, "loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_bytes(b"{}\n[]\n5\n\xff\n" + good.encode() + b'{"stage": "a", "st')
    progress.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    progress.draw_curves(tmp_path)  # says so, and goes on
