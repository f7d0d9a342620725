"""A protocol: everything about how a question is posed that affects its answer, as data with a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmllm.eval.items import LETTERS, Item
from mmllm.eval.kinds import KINDS

FRAME_FOLDER_FPS = 3.0


@dataclass(frozen=True)
class Protocol:
    """How a question is posed and its answer read.

    Attributes:
        name: as given to ``--protocol``.
        sampler: name of the frame sampler.
        prompt: name of the prompt function, a key of `PROMPTS`.
        max_new_tokens: longest answer, in tokens.
        parser: name of the parser, a key of `mmllm.eval.parsing.parsers`.
        system: system prompt; empty for none.
        decoding: "greedy", or "likelihood": nothing is generated, the option that is likeliest as an answer counts.
    """

    name: str
    sampler: str
    prompt: str
    max_new_tokens: int
    parser: str
    system: str = ""
    decoding: str = "greedy"

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits over all fields: equal for equal protocols, on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def folder(self) -> str:
        """Name of the folder of its predictions, ``<name>-<hash>``."""
        return f"{self.name}-{self.hash}"


CANONICAL = Protocol("canonical", sampler="uniform", prompt="best_option", max_new_tokens=16, parser="canonical")
LIKELIHOOD = replace(CANONICAL, name="likelihood", decoding="likelihood")
PROTOCOLS = {protocol.name: protocol for protocol in (CANONICAL, LIKELIHOOD)}


def question_block(question: str, options: tuple[str, ...] | list[str]) -> str:
    """``Question: ...``, ``Options:`` and one ``(X) text`` line per option, as the authors of MVBench write it."""
    lines = [f"({letter}) {text}\n" for letter, text in zip(LETTERS, options, strict=False)]
    return f"Question: {question}\nOptions:\n{''.join(lines)}".rstrip()


def prompt(item: Item) -> str:
    """The canonical text of an item: its question block and the request for the best option."""
    return question_block(item.question, item.options) + "\nOnly give the best option."


PROMPTS: dict[str, Callable[[Item], str]] = {"best_option": prompt}


def asked(item: Item, protocol: Protocol) -> str:
    """The text of an item: the protocol's prompt, or its question alone, by its kind."""
    return item.question if KINDS[item.kind].plain else PROMPTS[protocol.prompt](item)


def messages(item: Item, blind: bool = False, protocol: Protocol = CANONICAL) -> list[dict[str, Any]]:
    """The item as chat messages in the format of Hugging Face chat templates.

    Args:
        item: the question; its bound becomes `start` and `end` in seconds, and a folder of frames gets its `fps`.
        blind: leave the video out; the text is the same and does not mention it.
        protocol: which prompt and system prompt.
    """
    content: list[dict[str, Any]] = [] if blind else [_video_entry(item)]
    content.append({"type": "text", "text": asked(item, protocol)})
    chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if protocol.system:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": protocol.system}]})
    return chat


def _video_entry(item: Item) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "video", "path": str(item.media_path)}
    if item.start is not None:
        entry["start"] = item.start
    if item.end is not None:
        entry["end"] = item.end
    if item.frame_folder:
        entry["fps"] = FRAME_FOLDER_FPS
    if (sampler := KINDS[item.kind].sampler) is not None:
        entry["sampler"] = sampler
    return entry
