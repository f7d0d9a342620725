"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "mmllm.contract": set(),
    "mmllm.data": {"contract"},
    "mmllm.world": {"contract"},
    "mmllm.encoders": {"contract"},
    "mmllm.connectors": {"contract"},
    "mmllm.reducers": {"contract", "connectors"},
    "mmllm.train": {"contract", "data", "encoders", "connectors", "core"},
    "mmllm.eval": {"contract", "data", "encoders", "connectors", "core"},
}
FOLDERS = {
    "mmllm.contract": "mmllm/contract",
    "mmllm.data": "mmllm/data",
    "mmllm.world": "mmllm/world",
    "mmllm.encoders": "encoders",
    "mmllm.connectors": "connectors",
    "mmllm.reducers": "reducers",
    "mmllm.train": "train",
    "mmllm.eval": "eval",
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmllm"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("mmllm")}
    return found


@pytest.mark.parametrize("package", list(LAYERS))
def test_layers(package):
    for path in (ROOT / FOLDERS[package]).rglob("*.py"):
        for module in imports(path):
            part = module.split(".")[1] if "." in module else "core"
            layer = part if f"mmllm.{part}" in LAYERS else "core"
            assert layer in LAYERS[package] | {package.split(".")[1]}, f"{path.name} imports {module}"


def test_no_file_of_mmllm_hides_a_package_or_a_public_function():
    names = {path.stem for path in (ROOT / "mmllm").iterdir()}
    assert not names & {"encoders", "connectors", "reducers", "train", "eval", "load", "generate", "evaluate", "reduce"}


def test_files_and_functions_can_be_read_in_one_sitting():
    for folder in ("mmllm", "encoders", "connectors", "reducers", "train", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 400, path
            tree = ast.parse(text)
            inner = {id(node) for outer in functions(tree) for node in ast.walk(outer) if node is not outer}
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno <= 60, f"{path}: {node.name}"
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                if public and id(node) not in inner:
                    assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """All functions of a file."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_importing_costs_nothing():
    code = "import sys, mmllm; bad = {'torch', 'transformers', 'numpy', 'av'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = "import sys; from mmllm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_sampling_frames_happens_in_one_place():
    """No second sampler: nobody else spaces indices over a clip."""
    for folder in ("mmllm", "encoders", "connectors", "reducers", "train", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "sampling.py" and "world" not in path.parts:
                assert "linspace" not in path.read_text(encoding="utf-8"), path
