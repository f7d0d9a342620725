"""A byte-level BPE tokenizer of about 1,000 entries, trained on NanoWorld's language from a fixed seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<video>")
PHRASES = ("Only give the best option.", "Question:", "Options:")
CHUNKS = r"\([A-Z]\)|\n| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s+"
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}{{- '<video>' -}}
{%- elif part['type'] == 'image' -%}{{- '<image>' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def language(lines: int = 4000) -> Iterator[str]:
    """Texts of NanoWorld from a separate seed, so that the tokenizer is the same for every world."""
    from mmllm.world.training import text_line

    for index in range(lines):
        for turn in text_line(-1, index, 48, 1)["messages"]:  # type: ignore[attr-defined]
            yield turn["content"][-1]["text"]


def build_tokenizer(texts: Iterable[str] | None = None, size: int = 1000) -> PreTrainedTokenizerFast:
    """Train the tokenizer (about a second); any text encodes and decodes without loss.

    "(A)" is one token, a digit and a mark are one token each, words carry their leading space.

    Args:
        texts: what to train on; NanoWorld's own language by default.
        size: largest number of entries.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CHUNKS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(PHRASES),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(language() if texts is None else texts, trainer)
    core.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        extra_special_tokens=["<eos>", "<|user|>", "<|assistant|>", "<image>", "<video>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
