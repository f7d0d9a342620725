"""The graph of a connector list: its nodes, what each reads, and what reaches the LLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmllm.contract.errors import UserError, nearest, shown
from mmllm.contract.types import MediaSpec, Needs, PromptFeatures, VisualTokens

KINDS = ("video", "image")
LAYERED = ("hidden_states", "cls", "keys")
"""What a part may request of an encoder's layers besides the tokens."""
CLS_ATTENTION = "cls_attention"


@dataclass(frozen=True)
class Node:
    """A line of the connector list: which part, what it reads, for which kind of media, and whose prompt guides it."""

    name: str
    inputs: tuple[str, ...]
    only: str | None = None
    prompt: str | None = None

    def runs(self, media: MediaSpec) -> bool:
        """Whether the part runs for such media; if not, its first input passes through."""
        return self.only is None or self.only == media.kind

    def reads(self, kind: str) -> list[str]:
        """What such media pass through before it; its first input alone where the part does not run."""
        return list(self.inputs) if self.only in (None, kind) else [self.inputs[0]]


def read_nodes(sections: dict[str, dict[str, Any]], used: set[str], text: list[str], where: str) -> list[Node]:
    """The nodes that the output depends on, in order.

    Args:
        sections: {name: its section of the recipe}.
        text: names of the text sources; a single one is every node's prompt.

    Raises:
        UserError: an unknown kind of media for a node, or a prompt that it cannot have.
    """
    nodes = []
    for name, section in sections.items():
        if name not in used:
            continue
        only, prompt = section.get("only"), section.get("prompt", text[0] if len(text) == 1 else None)
        if only not in (None, *KINDS):
            raise UserError(f"{where}.{name}.only", "wrong kind", expected="video or image", got=only)
        if prompt is not None and prompt not in text:
            hint = nearest(str(prompt), text) if text else "model.text"
            raise UserError(f"{where}.{name}.prompt", f"no text source is called {prompt!r}", hint=hint)
        nodes.append(Node(name, tuple(section["in"]), only, prompt))
    return nodes


def read_output(output: object, known: list[str], where: str) -> dict[str, list[str]]:
    """A name, a list of streams, or either per kind -> {kind: [names]}.

    Raises:
        UserError: a kind without output, or an unknown name.
    """
    per_kind = output if isinstance(output, dict) else dict.fromkeys(KINDS, output)
    for kind in per_kind:
        if kind not in KINDS:
            raise UserError(f"{where}.{kind}", "unknown kind of media", hint=nearest(str(kind), list(KINDS)))
    result = {}
    for kind in KINDS:
        if kind not in per_kind:
            raise UserError(f"{where}.{kind}", "missing")
        streams = per_kind[kind]
        streams = [streams] if isinstance(streams, str) else streams
        if not isinstance(streams, list | tuple) or not streams or not all(isinstance(name, str) for name in streams):
            raise UserError(where, "wrong type", expected="a name or a list of names", got=shown(streams))
        result[kind] = list(streams)
        for name in result[kind]:
            if name not in known:
                raise UserError(where, f"nothing is called {name!r}", hint=nearest(name, known))
    return result


def parse_positions(place: dict[str, str], output: dict[str, list[str]], where: str) -> set[str]:
    """Names of the streams placed at the start of the sequence, after BOS, rather than at their medium.

    Raises:
        UserError: no such stream, or an unknown position.
    """
    streams = sorted({name for names in output.values() for name in names})
    for name, at in place.items():
        if name not in streams:
            raise UserError(f"{where}.{name}", "no such stream", hint=nearest(name, streams))
        if at != "start":
            raise UserError(f"{where}.{name}", "unknown place", expected="start", got=at)
    return set(place)


def reachable(inputs: dict[str, list[str]], output: dict[str, list[str]]) -> set[str]:
    """Names that the output depends on; only those run."""
    todo = [name for streams in output.values() for name in streams]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += inputs.get(name, [])
    return found


def union_needs(needs: list[Needs]) -> Needs:
    """The union of the needs of several parts, without duplicates."""
    union = Needs()
    for need in needs:
        fields = (*LAYERED, "prompt", "prompt_hidden_states")
        joined = {key: tuple(dict.fromkeys(getattr(union, key) + getattr(need, key))) for key in fields}
        union = replace(union, **joined)
    return union


def select_hidden_states(tokens: VisualTokens, needs: Needs, union: Needs) -> VisualTokens:
    """An encoder's tokens with the layers that one part declared, in its order, out of all declared ones."""
    extras = {}
    for name in LAYERED:
        wanted, given = getattr(needs, name), getattr(union, name)
        if wanted:
            order = [given.index(layer) for layer in wanted]
            extra = tokens.extras[name]
            extras[name] = extra if wanted == given else extra[:, :, order]
    if CLS_ATTENTION in tokens.extras:  # asked for by a reducer behind all parts
        extras[CLS_ATTENTION] = tokens.extras[CLS_ATTENTION]
    return replace(tokens, extras=extras)


def own_prompt(prompt: PromptFeatures, needs: Needs, union: Needs) -> PromptFeatures:
    """A prompt with the layers that one part declared, in its order."""
    wanted, given = needs.prompt_hidden_states, union.prompt_hidden_states
    if not wanted or wanted == given:
        return prompt
    return replace(prompt, hidden_states=prompt.hidden_states[:, :, [given.index(layer) for layer in wanted]])
