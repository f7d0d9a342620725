"""The user's question, for parts that process a clip with the question in mind: the text sources of a recipe."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import bind, parse
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Site, TextSource
from mmllm.contract.registry import find
from mmllm.contract.types import Needs, PromptFeatures
from mmllm.processing.content import texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Literal["all", "first", "last"]


class PromptBank(nn.Module):
    """The text sources of a recipe, by name.

    Args:
        sections: {name: {type: ..., turns: all | first | last, arguments}}; `turns` says which of the user's turns
            guide (default all, joined); the assistant's turns never do.
        where: key path for errors.
        llm_width: width of the LLM's embeddings.
    """

    def __init__(self, sections: dict[str, dict[str, Any]], where: str = "model.text", llm_width: int = 0) -> None:
        super().__init__()
        self.sources = nn.ModuleDict()
        self.turns: dict[str, Turns] = {}
        for name, section in sections.items():
            self.sources[name] = build_source(section, f"{where}.{name}", llm_width)
            self.turns[name] = parse(section.get("turns", "all"), Turns, f"{where}.{name}.turns")

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the LLM's tokenizer to the sources with `tokenizer: llm`."""
        for source in self.sources.values():
            if getattr(source, "tokenizer_name", None) == "llm":
                source.__dict__["_tokenizer"] = tokenizer

    def encode(self, said: list[str]) -> dict[str, list[int]]:
        """{source: ids} of what a user said, turn by turn; no ids if nothing was said. Runs in a loader worker."""
        rows = {}
        for name, source in self.sources.items():
            chosen = {"all": said, "first": said[:1], "last": said[-1:]}[self.turns[name]]
            text = "\n".join(chosen).strip()
            rows[name] = source.encode(text) if text else []
        return rows

    def collate(
        self, rows: list[dict[str, list[int]]], alignment_levels: list[int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """{source: ids and mask [P, L], level [P]} of P prompts; a prompt without ids counts as no prompt.

        Args:
            alignment_levels: the alignment level of each prompt's record, -1 if it has none; default: none has one.
        """
        level = torch.tensor([-1] * len(rows) if alignment_levels is None else alignment_levels)
        prompts = {}
        for name, source in self.sources.items():
            ids, mask = source.collate([row.get(name, []) for row in rows])
            prompts[name] = {"ids": ids, "mask": mask, "alignment_level": level}
        return prompts

    def blank(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """One empty prompt."""
        batch = self.collate([{}])
        return {name: {key: value.to(device) for key, value in item.items()} for name, item in batch.items()}

    def forward(
        self, prompts: dict[str, dict[str, Tensor]], needs: dict[str, Needs], embed_tokens: nn.Module | None
    ) -> dict[str, PromptFeatures]:
        """Features of P prompts from every source that a part reads.

        Args:
            needs: {source: union of the needs of the parts that read it}.
            embed_tokens: the LLM's embedding table, for a source without its own.
        """
        features = {}
        table = any(parameter.requires_grad for parameter in embed_tokens.parameters()) if embed_tokens else False
        for name, wanted in needs.items():
            source: TextSource = self.sources[name]
            # A source without its own weights reads the table, and gradients reach what it reads.
            trains = (source.trainable or table) and torch.is_grad_enabled()
            with nullcontext() if trains else torch.no_grad():
                item = prompts[name]
                found = source(item["ids"], item["mask"], wanted, embed_tokens)
            features[name] = replace(found, alignment_level=item.get("alignment_level"))
        return features


def user_turns(messages: list[dict[str, Any]]) -> list[str]:
    """The text of each of the user's turns."""
    users = (message for message in messages if message["role"] == "user")
    return [" ".join(text.strip() for text in texts_of(message)) for message in users]


def build_source(section: dict[str, Any], where: str, llm_width: int = 0) -> TextSource:
    """One text source from its section of a recipe, without weights.

    Raises:
        UserError: no such source, or its arguments do not fit.
    """
    if not isinstance(section, dict) or "type" not in section:
        raise UserError(f"{where}.type", "missing", expected="the name of a text source")
    cls = find("text", section["type"], f"{where}.type")
    bound = bind(cls, {key: value for key, value in section.items() if key not in ("type", "turns")}, where)
    try:
        return cls(Site(llm_width=llm_width), **bound)
    except ValueError as error:
        raise UserError(where, str(error)) from error
