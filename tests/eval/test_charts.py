"""Bars stand beside the names that they are of."""

from __future__ import annotations

from mmllm.eval import charts
from mmllm.eval.report import Report, TaskScore


def test_each_bar_has_its_own_name_and_the_average_is_last(tmp_path, monkeypatch):
    tasks = {
        "one": TaskScore(50.0, 25.0, 20.0, 30.0, items=30, total=33, missing=2, unparsed=4),
        "two": TaskScore(100.0, 50.0, 60.0, 70.0, items=10, total=10, missing=0, unparsed=0),
    }
    report = Report("mvbench", "canonical", "01234567", "micro", tasks)
    drawn = {}

    def bars(labels, columns, title, path, *, rule):
        drawn.update(zip(labels, zip(*columns, strict=True), strict=True))
        real(labels, columns, title, path, rule=rule)

    real = charts._bars
    monkeypatch.setattr(charts, "_bars", bars)
    charts.tasks_chart(report, tmp_path / "tasks.png")
    assert drawn == {
        "one  (30/33)": (50.0, 25.0, 20.0, 30.0),
        "two  (10/10)": (100.0, 50.0, 60.0, 70.0),
        "average (micro)  (40/43)": (62.5, 31.25, 30.0, 40.0),
    }
    assert list(drawn)[-1].startswith("average")
    assert (tmp_path / "tasks.png").stat().st_size > 1000
