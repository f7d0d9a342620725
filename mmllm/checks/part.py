"""Rules for every part: declared = real, no garbage from missing weights, gradients reach it, batch = single.

One function, called by the tests on all registered parts and by `mmllm recipe check` on a user's own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmllm.checks.part_runs import LLM_WIDTH, PROMPT_JOINT, ConnectorRun, EncoderRun, PartRun, TextRun, alive, generator
from mmllm.contract.arguments import bind, signature
from mmllm.contract.errors import UserError
from mmllm.contract.parts import Encoder, Part, Site, TextSource, Tower
from mmllm.contract.registry import find, raised_at
from mmllm.contract.types import TokenSpec
from mmllm.model.config import MMLLMConfig
from mmllm.model.modeling import MMLLMPreTrainedModel


def check_part(kind: str, name: str) -> int:
    """Check a registered part on each of its own examples; returns the number of examples.

    Raises:
        UserError: the part breaks one of the rules; names the example and the rule.
    """
    cls = find(kind, name)
    where = f"{kind} {name}"
    if Part.examples.__func__ is cls.examples.__func__:
        raise UserError(where, "yields no examples()", hint="yield (arguments, input specs) pairs")
    with _blamed(cls, f"{where}, arguments"):
        parameters, known = inspect.signature(cls.__init__).parameters, signature(cls)
    for argument in known:
        if argument in parameters and parameters[argument].annotation is inspect.Parameter.empty:
            raise UserError(where, f"argument {argument} has no type", hint=f"{argument}: int, or what it is")
    with _blamed(cls, f"{where}, examples()"):
        examples = list(cls.examples())
    if not examples:
        raise UserError(where, "yields no examples()", hint="yield (arguments, input specs) pairs")
    for number, (arguments, inputs) in enumerate(examples, start=1):
        at = f"{where}, example {number} {arguments}"
        with _blamed(cls, at):
            _check_example(cls, arguments, inputs, at)
    return len(examples)


@contextlib.contextmanager
def _blamed(cls: type, where: str) -> Iterator[None]:
    """Report what a part raises as a finding about the part, with its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        try:
            at = raised_at(error, Path(inspect.getfile(cls)))
        except (OSError, TypeError):  # defined in a notebook
            at = None
        if at is None:
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{last.filename}:{last.lineno}"
        raise UserError(where, f"{type(error).__name__}: {error} ({at})") from error


def _check_example(cls: type, arguments: dict[str, Any], inputs: tuple, where: str) -> None:
    bound = bind(cls, arguments, where)
    torch.manual_seed(0)
    part = _build(cls, bound, inputs)
    runner = _runner(part, inputs)
    runner.check_declared(where)
    runner.check_inputs(where)
    _no_garbage(cls, bound, inputs, part, where)
    _gradients_reach(part, runner, where)
    _batch_is_single(part, runner, where)


def _build(cls: type, arguments: dict[str, Any], inputs: tuple) -> Part:
    specs = inputs if all(isinstance(given, TokenSpec) for given in inputs) else ()
    return cls(Site(specs, LLM_WIDTH, LLM_WIDTH, PROMPT_JOINT), **arguments)


def _runner(part: Part, inputs: tuple) -> PartRun:
    kind = TextRun if isinstance(part, TextSource) else EncoderRun if isinstance(part, Encoder) else ConnectorRun
    return kind(part, inputs)


def _no_garbage(cls: type, arguments: dict[str, Any], inputs: tuple, real: Part, where: str) -> None:
    """Check loading, which starts on the meta device: the part itself must write what the checkpoint lacks."""
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
        unwritten = tensor.isnan().any() if tensor.is_floating_point() else (tensor == -1).all()
        if tensor.numel() and bool(unwritten):
            raise UserError(where, f"{name} stays unwritten when a checkpoint lacks it", hint="reset_parameters()")


def _gradients_reach(part: Part, run: PartRun, where: str) -> None:
    trained = copy.deepcopy(part).train()
    parameters = dict(trained.named_parameters())
    run.check_gradients(where)
    if not parameters:
        return
    dead = _dead(trained, run)
    if dead:  # behind a factor that starts at zero there is no gradient before the first step
        with torch.no_grad():
            for number, value in enumerate(parameters.values()):
                value += 0.1 * torch.randn(value.shape, generator=generator(number))
        dead = [name for name in _dead(trained, run) if name in dead and not name.startswith(part.idle)]
    # A tower read before its last layer leaves that layer without gradient; a whole part without any is an error.
    if dead and (len(dead) == len(parameters) or not isinstance(part, Tower)):
        raise UserError(where, f"no gradient reaches {', '.join(dead[:3])}")


def _dead(part: Part, run: PartRun) -> list[str]:
    """Names of the weights that a forward and backward gives no gradient."""
    values = run.values([1, 2], part)
    part.zero_grad()
    (values * torch.randn(values.shape, generator=generator(5))).sum().backward()
    return [name for name, value in part.named_parameters() if not alive(value.grad)]


def _batch_is_single(part: Part, run: PartRun, where: str) -> None:
    part.eval()
    with torch.no_grad():
        together = run.values([1, 2, 3])
        if not together.isfinite().all():
            raise UserError(where, "returns non-finite values")
        if not (worst := float((run.values([1, 2, 3]) - together).abs().max())) <= 1e-5:
            raise UserError(where, f"not the same twice in eval mode, off by {worst:.1e}: random numbers, or a state?")
        for row, clip in enumerate((1, 2, 3)):
            alone = run.values([clip])[0]
            worst = float((together[row] - alone).abs().max())
            if not worst <= 1e-5:
                raise UserError(where, f"a batch differs from single clips by {worst:.1e}")
