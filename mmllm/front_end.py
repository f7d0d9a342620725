"""The front end: bank of encoders + graph of connectors. Called once per forward, returns one tensor of rows.

The order of the rows is the order of the pairs, within a pair the order of its streams; blank rows come last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError, nearest
from mmllm.contract.parts import Part, Site
from mmllm.contract.registry import find
from mmllm.contract.types import Geometry, MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.data.sampling import Sampling
from mmllm.encoders.bank import EncoderBank

KINDS = ("video", "image")


@dataclass(frozen=True)
class Node:
    """A line of the connector list: which part, what it reads, for which kind of media."""

    name: str
    inputs: tuple[str, ...]
    only: str | None

    def runs(self, media: MediaSpec) -> bool:
        """Whether the part runs for such media; else its first input passes through."""
        return self.only is None or self.only == media.kind


class FrontEnd(nn.Module):
    """Encoders and connectors of a `model` section.

    Args:
        section: the resolved `model` section of a recipe.
        llm_width: width of the LLM's embeddings.
        where: prefix of key paths in errors (`recipe.yaml:model`).

    Raises:
        UserError: an unknown part or argument, or parts that do not fit; names both and their shapes.
    """

    def __init__(self, section: dict[str, Any], llm_width: int, where: str = "model") -> None:
        super().__init__()
        self.where, self.llm_width = where, llm_width
        self.sampling = Sampling(**bind(Sampling, section["media"], f"{where}.media"))
        self.bank = EncoderBank(section["encoders"], f"{where}.encoders")
        nodes = {node["name"]: node for node in section["connector"]}
        self.output = _output(section["output"], [*nodes, *section["encoders"]], f"{where}.output")
        used = _reached({name: node["in"] for name, node in nodes.items()}, self.output)
        self.nodes = [Node(name, tuple(node["in"]), node.get("only")) for name, node in nodes.items() if name in used]
        self.encoders_used = used & set(section["encoders"])
        self.parts = nn.ModuleDict()
        self._build(nodes)
        self.needs = self._needs()

    def _build(self, sections: dict[str, dict[str, Any]]) -> None:
        nominal = {kind: self.nominal(kind) for kind in KINDS}
        specs = {kind: self.bank.output_specs(nominal[kind]) for kind in KINDS}
        for node in self.nodes:
            if node.only not in (None, *KINDS):
                where = f"{self.where}.connector.{node.name}.only"
                raise UserError(where, "wrong kind", expected="video or image", got=node.only)
            kind = node.only or "video"
            inputs = tuple(specs[kind][name] for name in node.inputs)
            self.parts[node.name] = self._part(node, sections[node.name], inputs)
            for kind in KINDS:
                specs[kind][node.name] = self._declare(node, specs[kind], nominal[kind])
        for kind, streams in self.output.items():
            for stream in streams:
                width = specs[kind][stream].width
                if width != self.llm_width:
                    raise UserError(
                        f"{self.where}.connector.{stream}",
                        f"width {width}, llm takes {self.llm_width}",
                        hint="{type: linear} after it",
                    )

    def nominal(self, kind: str) -> MediaSpec:
        """A medium of this kind as the recipe's own sampling delivers it."""
        if kind == "image":
            return MediaSpec("image", 1)
        return MediaSpec("video", self.sampling.frames or self.sampling.max_frames or 8)

    def _part(self, node: Node, section: dict[str, Any], inputs: tuple[TokenSpec, ...]) -> Part:
        where = f"{self.where}.connector.{node.name}"
        cls = find("connector", section["type"], f"{where}.type")
        arguments = {key: value for key, value in section.items() if key not in ("type", "name", "in", "only")}
        bound = bind(cls, arguments, where)
        if hasattr(self.parts, node.name):
            raise UserError(where, f"a node cannot be called {node.name!r}", hint="name: another")
        try:
            part = cls(Site(inputs, self.llm_width), **bound)
        except ValueError as error:
            raise UserError(where, str(error)) from error
        self._check_needs(node, part.needs(), where)
        return part

    def _check_needs(self, node: Node, needs: Needs, where: str) -> None:
        if (needs.levels or needs.cls or needs.keys) and node.inputs[0] not in self.bank.encoders:
            raise UserError(where, "needs layers of an encoder", expected="in: an encoder", got=node.inputs[0])

    def _needs(self) -> dict[str, Needs]:
        """{encoder: union of what the parts that read it need}."""
        union: dict[str, Needs] = {}
        for node in self.nodes:
            needs, source = self.parts[node.name].needs(), node.inputs[0]
            if source in self.bank.encoders:
                old = union.get(source, Needs())
                merged = {key: tuple(dict.fromkeys(getattr(old, key) + getattr(needs, key))) for key in LAYERED}
                union[source] = replace(old, **merged)
        return union

    def _declare(self, node: Node, specs: dict[str, TokenSpec], media: MediaSpec) -> TokenSpec:
        inputs = [specs[name] for name in node.inputs]
        if not node.runs(media):
            return inputs[0]
        part = self.parts[node.name]
        try:
            for built, given in zip(part.site.inputs, inputs, strict=True):
                if built.width != given.width:
                    raise ValueError(f"built for width {built.width}, an {media.kind} has {given.width}")
            return part.output_spec(*inputs)
        except ValueError as error:
            reads = ", ".join(f"{name}: {spec}" for name, spec in zip(node.inputs, inputs, strict=True))
            raise UserError(f"{self.where}.connector.{node.name}", f"{error}; it reads {reads}") from error

    def walk(self, media: MediaSpec) -> Iterator[tuple[str, nn.Module, tuple[TokenSpec, ...], TokenSpec]]:
        """(name, module, input specs, output spec) of everything that runs for such media, in order."""
        specs = self._specs(media)
        for name in self.bank.encoders:
            if name in self.encoders_used:
                yield name, self.bank.encoders[name], (), specs[name]
        for node in self.nodes:
            if node.runs(media):
                inputs = tuple(specs[name] for name in node.inputs)
                yield node.name, self.parts[node.name], inputs, specs[node.name]

    def streams(self, media: MediaSpec) -> list[TokenSpec]:
        """What reaches the LLM for one clip of this kind, stream by stream."""
        specs = self._specs(media)
        return [specs[name] for name in self.output[media.kind]]

    def _specs(self, media: MediaSpec) -> dict[str, TokenSpec]:
        """{encoder or node: what it gives for such media}."""
        specs = self.bank.output_specs(media)
        for node in self.nodes:
            specs[node.name] = self._declare(node, specs, media)
        return specs

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Sizes in which the encoders want their pixels."""
        used = (self.bank.encoders[name] for name in self.bank.encoders if name in self.encoders_used)
        return tuple(dict.fromkeys(encoder.geometry for encoder in used))

    def forward(self, visual: dict[str, Any], blank: tuple[MediaSpec, ...] = ()) -> tuple[Tensor, int]:
        """All visual rows of a batch.

        Args:
            visual: the batch's dict of media, pairs and spans.
            blank: kinds of media to run on blanks, so that every process touches the same parameters.

        Returns:
            rows [R, D] and how many of the last are blank.
        """
        media, pairs = visual["media"], visual["pairs"]
        per_clip: dict[int, list[Tensor]] = {}
        for spec, members in _groups(media):
            streams = self._run(spec, [media[index] for index in members])
            for row, index in enumerate(members):
                per_clip[index] = [stream.values[row] for stream in streams]
        rows = [stream for clip, _ in pairs for stream in per_clip[clip]]
        blanks = [tokens.values.flatten(0, 1) for spec in blank for tokens in self._run_blank(spec)]
        if not rows and not blanks:
            parameter = next(self.parameters())
            return parameter.new_zeros(0, self.llm_width), 0
        return torch.cat(rows + blanks), sum(len(rows) for rows in blanks)

    def _run(self, spec: MediaSpec, clips: list[dict[str, Any]]) -> list[VisualTokens]:
        pixels = {geometry: torch.stack([clip["pixels"][geometry] for clip in clips]) for geometry in self.geometries}
        times = torch.stack([clip["times"] for clip in clips])
        return self._connect(spec, self.bank(pixels, spec, times, self.needs, self.encoders_used))

    def _run_blank(self, spec: MediaSpec) -> list[VisualTokens]:
        parameter = next(self.parameters())
        encoded = {}
        for name in sorted(self.encoders_used):
            encoder = self.bank.encoders[name]
            if encoder.trainable:
                g = encoder.geometry
                shape = (1, encoder.frames_of(spec), 3, g.height, g.width)
                pixels = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
                encoded[name] = encoder(pixels, spec, self.needs.get(name, Needs()))
            else:
                encoded[name] = self.bank.blank(spec, name, parameter)
        return self._connect(spec, encoded)

    def _connect(self, spec: MediaSpec, tokens: dict[str, VisualTokens]) -> list[VisualTokens]:
        for node in self.nodes:
            inputs = [tokens[name] for name in node.inputs]
            tokens[node.name] = self.parts[node.name](*inputs) if node.runs(spec) else inputs[0]
        return [tokens[name] for name in self.output[spec.kind]]

    def blanks(self, visual: dict[str, Any]) -> tuple[MediaSpec, ...]:
        """The kinds that this batch lacks, as blank media: run when several processes train together."""
        present = {clip["spec"].kind for clip in visual["media"]}
        return tuple(self.nominal(kind) for kind in KINDS if kind not in present)


LAYERED = ("levels", "cls", "keys")


def _output(output: Any, known: list[str], where: str) -> dict[str, list[str]]:
    """A name, a list of streams or one of either per kind -> {kind: [names]}."""
    per_kind = output if isinstance(output, dict) else dict.fromkeys(KINDS, output)
    result = {}
    for kind in KINDS:
        if kind not in per_kind:
            raise UserError(f"{where}.{kind}", "missing")
        streams = per_kind[kind]
        result[kind] = [streams] if isinstance(streams, str) else list(streams)
        for name in result[kind]:
            if name not in known:
                raise UserError(where, f"nothing is called {name!r}", hint=nearest(name, known))
    return result


def _reached(inputs: dict[str, list[str]], output: dict[str, list[str]]) -> set[str]:
    """Names that the output depends on; only those run."""
    todo = [name for streams in output.values() for name in streams]
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += inputs.get(name, [])
    return reached


def _groups(media: list[dict[str, Any]]) -> list[tuple[MediaSpec, list[int]]]:
    groups: dict[MediaSpec, list[int]] = {}
    for index, clip in enumerate(media):
        groups.setdefault(clip["spec"], []).append(index)
    return sorted(groups.items(), key=lambda item: item[0].sort_key)


@lru_cache(maxsize=8)
def shape_copy(section: str, llm_width: int) -> FrontEnd:
    """A front end without memory (meta device), for its shape arithmetic.

    Args:
        section: the resolved `model` section as JSON text, so that equal sections share one copy.
    """
    with torch.device("meta"):
        return FrontEnd(json.loads(section), llm_width)
