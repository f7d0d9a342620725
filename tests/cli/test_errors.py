"""What users get wrong: one line on stderr that names the item, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import frames, image, save_model, tiny_processor, tiny_recipe, tokenizer_folder, write_video

from mmllm.cli import main
from mmllm.contract.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved tiny model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def clip(tmp_path) -> Path:
    """A good clip of one second."""
    return write_video(tmp_path / "clip.mp4", frames(0, 8))


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The error line of a command that must exit with 2."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def ask(capsys: pytest.CaptureFixture, model: Path, *media: object) -> str:
    """The error of asking about media."""
    return fails(capsys, "ask", "--model", model, "--quiet", *media, "What moves?")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("this is no video\n" * 40), "clip.mp4"),
    ],
    ids=["missing", "empty", "text"],
)
def test_broken_files(capsys, model, tmp_path, make, says):
    make(tmp_path / "clip.mp4")
    line = ask(capsys, model, "--video", tmp_path / "clip.mp4")
    assert says in line
    assert "clip.mp4" in line


def test_truncated_file(capsys, model, clip):
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert "clip.mp4" in ask(capsys, model, "--video", clip)


@pytest.mark.parametrize("bound", ["t=0.5,0.5", "t=90,95", "t=0.8,0.2", "t=x"])
def test_bad_bounds(capsys, model, clip, bound):
    assert "clip.mp4" in ask(capsys, model, "--video", f"{clip}#{bound}")


def test_nothing_remote_is_read(capsys, model):
    assert "download it first" in ask(capsys, model, "--video", "https://example.org/clip.mp4")


def test_no_model(capsys, tmp_path, clip):
    assert "no such folder" in ask(capsys, tmp_path / "nowhere", "--video", clip)
    assert "no model in this folder" in ask(capsys, tmp_path, "--video", clip)


def test_checkpoint_of_another_recipe_lists_the_keys(capsys, model, tmp_path, clip):
    broken = shutil.copytree(model, tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    state = load_file(broken / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.0.weight"))
    state[name] = state[name][:, :5].clone()
    state["model.front_end.parts.other.weight"] = state.pop(name.replace("layers.0", "layers.2"))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    line = ask(capsys, broken, "--video", clip)
    for word in ("checkpoint of another recipe", "1 missing", "1 unexpected", f"1 mismatched: {name} is ["):
        assert word in line


def test_processor_of_another_recipe(capsys, model, tmp_path, clip):
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "processor_config.json").read_text())
    config["model_section"]["media"]["frames"] = 2
    (broken / "processor_config.json").write_text(json.dumps(config))
    assert "differ at media.frames" in ask(capsys, broken, "--video", clip)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nano/lava"], "Try: nano/llava"),
        (["train", "nano/llava", "stages.instruct.batches=3"], "stages.instruct.batches: unknown key. Try: batch"),
        (["train", "nano/llava", "stages.instruct.steps=many"], "wrong type, expected int >= 1 or null"),
        (["train", "nano/llava", "--dry-run", "roots.world=nowhere"], "mmllm world make"),
        (["train", "nano/llava", "--stages", "instrukt", "--dry-run"], "no such stage. Try: instruct"),
        (["recipe", "show", "nano/llava", "model.connector.mlp.depth=0"], "depth is at least 1"),
        (
            ["recipe", "show", "nano/llava", "model.media=null", "model.media.frames=3"],
            "'frames': it is not a map",
        ),
        (
            ["recipe", "show", "nano/llava", "roots=5", "roots.world=x"],
            "roots: has no key 'world': it is not a map",
        ),
        (["recipe", "show", "nano/llava", "--plugin", "nowhere.py"], "no such plug-in"),
        (["eval", "--model", "nowhere"], "no such folder"),
        (["eval", "check", "--model", "nowhere", "--tasks", "mvbench"], "no such folder"),
        (["eval", "check", "--tasks", "mvbench", "--root", "mvbench=a", "--root", "mvbench=b"], "given twice"),
        (["eval", "check", "--tasks", "mvbench", "--root", "mvbench=nowhere"], "nowhere"),
        (["eval", "check", "--tasks", "mvbanch", "--root", "mvbanch=x"], "mvbench"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_commands(capsys, words, says):
    assert says in fails(capsys, *words)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "{encoders: {nano: {type: null}}}",
            "model.encoders.nano.type: wrong type, expected the name of a part (encoder), got None",
        ),
        ("{connector: [mpl]}", "model.connector.mpl.type: no connector is called 'mpl'. Try: mlp"),
    ],
)
def test_a_check_names_what_is_wrong_with_the_recipe(capsys, tmp_path, monkeypatch, model, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"base: nano/base\nmodel: {model}\n")
    assert says in fails(capsys, "recipe", "check", tmp_path / "mine.yaml")


def test_a_path_must_not_be_empty(capsys):
    assert main(["train", "nano/llava", "--out", ""]) == 2
    assert "--out: empty, expected a path" in capsys.readouterr().err


def test_a_plug_in_that_ends_the_program_is_an_error(capsys, tmp_path):
    plugin = tmp_path / "ends.py"
    plugin.write_text("import sys\nsys.exit(0)\n")
    assert f"{plugin}:2: SystemExit: 0" in fails(capsys, "recipe", "show", "nano/llava", "--plugin", plugin)


def test_a_terminal_of_few_characters_gets_the_error_too(tmp_path):
    command = [sys.executable, "-P", "-m", "mmllm", "recipe", "show", b"na\xffno/llav\xc3\xa4"]
    said = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert said.returncode == 2 and b"Traceback" not in said.stderr
    assert said.stderr.startswith(b"error: na\\udcffno/llav\\xe4: ")


def test_a_crash_of_a_users_part_is_not_called_ours(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part, recipe = tmp_path / "part.py", tmp_path / "mine.yaml"
    part.write_text(
        "from mmllm.contract.parts import Part\nfrom mmllm.contract.registry import register\n\n\n"
        "@register('connector', 'crashes')\nclass Crashes(Part):\n"
        "    def output_spec(self, *inputs):\n        return inputs[7]\n"
    )
    recipe.write_text("base: nano/base\nmodel: {connector: [mlp, {type: crashes}]}\n")
    assert main(["recipe", "show", str(recipe), "--plugin", str(part)]) == 1
    said = capsys.readouterr().err
    assert "IndexError" in said and f"raised below {part}:8" in said and "bug of mmllm" not in said
    assert "output_spec" in (tmp_path / "crash.txt").read_text()


def test_data_that_is_wrong_names_file_and_line(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    good = {"id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    overrides = (f"model.llm.tokenizer={tokenizer_folder()}", f"stages.text.data={data}")
    command = ("train", "nano/llava", "--stages", "text", "--dry-run", *overrides)
    for text, says in (
        ("not json", f"{data}:1: not JSON"),
        (json.dumps({"id": "a"}), f"{data}:1:messages: missing"),
        (json.dumps({**good, "messages": [{"role": "user"}]}), "a message needs role and content"),
        ("", "the data file is empty"),
    ):
        data.write_text(text)
        assert says in fails(capsys, *command)


def test_more_media_than_placeholders_and_the_reverse():
    processor = tiny_processor(tiny_recipe())
    with pytest.raises(UserError, match="more media than placeholders: 1 left over"):
        processor(text="<image>What?", images=[image(1), image(2)])
    with pytest.raises(UserError, match="more placeholders than media: no image"):
        processor(text="<image><image>What?", images=[image(1)])
    with pytest.raises(UserError, match="more placeholders than media: it contains <video>"):
        processor.encode([{"role": "user", "content": "<video>What?"}])
    with pytest.raises(UserError, match="names no file"):
        processor.encode([{"role": "user", "content": [{"type": "video"}]}])


def test_a_conversation_that_is_too_long_loses_whole_turns_or_is_refused():
    from helpers.tiny import turn, video

    processor = tiny_processor(tiny_recipe())
    answer = turn("left", role="assistant")
    messages = [turn(video(1), "What moves?"), answer, turn(video(2), "And here?"), answer]
    whole = processor.encode(messages)
    first = processor.encode(messages[:2])
    processor.max_length = len(whole.ids) - 1
    assert processor.encode(messages).ids == first.ids
    processor.max_length = 20
    with pytest.raises(UserError, match=r"tokens, 36 of them visual, expected at most 20"):
        processor.encode(messages, name="sample 7")
