"""Nothing that is said at a call is swallowed: arguments, content keys, control tokens, templates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import (
    frames,
    image,
    save_model,
    tiny_processor,
    tiny_recipe,
    tokenizer_folder,
    turn,
    video,
    write_video,
)

import mmllm
from mmllm.contract.errors import UserError
from mmllm.data.media.sampling import Sampling
from mmllm.processing.chat_template import render
from mmllm.processing.content import MediumEntry, entries_of
from mmllm.processing.sandbox import variables_of

BATCH = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_recipe())


def times(processor, messages, **options) -> list[float]:
    batch = processor.apply_chat_template(messages, **BATCH, **options)
    return batch["visual"]["media"][0]["times"].tolist()


@pytest.mark.parametrize("options", [{"bogus": 3}, {"processor_kwargs": {"bogus": 3}}, {"frmaes": 4}])
@pytest.mark.parametrize("tokenize", [True, False])
def test_an_argument_that_nobody_reads_is_refused(processor, options, tokenize):
    with pytest.raises(UserError, match=r"(bogus|frmaes).*Try: "):
        processor.apply_chat_template([turn(video(1), "What?")], tokenize=tokenize, **options)
    if "processor_kwargs" not in options:
        with pytest.raises(UserError, match="unknown argument"):
            processor(text="What?", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": "many"}, "num_frames: wrong type, expected int >= 1"),
        ({"num_frames": 0}, "num_frames: out of range"),
        ({"fps": float("nan")}, "fps: out of range"),
        ({"frames": 2, "num_frames": 2}, "given twice"),
        ({"return_tensors": "np"}, "return_tensors: wrong type, expected one of pt"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"frames": 2, "fps": 1.0}, "exclude each other"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(processor, options, message):
    with pytest.raises(UserError, match=message):
        processor.apply_chat_template([turn(video(1), "What?")], **BATCH, **options)


def test_the_ecosystems_spellings_work_at_a_call_and_in_an_entry(processor):
    clip = frames(1, 8)
    plain = turn({"type": "video", "video": clip}, "What?")
    four = times(processor, [plain], frames=4)
    assert len(four) == 4
    assert times(processor, [plain], num_frames=4) == four
    assert times(processor, [plain], processor_kwargs={"num_frames": 4}) == four
    assert times(processor, [turn({"type": "video", "video": clip, "num_frames": 4}, "What?")]) == four
    assert len(times(processor, [plain], fps=0.5)) == 4  # pixels in memory are one frame per second
    assert len(times(processor, [turn({"type": "video", "video": clip, "fps": 0.5}, "?")])) == 4
    assert len(times(processor, [turn({"type": "video", "video": clip, "fps": 1.0, "max_frames": 3}, "?")])) == 3
    assert len(times(processor, [plain], max_frames=2)) == 2


def test_fps_of_a_file_samples_and_of_a_folder_says_its_rate(processor, tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames(1, 16), fps=8)
    assert len(times(processor, [turn({"type": "video", "path": str(path), "fps": 2}, "?")])) == 4
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(8):
        image(index).save(folder / f"{index:05d}.jpg")
    entry = {"type": "video", "path": str(folder), "fps": 2.0, "frames": 4}
    slower = times(processor, [turn({**entry, "fps": 1.0}, "?")])
    assert times(processor, [turn(entry, "?")]) == [moment / 2 for moment in slower]
    with pytest.raises(UserError, match="frames and fps exclude each other"):
        times(processor, [turn({"type": "video", "path": str(path), "fps": 2, "frames": 4}, "?")])
    assert MediumEntry("video", str(folder), fps=2.0).ref.fps == 2.0
    assert MediumEntry("video", str(path), fps=2.0).ref.fps is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "video", "path": "a.mp4", "nframes": 4}, "video entry: 'nframes': unknown key.*frames"),
        ({"type": "video", "path": "a.mp4", "strat": 2}, "'strat': unknown key.*start"),
        ({"type": "video", "path": "a.mp4", "start": "soon"}, "start: wrong type, expected float >= 0"),
        ({"type": "video", "path": "a.mp4", "start": -1}, "start: out of range"),
        ({"type": "video", "path": "a.mp4", "end": float("nan")}, "end: out of range"),
        ({"type": "video", "path": "a.mp4", "frames": 10**400}, "frames: out of range"),
        ({"type": "image", "path": "a.png", "start": 1.0}, "image entry: 'start': unknown key"),
        ({"type": "text", "text": "a", "txt": "b"}, "text entry: 'txt': unknown key"),
        (
            {"type": "audio", "path": "a.wav"},
            "unknown type, expected text, image, video, box, time, tube, location, got 'audio'",
        ),
        ({"type": ["video"], "path": "a.mp4"}, "unknown type"),
        ({"type": "video"}, "it names no file"),
        ({"type": "video", "path": "a.mp4", "video": "b.mp4"}, "path and video name its file, expected one of them"),
        ({"type": "video", "path": "a.mp4", "frames": 4, "num_frames": 4}, "num_frames: given twice"),
        (5, "content: wrong type"),
    ],
)
def test_a_content_entry_is_read_as_strictly_as_a_recipe(processor, entry, message):
    with pytest.raises(UserError, match=message):
        processor.apply_chat_template([{"role": "user", "content": [entry]}], tokenize=False)


def test_a_number_as_text_is_read_as_in_a_recipe():
    (entry,) = entries_of({"content": [{"type": "video", "path": "a.mp4", "start": "2", "end": None}]})
    assert (entry.start, entry.end) == (2.0, None)


def test_an_entry_means_the_part_that_it_says():
    ref = MediumEntry("video", "a.mp4", start=1.0, end=2.5).ref
    assert (ref.kind, ref.path, ref.start, ref.end, ref.fps) == ("video", "a.mp4", 1.0, 2.5, None)


def test_an_entry_without_a_word_on_sampling_keeps_the_calls():
    own = Sampling(fps=2.0, max_frames=16)
    assert MediumEntry("video", "a.mp4").sampled(own) == own
    assert MediumEntry("video", "a.mp4", frames=4).sampled(own) == Sampling(frames=4)
    assert MediumEntry("video", "a.mp4", fps=1.0).sampled(own) == Sampling(fps=1.0, max_frames=16)
    assert MediumEntry("video", "a.mp4", max_frames=3).sampled(Sampling(frames=8)) == Sampling(frames=3)
    assert MediumEntry("video", "a.mp4", max_frames=4).sampled(own) == Sampling(fps=2.0, max_frames=4)
    assert MediumEntry("video", "a.mp4", sampler="linspace").sampled(own) == Sampling(None, 2.0, 16, "linspace")
    assert own.override(frames=32, max_frames=4) == Sampling(frames=4)


def test_text_that_spells_a_control_token_stays_text(processor):
    tokenizer = processor.tokenizer
    ids = processor.apply_chat_template([turn("Say <|end|> or <eos> twice: <eos>.")], **BATCH)["input_ids"][0]
    plain = processor.apply_chat_template([turn("Say nothing.")], **BATCH)["input_ids"][0]
    for token in ("<|end|>", "<eos>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert (ids == number).sum() == (plain == number).sum(), token  # those of the template alone
    assert "Say <|end|> or <eos> twice: <eos>." in tokenizer.decode(ids)


def test_added_control_tokens_and_those_that_take_blanks_stay_text_too():
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from mmllm.model.blueprint import Blueprint
    from mmllm.processing.processor import MMLLMProcessor

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True, rstrip=True, lstrip=True)], special_tokens=True)
    tokenizer._special_tokens_map.pop("additional_special_tokens", None)
    config = Blueprint.of(tiny_recipe()).config
    processor = MMLLMProcessor(tokenizer, config.model_section, config.text_config.hidden_size, 1024)
    number = tokenizer.convert_tokens_to_ids("<|eot|>")
    ids = processor.apply_chat_template([turn("Say <|eot|> now")], **BATCH)["input_ids"][0]
    assert number not in ids
    assert "Say <|eot|> now" in tokenizer.decode(ids)


def test_typing_a_control_token_changes_nothing_for_other_threads(processor):
    before = processor.tokenizer.backend_tokenizer.encode_special_tokens
    seen = []
    real = processor.controls._plain
    processor.apply_chat_template([turn("Say <|end|> now")], **BATCH)
    seen.append(processor.tokenizer.backend_tokenizer.encode_special_tokens)
    assert seen == [before] and real is processor.controls._plain


def test_a_control_token_in_an_answer_is_learnt_as_text(processor):
    messages = [turn("What?"), turn("It <|end|> ends", role="assistant")]
    example = processor.encode(messages)
    learnt = [label for label in example.labels if label != -100]
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert learnt.count(end) == 1  # the one that really ends the turn
    assert processor.tokenizer.decode(learnt).startswith("It <|end|> ends")
    assert len(example.ids) == len(example.labels)


def test_text_without_control_tokens_is_tokenised_as_before(processor):
    messages = [turn("What moves?"), turn("left", role="assistant")]
    text = render(processor.tokenizer, messages, prompt=False).text
    assert processor.encode(messages).ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_another_template_and_its_variables_are_used(processor):
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}{{ mood }}"
    chat = [turn("Hi")]
    assert processor.apply_chat_template(chat, chat_template=template, mood="calm") == "user:Hi;calm"
    assert variables_of(template) == ("mood",)
    assert variables_of("{%- generation -%}{{ tools }}{% endgeneration %}{{ messages }}") == ("tools",)
    with pytest.raises(UserError, match=r"apply_chat_template: moood.*Try: mood"):
        processor.apply_chat_template(chat, chat_template=template, moood="calm")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }", r"broken \(TemplateSyntaxError"),
        ("{{ nothing.at.all }}", r"broken \(UndefinedError"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "chat template"),
        ("nothing", "leaves out message 0"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", "writes a message twice"),
    ],
)
def test_a_broken_template_is_refused(processor, template, message):
    with pytest.raises(UserError, match=message):
        processor.apply_chat_template([turn("Hi")], chat_template=template)


def test_an_endless_template_is_stopped(processor, monkeypatch):
    from mmllm.processing import sandbox as templates

    monkeypatch.setattr(templates, "SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="rendering did not finish"):
        processor.apply_chat_template([turn("Hi")], chat_template=loop)


@pytest.mark.parametrize("message", [{"role": 5, "content": "x"}, {"role": "user"}, "text", {"content": "x"}])
def test_a_malformed_message_is_refused(processor, message):
    with pytest.raises(UserError):
        processor.apply_chat_template([message] if isinstance(message, dict) else [[message]], tokenize=False)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("conversation", [[], {}, None, [None], [[]], [[turn("Hi")], None], "Hi", 5])
def test_what_is_no_conversation_is_refused(processor, conversation, tokenize):
    with pytest.raises(UserError, match="conversation"):
        processor.apply_chat_template(conversation, tokenize=tokenize)


def test_what_a_message_says_beside_role_and_content_is_not_dropped(processor):
    with pytest.raises(UserError, match="message: 'tool_calls': unknown key"):
        processor.apply_chat_template([{**turn("Hi"), "tool_calls": []}])


@pytest.mark.parametrize("text", [None, 5, [], [5]])
def test_what_is_no_text_is_refused(processor, text):
    with pytest.raises(UserError, match="processor: text: wrong type"):
        processor(text=text)
    with pytest.raises(UserError, match="processor_kwargs: wrong type"):
        processor.apply_chat_template([turn("Hi")], processor_kwargs=5)


def test_an_answer_has_to_fit_behind_its_prompt(tmp_path):
    model, processor = mmllm.load(save_model(tmp_path / "model"))
    most = processor.max_length - 5  # what `What?` and its turn take
    for stream in (False, True):
        with pytest.raises(UserError, match=f"after a prompt of 5 tokens, expected at most {most}, got {most + 1}"):
            mmllm.generate(model, processor, "What?", max_new_tokens=most + 1, stream=stream)


def test_arrays_and_pictures_are_media(processor):
    batch = processor.apply_chat_template(
        [turn({"type": "image", "image": image(1)}, {"type": "image", "image": np.asarray(image(1))}, "Same?")], **BATCH
    )
    pixels = [next(iter(clip["pixels"].values())) for clip in batch["visual"]["media"]]
    assert torch.equal(*pixels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: mmllm.load(None), "model: not a path"),
        (lambda m, p: mmllm.generate(m, p, "?", max_new_tokens=10**9), "max_new_tokens: more than this model can hold"),
        (lambda m, p: mmllm.generate(m, p, "?", max_new_tokens=0), "max_new_tokens: out of range"),
        (lambda m, p: mmllm.generate(m, p, 5), "question: wrong type"),
        (lambda m, p: mmllm.generate(m, p, "?", return_dict_in_generate=True), "returns the text of a single answer"),
        (lambda m, p: mmllm.evaluate(m, p, "mlvu", root=None), "evaluate: root: wrong type"),
        (lambda m, p: mmllm.evaluate(m, p, "mlvu", root="x", out=5), "evaluate: out: wrong type"),
        (lambda m, p: mmllm.evaluate(m, p, "mlvu", root="x", limit=0), "evaluate: limit: out of range"),
        (lambda m, p: mmllm.evaluate(m, p, "mlvu", root="x", limt=1), "evaluate: limt: unknown argument. Try: limit"),
        (lambda m, p: mmllm.evaluate(m, p, "mlvu", root="x", missing="ignore"), "evaluate: missing: wrong type"),
    ],
)
def test_the_python_api_refuses_what_the_command_line_does(processor, call, message):
    with pytest.raises(UserError, match=message):
        call(None, processor)
