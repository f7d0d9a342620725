"""The plan of a front end: which part reads what, and the shape of everything, by arithmetic alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError
from mmllm.contract.grounding import Coordinates
from mmllm.contract.parts import NoPrompt, Part, Site
from mmllm.contract.registry import find, said_by
from mmllm.contract.types import Geometry, MediaSpec, Needs, TokenSpec
from mmllm.data.media.sampling import Sampling
from mmllm.data.media.tiling import Tiling
from mmllm.model.connector_graph import (
    KINDS,
    LAYERED,
    Node,
    parse_positions,
    reachable,
    read_nodes,
    read_output,
    union_needs,
)
from mmllm.model.encoder_bank import EncoderBank
from mmllm.model.prompt_bank import PromptBank

NODE_KEYS = ("type", "name", "in", "only", "prompt")


class FrontEndPlan:
    """Encoders, text sources and connectors of a `model` section: built, wired and measured, never run.

    Args:
        section: the resolved `model` section of a recipe.
        llm_width: width of the LLM's embeddings.
        where: prefix of key paths in errors (`recipe.yaml:model`).

    Attributes:
        sampling: how the recipe samples a video.
        tiling: how it cuts an image into views, or None.
        bank: the encoders.
        prompts: the text sources.
        parts: {node: its part}.
        nodes: what runs, in order.
        output: {kind of media: names of the streams that reach the LLM}.
        first: names of the streams that stand at the start of the sequence.
        encoders_used: names of the encoders that the output depends on.
        used: {kind of media: names of encoders and nodes that its output depends on}; only those run for it.
        needs: {encoder: union of what its readers need}.
        text_needs: {text source: union of what its readers need}.
        vocabulary: the axes of its coordinates, or None.
        alignment_levels: how many alignment levels all parts know, or None where no part reads them.

    Raises:
        UserError: an unknown part or argument, or parts that do not fit; names both and their shapes.
    """

    def __init__(self, section: dict[str, Any], llm_width: int, where: str = "model") -> None:
        self.where, self.llm_width = where, llm_width
        media = {key: value for key, value in section["media"].items() if key != "tiles"}
        self.sampling = Sampling(**bind(Sampling, media, f"{where}.media"))
        self.bank = EncoderBank(section["encoders"], f"{where}.encoders")
        self.prompts = PromptBank(section.get("text") or {}, f"{where}.text", llm_width)
        vocabulary = section.get("vocabulary")
        where_ids = f"{where}.vocabulary"
        self.vocabulary = Coordinates(**bind(Coordinates, vocabulary, where_ids)) if vocabulary else None
        nodes = {node["name"]: node for node in section["connector"]}
        self.output = read_output(section["output"], [*nodes, *section["encoders"]], f"{where}.output")
        self.first = parse_positions(section.get("place") or {}, self.output, f"{where}.place")
        used = reachable({name: node["in"] for name, node in nodes.items()}, self.output)
        self.nodes = read_nodes(nodes, used, list(self.prompts.sources), f"{where}.connector")
        self.encoders_used = used & set(section["encoders"])
        self.used = {
            kind: reachable({node.name: node.reads(kind) for node in self.nodes}, {kind: self.output[kind]})
            for kind in KINDS
        }
        self.parts = nn.ModuleDict()
        self._streams: dict[MediaSpec, list[TokenSpec]] = {}
        self._build(nodes)
        self.needs = self._union(lambda node: node.inputs[0] if node.inputs[0] in self.bank.encoders else None)
        self.text_needs = self._union(lambda node: node.prompt if self.guided(node) else None)
        for kind in KINDS:  # again, with the layers that the encoders deliver
            self._specs(self.nominal(kind))
        known = [part.needs().alignment_levels for part in self.parts.values()]
        self.alignment_levels = min((count for count in known if count is not None), default=None)
        self.tiling = self._tiling(section["media"].get("tiles"))

    def __deepcopy__(self, memo: dict[int, Any]) -> FrontEndPlan:
        """A plan does not change: a copy of a model or of a processor shares it."""
        return self

    # --- building the parts, in the order of the graph

    def _build(self, sections: dict[str, dict[str, Any]]) -> None:
        nominal = {kind: self.nominal(kind) for kind in KINDS}
        specs = {kind: self.bank.output_specs(nominal[kind]) for kind in KINDS}
        for node in self.nodes:
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

    def _part(self, node: Node, section: dict[str, Any], inputs: tuple[TokenSpec, ...]) -> Part:
        where = f"{self.where}.connector.{node.name}"
        cls = find("connector", section["type"], f"{where}.type")
        arguments = {key: value for key, value in section.items() if key not in NODE_KEYS}
        bound = bind(cls, arguments, where)
        if hasattr(self.parts, node.name):
            raise UserError(where, f"a node cannot be called {node.name!r}", hint="name: another")
        source = self.prompts.sources[node.prompt] if node.prompt else None
        widths = (source.width, source.joint) if source is not None else (None, None)
        try:
            part = cls(Site(inputs, self.llm_width, *widths), **bound)
        except NoPrompt as error:
            raise self._no_prompt(where) from error
        except (ValueError, RuntimeError, ArithmeticError) as error:  # torch refuses sizes when it creates tensors
            raise UserError(where, said_by(error)) from error
        self._check_needs(node, part.needs(), where)
        return part

    def _check_needs(self, node: Node, needs: Needs, where: str) -> None:
        if any(getattr(needs, name) for name in LAYERED) and node.inputs[0] not in self.bank.encoders:
            raise UserError(where, "needs layers of an encoder", expected="in: an encoder", got=node.inputs[0])
        if (needs.prompt or needs.prompt_hidden_states) and node.prompt is None:
            raise self._no_prompt(where)
        if needs.tables and self.vocabulary is None:
            raise UserError(where, "needs coordinates", hint="model.vocabulary: {type: coordinates}")

    def _no_prompt(self, where: str) -> UserError:
        known = list(self.prompts.sources)
        hint = f"prompt: {' or '.join(known)}" if known else "model.text: {name: {type: clip_text, ...}}"
        return UserError(where, "needs the prompt, but no text source is named for it", hint=hint)

    def guided(self, node: Node) -> bool:
        """Whether the node's part reads a prompt."""
        needs = self.parts[node.name].needs()
        return bool(needs.prompt or needs.prompt_hidden_states)

    def _union(self, source_of: Callable[[Node], str | None]) -> dict[str, Needs]:
        """{source: union of the needs of the parts that read it}."""
        found: dict[str, list[Needs]] = {}
        for node in self.nodes:
            source = source_of(node)
            if source is not None:
                found.setdefault(source, []).append(self.parts[node.name].needs())
        return {source: union_needs(needs) for source, needs in found.items()}

    def _tiling(self, section: dict[str, Any] | None) -> Tiling | None:
        """How an image is cut into views: size and tokens of a view are those of the first encoder in use."""
        if section is None:
            return None
        where = f"{self.where}.media.tiles"
        name, geometry = next(iter(self.geometries.items()))
        grid = self.bank.encoders[name].output_spec(MediaSpec("image", 1)).grid
        if grid is None or geometry.height != geometry.width or grid.h != grid.w:
            raise UserError(where, "tiles need square views on a grid", got=f"{name}: {grid}")
        sizes = {"size": geometry.height, "patches": grid.h}
        return Tiling(**bind(Tiling, {**sizes, **section}, where))

    # --- shapes

    def nominal(self, kind: str) -> MediaSpec:
        """A medium of this kind as the recipe's own sampling delivers it."""
        if kind == "image":
            return MediaSpec("image", 1)
        return MediaSpec("video", self.sampling.frames or self.sampling.max_frames or 8)

    def streams(self, media: MediaSpec) -> list[TokenSpec]:
        """What reaches the LLM for one clip of this kind, stream by stream."""
        if media not in self._streams:
            specs = self._specs(media)
            self._streams[media] = [specs[name] for name in self.output[media.kind]]
        return self._streams[media]

    def streams_through(self, bank: EncoderBank, media: MediaSpec) -> list[TokenSpec]:
        """What would reach the LLM through other encoders of the same names."""
        specs = self._specs(media, bank)
        return [specs[name] for name in self.output[media.kind]]

    def walk(self, media: MediaSpec) -> Iterator[tuple[str, nn.Module, tuple[TokenSpec, ...], TokenSpec]]:
        """(name, module, input specs, output spec) of everything that runs for such media, in order."""
        specs = self._specs(media)
        for name in self.encoders_of(media):
            yield name, self.bank.encoders[name], (), specs[name]
        for node in self.nodes:
            if node.runs(media) and node.name in self.used[media.kind]:
                inputs = tuple(self._read(node, specs, media))
                yield node.name, self.parts[node.name], inputs, specs[node.name]

    def encoders_of(self, media: MediaSpec) -> list[str]:
        """Names of the encoders that such media pass through."""
        return [name for name in self.bank.encoders if name in self.used[media.kind]]

    @property
    def geometries(self) -> dict[str, Geometry]:
        """{encoder in use: the size in which it wants its pixels}."""
        encoders = self.bank.encoders.items()
        return {name: encoder.geometry for name, encoder in encoders if name in self.encoders_used}

    def _specs(self, media: MediaSpec, bank: EncoderBank | None = None) -> dict[str, TokenSpec]:
        """{encoder or node: its output for such media}."""
        specs = (bank or self.bank).output_specs(media)
        for node in self.nodes:
            specs[node.name] = self._declare(node, specs, media)
        return specs

    def _declare(self, node: Node, specs: dict[str, TokenSpec], media: MediaSpec) -> TokenSpec:
        inputs = [specs[name] for name in node.inputs]
        if not node.runs(media):
            return inputs[0]
        part = self.parts[node.name]
        try:
            for built, given in zip(part.site.inputs, inputs, strict=True):
                if built.width != given.width:
                    raise ValueError(f"built for width {built.width}, an {media.kind} has {given.width}")
            inputs = self._read(node, specs, media)
            for extra in part.needs().extras:
                if extra not in inputs[0].extras:
                    raise ValueError(f"needs {extra}, which an earlier part has to write")
            return part.output_spec(*inputs)
        except ValueError as error:
            reads = ", ".join(f"{name}: {spec}" for name, spec in zip(node.inputs, inputs, strict=True))
            raise UserError(f"{self.where}.connector.{node.name}", f"{error}; it reads {reads}") from error

    def _read(self, node: Node, specs: dict[str, TokenSpec], media: MediaSpec) -> list[TokenSpec]:
        """The inputs of a node, with the encoder layers that it declared."""
        inputs, first = [specs[name] for name in node.inputs], node.inputs[0]
        if first in self.bank.encoders:
            extras = self.bank.encoders[first].extras_spec(media, self.parts[node.name].needs())
            inputs[0] = replace(inputs[0], extras=extras)
        return inputs


def meta_plan(section: dict[str, Any], llm_width: int, where: str = "model") -> FrontEndPlan:
    """A plan whose parts take no memory (meta device)."""
    with torch.device("meta"):
        return FrontEndPlan(section, llm_width, where)


@lru_cache(maxsize=8)
def shared_plan(section: str, llm_width: int) -> FrontEndPlan:
    """`meta_plan` of a section given as JSON text, so that equal sections share one."""
    return meta_plan(json.loads(section), llm_width)
