"""The wheel: the same import names, the shipped recipes, nothing that should stay at home."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built from a copy so that nothing is left in it."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    keep = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=keep)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(copy)], check=True)
    return next(folder.glob("*.whl"))


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert all(top == "mmllm" or top.startswith("mmllm-") for top in tops), tops
    for wanted in (
        "mmllm/encoders/common/layered.py",
        "mmllm/train/objectives/language_modeling.py",
        "mmllm/recipes/llava.yaml",
    ):
        assert wanted in names
    assert "mmllm/recipes/nano/llava.yaml" in names
    assert not [name for name in names if name.endswith((".mp4", ".json", ".npz")) or "mlvu/1_" in name]


def test_it_lists_and_builds_recipes_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import mmllm, mmllm.encoders, mmllm.train\n"
        f"assert mmllm.__file__.startswith({str(site)!r}) and mmllm.encoders.__file__.startswith({str(site)!r})\n"
        "from mmllm.config import recipe\nfrom mmllm.model.blueprint import Blueprint\n"
        "for name in recipe.names():\n    Blueprint.of(recipe.load(name))\n"
        "print(len(recipe.names()))"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7


@pytest.mark.slow
def test_it_works_in_a_fresh_environment(wheel, tmp_path):
    """Installed with its dependencies into a virtual environment of its own; needs the package index."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    run = tmp_path / "venv" / "bin"
    subprocess.run([run / "python", "-m", "pip", "install", "--quiet", f"{wheel}[towers]"], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def mmllm(*words: str) -> str:
        done = subprocess.run([run / "mmllm", *words], cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = mmllm("recipe", "list")
    for name in ("llava", "nano/llava", "llava_onevision", "smol"):
        assert name in listed
    assert "total" in mmllm("recipe", "show", "llava")
    mmllm("world", "make", "--out", "world", "--level", "tiny")
    assert "ok:" in mmllm("recipe", "check", "nano/llava")
    assert list(elsewhere.iterdir()) == [elsewhere / "world"]
