"""The run folder is whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmllm.run_folder import RunFolder


def model(text: str) -> SimpleNamespace:
    """Something that saves itself as one file."""

    def save(folder: Path, state_dict: dict | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(text)

    return SimpleNamespace(save_pretrained=save, named_modules=list)


PROCESSOR = SimpleNamespace(save_pretrained=lambda folder: None)
RECIPE = SimpleNamespace(dump=lambda: "model: {}\n")


@pytest.mark.parametrize("survives", [0, 1])
def test_a_kill_between_two_renames_loses_no_weights(tmp_path, monkeypatch, survives):
    run = RunFolder(tmp_path)
    run.save_model(model("old"), PROCESSOR, RECIPE)
    renamed = []

    def killed(source, target):
        if len(renamed) == survives:
            raise KeyboardInterrupt
        renamed.append(target)
        return real(source, target)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_model(model("new"), PROCESSOR, RECIPE)
    again = RunFolder(tmp_path)
    again.recover_model()
    assert (again.model / "weights").read_text() == "old"
    again.save_model(model("new"), PROCESSOR, RECIPE)
    assert (again.model / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
