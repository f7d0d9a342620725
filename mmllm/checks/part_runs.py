"""Runs of a part on the inputs of its examples, each kind of part in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllm.contract.errors import UserError
from mmllm.contract.grounding import Coordinates, Tables
from mmllm.contract.parts import Part
from mmllm.contract.types import Needs, PromptFeatures, TokenSpec, VisualTokens
from mmllm.encoders.common.tokens import frame_tokens

LLM_WIDTH = 16
PROMPT_JOINT = 12
PROMPT_LENGTH = 4
LAYOUT = Coordinates(time=7, height=5, width=6, first=0)
"""Of the tables that parts are given."""


def alive(gradient: Tensor | None) -> bool:
    """Whether a gradient came, and is not zero everywhere."""
    return gradient is not None and bool((gradient != 0).any())


class PartRun:
    """Runs a part on the inputs of its example; the input of clip b does not depend on the batch."""

    def __init__(self, part: Part, inputs: tuple) -> None:
        self.part, self.inputs = part, inputs

    def values(self, clips: list[int], part: nn.Module | None = None) -> Tensor:
        """[B, ...], where gradients enter and what batches are compared by."""
        return self(clips, part).values

    def check_gradients(self, where: str) -> None:
        """Check that what is read gets a gradient, where anything that could learn is read."""

    def check_inputs(self, where: str) -> None:
        """Check that a part leaves its inputs unchanged: others read the same tensors after it."""

    def check_declared(self, where: str) -> None:
        """Check that declared = real."""
        with torch.no_grad():
            real = self([1, 2])
        declared = self.part.output_spec(*self.inputs)
        if real.spec != declared:
            raise UserError(where, "differs from what it declares", expected=f"{declared}", got=f"{real.spec}")
        for name in ("positions", "sizes"):
            if getattr(real, name).shape[:2] != real.values.shape[:2]:
                raise UserError(where, f"{name} do not belong to the tokens", got=list(getattr(real, name).shape))


class EncoderRun(PartRun):
    """Random clips through an encoder."""

    def _pixels(self, clips: list[int]) -> Tensor:
        g, media = self.part.geometry, self.inputs[0]
        shape = (self.part.frames_of(media), 3, g.height, g.width)
        rows = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(clip)) for clip in clips]
        return torch.stack(rows)

    def __call__(self, clips: list[int], part: nn.Module | None = None, needs: Needs | None = None) -> VisualTokens:
        return (part or self.part)(self._pixels(clips), self.inputs[0], needs or Needs())

    def check_inputs(self, where: str) -> None:
        """Check that pixels stay unchanged: encoders of one geometry share them."""
        pixels = self._pixels([1, 2])
        with torch.no_grad():
            self.part(pixels, self.inputs[0], Needs())
        _same({"pixels": pixels}, {"pixels": self._pixels([1, 2])}, where)

    def check_declared(self, where: str) -> None:
        """Check that declared = real, for the tokens and for each extra that the encoder declares."""
        super().check_declared(where)
        for name in ("hidden_states", "cls", "keys"):
            needs = Needs(**{name: (-1,)})
            try:
                declared = self.part.extras_spec(self.inputs[0], needs)
            except ValueError:
                continue
            with torch.no_grad():
                real = self([1, 2], needs=needs).spec.extras
            if real != declared:
                raise UserError(where, "its extras differ from what it declares", expected=declared, got=real)


class TextRun(PartRun):
    """Rows of ids through a text source; padding may differ between a batch and a single row, and must not matter."""

    def __call__(self, clips: list[int], part: nn.Module | None = None) -> PromptFeatures:
        ids, mask = self.part.collate([self.inputs[clip % len(self.inputs)] for clip in clips])
        return (part or self.part)(ids, mask, Needs(prompt=self._fields), self._table())

    @property
    def _fields(self) -> tuple[str, ...]:
        """What the source gives: ids alone where it has no features."""
        return ("tokens", "pooled") if self.part.width else ("ids",)

    def _table(self) -> nn.Module:
        """An embedding table in place of the LLM's, always the same one."""
        rows = max(max(row) for row in self.inputs) + 1
        return nn.Embedding.from_pretrained(torch.randn(rows, LLM_WIDTH, generator=generator(3)))

    def values(self, clips: list[int], part: nn.Module | None = None) -> Tensor:
        """[B, length * C + J], zero where there is no token."""
        found = self(clips, part)
        tokens = (found.ids[..., None].float() if found.tokens is None else found.tokens) * found.mask[..., None]
        missing = max(self.part.length, max(map(len, self.inputs))) - tokens.shape[1]
        tokens = nn.functional.pad(tokens, (0, 0, 0, missing)).flatten(1)
        return tokens if found.pooled is None else torch.cat([tokens, found.pooled], dim=1)

    def check_declared(self, where: str) -> None:
        """Check that widths are as declared, an empty row is absent with one token unmasked, the others are present."""
        ids, mask = self.part.collate([*self.inputs, []])
        with torch.no_grad():
            layers = (-1,) if self.part.layered else ()
            needs = Needs(prompt=self._fields, prompt_hidden_states=layers)
            found = self.part(ids, mask, needs, self._table())
        if not self.part.width:
            if found.tokens is not None or not torch.equal(found.ids, ids):
                raise UserError(where, "declares no features, and has to give the ids as they are")
            return
        pooled = None if found.pooled is None else found.pooled.shape[-1]
        widths, declared = (found.tokens.shape[-1], pooled), (self.part.width, self.part.joint)
        if pooled is not None and declared[1] is None:
            declared = (declared[0], pooled)
        if widths != declared:
            raise UserError(where, "differs from what it declares", expected=f"widths {declared}", got=f"{widths}")
        shape = (*ids.shape, 1, self.part.width)
        states = shape if found.hidden_states is None and not layers else tuple(found.hidden_states.shape)
        if found.tokens.shape[:2] != ids.shape or states != shape:
            raise UserError(where, "not one row per token", expected=list(shape), got=list(states))
        present = [*[True] * len(self.inputs), False]
        if found.present.tolist() != present or int(mask[-1].sum()) != 1:
            raise UserError(where, "an empty prompt must be absent with one token unmasked", got=found.present.tolist())


class ConnectorRun(PartRun):
    """Random tokens through a connector, with the extras and the prompt that it needs."""

    def _tokens(self, clips: list[int]) -> list[VisualTokens]:
        result = []
        for index, spec in enumerate(self.inputs):
            seeds = [clip * 97 + index for clip in clips]
            rows = [torch.randn(spec.tokens, spec.width, generator=generator(seed)) for seed in seeds]
            frames = spec.grid.t if spec.grid else 1
            tokens = frame_tokens(torch.stack(rows), spec.media, spec.grid, frames)
            shapes = spec.extras if index else {**spec.extras, **self._layers(spec, frames)}
            for name, shape in shapes.items():
                extra = [torch.randn(shape, generator=generator(seed + len(name))) for seed in seeds]
                tokens.extras[name] = torch.stack(extra)
            result.append(tokens)
        return result

    def _layers(self, spec: TokenSpec, frames: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder's layers that the part declares."""
        rows = {"hidden_states": spec.tokens, "cls": frames, "keys": spec.tokens}
        wanted = {name: len(getattr(self.part.needs(), name)) for name in rows}
        return {name: (rows[name], count, spec.width) for name, count in wanted.items() if count}

    def _prompt(self, clips: list[int]) -> PromptFeatures:
        """Prompts of 2 to PROMPT_LENGTH tokens."""
        layers = len(self.part.needs().prompt_hidden_states)
        shapes = {"tokens": (PROMPT_LENGTH, LLM_WIDTH), "pooled": (PROMPT_JOINT,)}
        shapes |= {"hidden_states": (PROMPT_LENGTH, layers, LLM_WIDTH)} if layers else {}
        said = {}
        for name, shape in shapes.items():
            rows = [torch.randn(shape, generator=generator(clip * 89 + len(name))) for clip in clips]
            said[name] = torch.stack(rows)
        lengths = torch.tensor([2 + clip % (PROMPT_LENGTH - 1) for clip in clips])
        mask = (torch.arange(PROMPT_LENGTH) < lengths[:, None]).long()
        return PromptFeatures(mask, mask, present=torch.ones(len(clips), dtype=torch.bool), **said)

    def __call__(self, clips: list[int], part: nn.Module | None = None) -> VisualTokens:
        return self._run(self._tokens(clips), clips, part)

    def _context(self, clips: list[int]) -> dict[str, Any]:
        needs, width = self.part.needs(), self.inputs[0].width
        asked = {"prompt": self._prompt(clips)} if needs.prompt or needs.prompt_hidden_states else {}
        if not needs.tables:
            return asked
        tables = (torch.randn(len(LAYOUT), width, generator=generator(seed)) for seed in (3, 4))
        return {**asked, "tables": Tables(*tables, LAYOUT)}

    def _run(self, tokens: list[VisualTokens], clips: list[int], part: nn.Module | None = None) -> VisualTokens:
        return (part or self.part)(*tokens, **self._context(clips))

    def check_inputs(self, where: str) -> None:
        """Check that tokens, their extras and the prompt stay unchanged: other nodes read them too."""
        tokens, context = self._tokens([1, 2]), self._context([1, 2])
        with torch.no_grad():
            self.part(*tokens, **context)
        for index, (given, fresh) in enumerate(zip(tokens, self._tokens([1, 2]), strict=True), start=1):
            if set(given.extras) != set(fresh.extras):
                added = ", ".join(sorted(set(given.extras) ^ set(fresh.extras)))
                raise UserError(where, f"changes the extras of input {index} in place: {added}", hint="a copy")
            _same({**vars(given), **given.extras}, {**vars(fresh), **fresh.extras}, f"{where}, input {index}")
        for name, given in context.items():
            now, fresh = (
                value._asdict() if name == "tables" else vars(value) for value in (given, self._context([1, 2])[name])
            )
            _same(now, fresh, f"{where}, {name}")

    def values(self, clips: list[int], part: nn.Module | None = None) -> Tensor:
        """[B, ...]: the tokens, and the extras that the part has written."""
        tokens = self._tokens(clips)
        return self._flat(self._run(tokens, clips, part), tokens)

    def _flat(self, out: VisualTokens, tokens: list[VisualTokens]) -> Tensor:
        given = set(tokens[0].extras)
        written = [value.float().flatten(1) for name, value in out.extras.items() if name not in given]
        return torch.cat([out.values.flatten(1), *written], dim=1)

    def check_gradients(self, where: str) -> None:
        """Check that every input that affects the output gets a gradient, or what precedes it would never learn."""
        tokens, leaves = self._tokens([1]), []
        for given in tokens:
            read = {"values": given.values, **given.extras}
            leaves.append([tensor.requires_grad_() for tensor in read.values()])
            copies = {name: tensor.clone() for name, tensor in read.items()}  # leaves cannot be inputs of a graph
            given.values, given.extras = copies.pop("values"), copies
        out = self._flat(self._run(tokens, [1]), tokens)
        if out.requires_grad:
            (out * torch.randn(out.shape, generator=generator(5))).sum().backward()
        with torch.no_grad():
            for index, read in enumerate(leaves):
                other = self._tokens([1])
                other[index] = self._tokens([2])[index]
                moved = not torch.equal(self._flat(self._run(other, [1]), other), out)
                if moved and not any(alive(tensor.grad) for tensor in read):
                    raise UserError(where, f"no gradient reaches input {index + 1}: nothing before it would learn")


def _same(after: dict[str, Any], before: dict[str, Any], where: str) -> None:
    """Refuse tensors that have changed."""
    for name, value in before.items():
        if isinstance(value, Tensor) and not torch.equal(after[name], value):
            raise UserError(where, f"changes {name} in place, which other parts read too", hint="a copy")


def generator(seed: int) -> torch.Generator:
    """Random numbers that depend on the seed alone."""
    return torch.Generator().manual_seed(seed)
