"""What every part must keep: declared = real, no garbage from missing weights, gradients reach it, batch = single.

One function, called by the tests over all registered parts and by `mmllm recipe check` on a user's own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.configuration import MMLLMConfig
from mmllm.contract.arguments import bind
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Part, Site
from mmllm.contract.registry import find
from mmllm.contract.types import MediaSpec, Needs, TokenSpec, VisualTokens
from mmllm.encoders.tokens import frame_tokens
from mmllm.model import MMLLMPreTrainedModel

LLM_WIDTH = 16


def check_part(kind: str, name: str) -> int:
    """Check a registered part on each of its own examples; returns how many there are.

    Raises:
        UserError: the part breaks one of the rules; names the example and the rule.
    """
    cls = find(kind, name)
    where = f"{kind} {name}"
    if Part.examples.__func__ is cls.examples.__func__:
        raise UserError(where, "gives no examples()", hint="yield (arguments, input specs) pairs")
    examples = list(cls.examples())
    if not examples:
        raise UserError(where, "gives no examples()", hint="yield (arguments, input specs) pairs")
    for number, (arguments, inputs) in enumerate(examples, start=1):
        _check_example(cls, arguments, inputs, f"{where}, example {number} {arguments}")
    return len(examples)


def _check_example(cls: type, arguments: dict[str, Any], inputs: tuple, where: str) -> None:
    bound = bind(cls, arguments, where)
    torch.manual_seed(0)
    part = _build(cls, bound, inputs)
    runner = _EncoderRun(part, inputs[0]) if isinstance(part, Encoder) else _ConnectorRun(part, inputs)
    _declared_is_real(part, runner, inputs, where)
    _no_garbage(cls, bound, inputs, part, where)
    _gradients_reach(part, runner, where)
    _batch_is_single(part, runner, where)


def _build(cls: type, arguments: dict[str, Any], inputs: tuple) -> Part:
    specs = () if inputs and isinstance(inputs[0], MediaSpec) else inputs
    return cls(Site(specs, LLM_WIDTH), **arguments)


class _EncoderRun:
    """Runs an encoder on random clips; the pixels of clip b do not depend on the batch."""

    def __init__(self, part: Encoder, media: MediaSpec) -> None:
        self.part, self.media = part, media

    def __call__(self, clips: list[int], part: nn.Module | None = None) -> VisualTokens:
        g = self.part.geometry
        shape = (self.part.frames_of(self.media), 3, g.height, g.width)
        pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(clip)) for clip in clips]
        return (part or self.part)(torch.stack(pixels), self.media, Needs())


class _ConnectorRun:
    """Runs a connector on random tokens; those of clip b do not depend on the batch."""

    def __init__(self, part: Part, inputs: tuple[TokenSpec, ...]) -> None:
        self.part, self.inputs = part, inputs

    def _tokens(self, clips: list[int]) -> list[VisualTokens]:
        result = []
        for place, spec in enumerate(self.inputs):
            rows = [torch.randn(spec.tokens, spec.width, generator=_generator(clip * 97 + place)) for clip in clips]
            frames = spec.grid.t if spec.grid else 1
            result.append(frame_tokens(torch.stack(rows), spec.media, spec.grid, frames))
        return result

    def __call__(self, clips: list[int], part: nn.Module | None = None) -> VisualTokens:
        return (part or self.part)(*self._tokens(clips))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _declared_is_real(part: Part, run: Any, inputs: tuple, where: str) -> None:
    with torch.no_grad():
        real = run([1, 2])
    declared = part.output_spec(*inputs)
    if real.spec != declared:
        raise UserError(where, "declared is not real", expected=f"{declared}", got=f"{real.spec}")
    for name in ("positions", "sizes"):
        if getattr(real, name).shape[:2] != real.values.shape[:2]:
            raise UserError(where, f"{name} do not belong to the tokens", got=list(getattr(real, name).shape))


def _no_garbage(cls: type, arguments: dict[str, Any], inputs: tuple, real: Part, where: str) -> None:
    """Loading starts on the meta device: what the checkpoint lacks must be written by the part itself."""
    with torch.device("meta"):
        part = _build(cls, arguments, inputs)
    part.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*part.parameters(), *part.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model = MMLLMPreTrainedModel(MMLLMConfig(text_config={"model_type": "llama"}))
    model.part = part
    for module in model.modules():  # a tower marks its modules as initialised when it is built
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(where, f"{name} stays unwritten when a checkpoint lacks it", hint="reset_parameters()")


def _gradients_reach(part: Part, run: Any, where: str) -> None:
    trained = copy.deepcopy(part).train()
    values = run([1, 2], trained).values
    weights = torch.randn(values.shape, generator=_generator(5))
    parameters = dict(trained.named_parameters())
    if not parameters:
        return
    (values * weights).sum().backward()
    dead = [name for name, value in parameters.items() if not _alive(value.grad)]
    # A tower read before its last layer leaves that layer without gradient; a whole part without any is a mistake.
    if len(dead) == len(parameters) or (dead and not isinstance(part, Encoder)):
        raise UserError(where, f"no gradient reaches {', '.join(dead[:3])}")


def _alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _batch_is_single(part: Part, run: Any, where: str) -> None:
    part.eval()
    with torch.no_grad():
        together = run([1, 2, 3]).values
        for row, clip in enumerate((1, 2, 3)):
            alone = run([clip]).values[0]
            worst = float((together[row] - alone).abs().max())
            if not worst <= 1e-5:
                raise UserError(where, f"a batch differs from single clips by {worst:.1e}")
