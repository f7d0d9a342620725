"""What an answer costs, by arithmetic: tower, connector, prefill and decoding, with fewer visual tokens or all of them.

Two ways of counting: exact multiply-adds of what is executed here, and the accounting of AIM's paper (LLM-Viewer's
operations, a multiply-add being two), which bills a layer for what it passes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from mmllm.checks.summary import Row, count_macs, macs, short, walk
from mmllm.contract.errors import UserError
from mmllm.contract.reducer import Schedule
from mmllm.model.blueprint import Blueprint
from mmllm.model.reduction.pixels import side_for, small_bank
from mmllm.model.reduction.setting import build_reducer
from mmllm.tables import aligned

A100 = (312e12, 1555e9)
"""Operations and bytes per second of the card whose time the paper computes."""
SCORES = 5
"""Operations of a softmax per score, of the paper's counting."""


@dataclass(frozen=True)
class Sizes:
    """What the paper's counting reads of an LLM.

    Attributes:
        residuals: sums with the residual stream that are counted per layer. The paper's command for Qwen2 counts one,
            the one for Vicuna both.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    residuals: int = 2

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """From the config of an LLM."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            config.num_hidden_layers,
            config.vocab_size,
        )

    def operations(self, tokens: int) -> list[tuple[int, int]]:
        """(operations, bytes moved in bfloat16) of each step of a layer over so many tokens."""
        n, h, head = tokens, self.hidden, self.hidden // self.heads
        keys, scores = head * self.kv_heads, self.heads * tokens * tokens
        into_mlp, out_of_mlp = (h, self.intermediate), (self.intermediate, h)
        products = [(h, h), (h, keys), (h, keys), (h, h), into_mlp, into_mlp, out_of_mlp]
        steps = [(2 * n * i * o, 2 * (i * o + n * i + n * o)) for i, o in products]
        steps.append((2 * n * n * h, 2 * (2 * n * keys + scores)))
        steps.append((2 * n * n * h, 2 * (scores + n * h + n * keys)))
        steps.append((SCORES * scores, 4 * scores))
        steps += [(7 * n * h, 4 * n * h)] * 2 + [(n * h, 4 * n * h)] * self.residuals
        return [*steps, (2 * n * h, 6 * n * h)]

    def flops(self, tokens: list[int]) -> int:
        """Of a prompt of which each layer reads so many tokens; the head is counted once, with one operation each."""
        return sum(count for n in tokens for count, _ in self.operations(n)) + self.hidden * self.vocabulary

    def roofline(self, tokens: list[int], card: tuple[float, float] = A100) -> float:
        """Seconds of the same if each step were limited by computing or by memory alone; nothing is measured."""
        rate, bandwidth = card
        head = (self.hidden * self.vocabulary, 2 * (self.hidden * self.vocabulary + self.hidden + self.vocabulary))
        steps = [*(step for n in tokens for step in self.operations(n)), head]
        return sum(max(count / rate, moved / bandwidth) for count, moved in steps)


def billed(schedule: Schedule, visual: int, text: int) -> list[int]:
    """Tokens per layer as the paper bills them: a layer counts what it passes on, not what it reads."""
    return [int(share * visual + text) for share in schedule.after]


def entering(schedule: Schedule, visual: int, text: int) -> list[int]:
    """Tokens that each layer really reads."""
    return [visual + text, *(count + text for count in schedule.counts(visual, text)[:-1])]


class LLMCost:
    """Exact multiply-adds of an LLM's layers, by counting them on the meta device.

    Args:
        config: of the LLM.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        with torch.device("meta"):
            self.llm = AutoModel.from_config(config)

    @cached_property
    def per_token(self) -> tuple[float, float]:
        """Of one layer: for each token, and for each pair of a query and a key."""
        few, many = (self._layers(n) / self.config.num_hidden_layers for n in (64, 128))
        pair = (many / 128 - few / 64) / 64
        return few / 64 - 64 * pair, pair

    def _layers(self, n: int) -> int:
        with torch.device("meta"):
            ids, mask = torch.zeros(1, n, dtype=torch.long), torch.zeros(1, 1, n, n, dtype=torch.bool)
            return count_macs(self.llm, input_ids=ids, attention_mask=mask, use_cache=False)

    @cached_property
    def before_output(self) -> int:
        """Of one layer, for each token: its projections to queries, keys and values."""
        layer = self.llm.layers[0]
        linear = {name: m.weight.numel() for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        return sum(size for name, size in linear.items() if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj"))

    def prefill(self, read: list[int], passed: list[int]) -> int:
        """Of a prompt of which each layer reads `read` tokens and sends `passed` through the rest of it.

        Where fewer pass than were read, those that do are projected twice. Causal attention is counted whole.
        """
        token, pair = self.per_token
        total = 0.0
        for n, m in zip(read, passed, strict=True):
            total += m * token + n * n * pair + (n * self.before_output if m < n else 0)
        return int(total)

    def votes(self, read: list[int], passed: list[int], last: int) -> int:
        """Of AIM's importance in the layers that drop some but not all of their visual tokens."""
        sizes = Sizes.of(self.config)
        asked = [n for n, m in zip(read, passed, strict=True) if last < m < n]
        return sum(n * n * sizes.hidden + 5 * sizes.heads * n * n for n in asked)

    def decoding(self, held: list[int], tokens: int) -> int:
        """Of so many tokens after a prompt of which each layer holds `held`; heads included."""
        token, pair = self.per_token
        mean = (tokens - 1) / 2
        layers = sum(tokens * (token + pair * (n + 1 + mean)) for n in held)
        return int(layers + tokens * self.config.hidden_size * self.config.vocab_size)


@dataclass(frozen=True)
class Cost:
    """One line of the table: multiply-adds, and the paper's own numbers.

    Attributes:
        reduce: the setting's name.
        first, mean, last: visual tokens that the layers read.
        votes: of the reducer itself, where it reads queries and keys; part of `prefill`.
        billed, executed: floating-point operations of the prefill in the paper's accounting.
    """

    reduce: str
    first: int
    mean: float
    last: int
    tower: int
    connector: int
    prefill: int
    votes: int
    decoding: int
    billed: int
    executed: int


def costs(
    blueprint: Blueprint,
    settings: dict[str, dict[str, Any] | None],
    kind: str = "video",
    frames: int | None = None,
    text: int = 100,
    answer: int = 32,
) -> list[Cost]:
    """The cost of an answer of `answer` tokens to `text` tokens and one medium, under each setting.

    Where a reducer makes frames smaller, the connector is counted in proportion to the tokens.

    Raises:
        UserError: a budget cannot be met by this LLM.
    """
    rows = walk(blueprint, kind, frames)[:-1]
    tower = sum(row.macs for row in rows if row.part in blueprint.plan.bank.encoders or _is_text(row, blueprint))
    connector = sum(row.macs for row in rows) - tower
    visual = sum(row.tokens for row in rows if row.reaches)
    llm, sizes = LLMCost(blueprint.config.text_config), Sizes.of(blueprint.config.text_config)
    found = []
    for name, section in settings.items():
        schedule = _schedule(section, sizes.layers)
        seeing, joining, few = _front(blueprint, section, kind, frames, (tower, connector, visual))
        door = few if few < visual else max(1, int(schedule.door * visual + 1e-9)) if visual else 0
        read = entering(schedule, door, text)
        passed = [count + text for count in schedule.counts(door, text)]
        votes = llm.votes(read, passed, text) if section is not None and section["type"] == "aim" else 0
        seen = [n - text for n in read]
        found.append(
            Cost(
                name,
                seen[0],
                sum(seen) / len(seen),
                seen[-1],
                seeing,
                joining,
                llm.prefill(read, passed) + votes,
                votes,
                llm.decoding(read, answer),
                sizes.flops(billed(schedule, door, text)),
                sizes.flops(read),
            )
        )
    return found


def _front(
    blueprint: Blueprint,
    section: dict[str, Any] | None,
    kind: str,
    frames: int | None,
    plain: tuple[int, int, int],
) -> tuple[int, int, int]:
    """Multiply-adds of towers and connector, and tokens, under a setting; from those without one."""
    reducer = None if section is None else build_reducer(section)
    tower, connector, _ = plain
    if reducer is None or reducer.shrink is None:
        return plain
    plan = blueprint.plan
    media = plan.nominal(kind) if frames is None or kind == "image" else replace(plan.nominal(kind), frames=frames)
    names, small = plan.encoders_of(media), small_bank(plan.bank, side_for(plan, reducer.shrink**2))
    whole, less = (sum(macs(bank.encoders[name], (), media) for name in names) for bank in (plan.bank, small))
    tokens = [sum(bank.encoders[name].output_spec(media).tokens for name in names) for bank in (plan.bank, small)]
    visual = sum(spec.tokens for spec in plan.streams_through(small, media))
    return tower - whole + less, connector * tokens[1] // tokens[0], visual


def _is_text(row: Row, blueprint: Blueprint) -> bool:
    return row.part in blueprint.plan.prompts.sources


def _schedule(section: dict[str, Any] | None, layers: int) -> Schedule:
    if section is None:
        return Schedule(1.0, (1.0,) * layers)
    try:
        return build_reducer(section).schedule(layers)
    except ValueError as error:
        raise UserError(f"reduce.{section['type']}", str(error)) from error


def render(found: list[Cost]) -> str:
    """The table, in multiply-adds."""
    head = ("reduce", "visual tokens first/mean/last layer", "tower", "connector", "prefill", "decoding", "total")
    lines = [head]
    for cost in found:
        total = cost.tower + cost.connector + cost.prefill + cost.decoding
        numbers = (cost.tower, cost.connector, cost.prefill, cost.decoding, total)
        lines.append((cost.reduce, f"{cost.first} / {cost.mean:.0f} / {cost.last}", *map(short, numbers)))
    notes = [
        f"{cost.reduce}: prefill by the paper's accounting, {cost.billed / 1e12:.4g} TFLOPs billed, "
        f"{cost.executed / 1e12:.4g} executed"
        for cost in found
    ]
    return "\n".join([*aligned(lines), "", *notes])
