"""The tokenizer: lossless, lean, and the same every time."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.world.tokenizer import PHRASES, SPECIAL, build_tokenizer
from mmllm.world.training import text_line


def test_any_text_survives() -> None:
    tokenizer = build_tokenizer()
    texts = [
        "",
        " ",
        "a  b\t\n\n c",
        "Grüße, 日本語 🎬!",
        "(A) (b) [C] 3.14159",
        "xQuestion:Options: y",
        "x' don't \\n",
    ]
    texts += [turn["content"][0]["text"] for i in range(100) for turn in text_line(9, i, 48, 1)["messages"]]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_letters_and_phrases_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    for text in ["(A)", "(E)", "\n", " red", " moves", *PHRASES, *SPECIAL]:
        assert len(tokenizer.encode(text)) == 1, text
    assert 300 < len(tokenizer) <= 1000
    assert tokenizer.pad_token == "<pad>" and tokenizer.eos_token == "<|end|>"
    kept = tokenizer.decode(
        tokenizer.encode("Question: a?\nOnly give the best option.<|end|>"), skip_special_tokens=True
    )
    assert kept == "Question: a?\nOnly give the best option."


def test_chat_template() -> None:
    tokenizer = build_tokenizer()
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "video", "path": "x"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "(A)"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "So?"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>Look.<|end|><|user|><video>Why?<|end|><|assistant|>(A)<|end|><|user|><image>So?<|end|><|assistant|>"
    )


def test_the_saved_tokenizer_is_the_same(tiny: Path) -> None:
    from transformers import AutoTokenizer

    saved, built = AutoTokenizer.from_pretrained(tiny / "tokenizer"), build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    line = json.loads((tiny / "train/text.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = [t.apply_chat_template(line["messages"], tokenize=True)["input_ids"] for t in (saved, built)]
    assert ids[0] == ids[1]


def test_it_pads_before_a_text() -> None:
    """Prompts of a batch end together, where the answers begin."""
    tokenizer = build_tokenizer()
    short, long = tokenizer(["left", "A red square moves left."], padding=True)["input_ids"]
    padding = short.count(tokenizer.pad_token_id)
    assert len(short) == len(long) and padding > 0
    assert set(short[:padding]) == {tokenizer.pad_token_id} and tokenizer.decode(short[padding:]) == "left"
