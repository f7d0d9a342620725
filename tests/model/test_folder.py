"""Model folders: no code in them runs, damaged files are refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_model, tiny_recipe, tokenizer_folder
from safetensors.torch import load_file, save_file

import mmllm
from mmllm.cli import main
from mmllm.contract.errors import UserError
from mmllm.contract.library import check_attention, trusting_remote_code
from mmllm.model.blueprint import Blueprint
from mmllm.model.build import build_tokenizer

CANARY = """
open({path!r}, "w").close()
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class Config(PreTrainedConfig): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def poisoned(folder: Path, file: str, **auto_map: object) -> Path:
    """Put code beside a config that names it; returns what exists once it has run."""
    ran = folder / "ran"
    (folder / "own.py").write_text(CANARY.format(path=str(ran)))
    edit(folder / file, auto_map=auto_map)
    return ran


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("config.json", {"AutoConfig": "own.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Tokenizer"]}),
        ("processor_config.json", {"AutoProcessor": "own.Config"}),
    ],
)
def test_code_in_a_model_folder_is_not_run(folder, capsys, monkeypatch, file, auto_map):
    ran = poisoned(folder, file, **auto_map)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "y\n", raising=False)
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    code = main(["ask", "--model", str(folder), "--device", "cpu", "--quiet", "What?"])
    captured = capsys.readouterr()
    assert "y/N" not in captured.out
    assert code in (0, 2)
    assert not ran.exists()


def test_code_beside_a_tokenizer_is_refused_unless_it_is_trusted(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tokenizer_folder(), tmp_path / "tokenizer"))
    ran = poisoned(folder, "tokenizer_config.json", AutoTokenizer=[None, "own.Tokenizer"])
    edit(folder / "tokenizer_config.json", tokenizer_class="NobodysTokenizer")
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    made = tiny_recipe()
    made.model["llm"]["tokenizer"] = str(folder)
    with pytest.raises(UserError, match=r"comes with its own Python code.*--trust-remote-code"):
        build_tokenizer(made)
    assert not ran.exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with trusting_remote_code():
        build_tokenizer(made)
    assert ran.exists()


def test_code_beside_an_llms_config_is_refused(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    ran = poisoned(tmp_path / "llm", "config.json", AutoConfig="own.Config")
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    made = tiny_recipe()
    made.model["llm"] = {"name": str(tmp_path / "llm"), "tokenizer": tokenizer_folder()}
    with pytest.raises(UserError, match=r"comes with its own Python code.*--trust-remote-code"):
        Blueprint.of(made)
    assert not ran.exists()


def test_an_attention_implementation_of_a_repository_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attn_implementation"] = "org/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"text_config\.attn_implementation: not one the library has.*sdpa.*org/kernel"):
        mmllm.load(folder)
    made = tiny_recipe()
    made.model["llm"]["config"]["attn_implementation"] = "org/kernel"
    with pytest.raises(UserError, match=r"model\.llm\.config:attn_implementation"):
        Blueprint.of(made)
    check_attention({"attn_implementation": "eager", "vision_config": {"_attn_implementation": None}}, "config")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ['{"model_type": "mmllm", ', "[1, 2]", "[" * 100_000])
def test_broken_json_is_refused_by_name(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file}: damaged"):
        mmllm.load(folder)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_an_absent_file_is_refused_by_name(folder, file):
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"{file}: absent"):
        mmllm.load(folder)


@pytest.mark.parametrize("size", [0, 7, 300, -10])
def test_truncated_weights_are_refused_by_name(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        mmllm.load(folder)


def test_absent_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        mmllm.load(folder)


def test_a_folder_of_another_library_is_refused(folder):
    edit(folder / "config.json", model_type="llama")
    with pytest.raises(UserError, match="no model of mmllm, and of no family, expected llava, "):
        mmllm.load(folder)


@pytest.mark.parametrize("values", [{"model_section": 5}, {"text_config": "x"}, {"model_section": {"media": {}}}])
def test_values_of_a_wrong_type_in_a_config_are_refused(folder, values):
    edit(folder / "config.json", **values)
    with pytest.raises(UserError, match=str(folder)):
        mmllm.load(folder)


def test_weights_that_are_no_numbers_are_said_by_ask(folder, capsys, caplog):
    path = folder / "model.safetensors"
    state = load_file(path)
    state[next(iter(state))].fill_(torch.nan)
    save_file(state, path, metadata={"format": "pt"})
    main(["ask", "--model", str(folder), "--device", "cpu", "--quiet", "What?"])
    assert "1 of its weights are not finite" in caplog.text
