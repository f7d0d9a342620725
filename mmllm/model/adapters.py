"""Adapters inside the LLM: put into its layers in place, merged or kept at the end of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from mmllm.contract.arguments import Count, Positive, Share
from mmllm.contract.errors import UserError
from mmllm.model.nystrom import NystromLinear

if TYPE_CHECKING:
    from mmllm.model.modeling import MMLLMForConditionalGeneration

ADAPTER = "adapter"
"""Folder inside a model folder that holds an adapter in peft's format."""


@dataclass(frozen=True)
class Lora:
    """An adapter of a stage that trains `llm.lora`.

    Attributes:
        rank: of the two factors.
        alpha: the adapter's scale is alpha / rank.
        dropout: of the adapter's input.
        targets: endings of the names of the layers that get one; default: all linear layers of the LLM.
        dora: learn magnitude and direction apart.
        init: how it starts: "default" (changes nothing), one of peft's (pissa, olora, eva, ...), "nlora" or "slora".
        preserve: nlora: subtract the start from the weights, so that it changes nothing.
        middle_only: nlora: train the middle factor alone.
    """

    rank: Count = 16
    alpha: Positive = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = ()
    dora: bool = False
    init: str = "default"
    preserve: bool = True
    middle_only: bool = False


def add_adapters(model: MMLLMForConditionalGeneration, lora: Lora, where: str) -> None:
    """Put an adapter beside the LLM's linear layers, in place.

    Raises:
        UserError: no layer has such a name, peft is not installed, or it does not take these settings.
    """
    llm = model.model.language_model
    if lora.init in ("nlora", "slora"):
        start: Literal["nystrom", "kaiming"] = "nystrom" if lora.init == "nlora" else "kaiming"
        given = (lora.rank, lora.alpha, start, lora.preserve, lora.middle_only)
        chosen = [name for name, layer in _linear(llm) if not lora.targets or name.endswith(lora.targets)]
        if not chosen:
            raise UserError(f"{where}.targets", "no linear layer of the LLM has such a name", got=list(lora.targets))
        _replace(llm, {name: NystromLinear(llm.get_submodule(name), *given) for name in chosen})
        return
    peft = _peft(where)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )
    try:
        peft.inject_adapter_in_model(config, llm)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(where, " ".join(str(error).split())[:200]) from error


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of all layers that have an adapter."""
    marks = ("enable_adapters", "lora_A")  # the library's models have the former too
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, those that a setting froze left out."""
    return [
        parameter
        for layer in adapter_layers(model).values()
        for name, parameter in layer.named_parameters()
        if "lora_" in name and (not isinstance(layer, NystromLinear) or parameter.requires_grad)
    ]


def merge_adapters(model: MMLLMForConditionalGeneration) -> None:
    """Put the adapters into the weights; the model has its stock layers and keys again."""
    llm = model.model.language_model
    _replace(llm, {name: _merged(layer) for name, layer in adapter_layers(llm).items()})
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(llm).pop(name, None)


def save_adapter(model: MMLLMForConditionalGeneration, folder: Path, base: str) -> None:
    """Write peft's own format: the weights of the adapter, and the name of what it belongs to.

    Raises:
        UserError: an adapter of three factors, which that format does not know.
    """
    llm = model.model.language_model
    if any(isinstance(layer, NystromLinear) for layer in adapter_layers(llm).values()):
        raise UserError("keep: adapter", "peft's format has no three factors", hint="keep: merged")
    peft = _peft("keep: adapter")
    from safetensors.torch import save_file

    config = llm.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    state = peft.get_peft_model_state_dict(llm)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(folder)


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with adapters as that of the stock model below them."""
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def load_adapter(model: MMLLMForConditionalGeneration, folder: Path) -> None:
    """Put a saved adapter into the LLM's layers.

    Raises:
        UserError: it is damaged, or not of this LLM.
    """
    peft = _peft(str(folder))
    from safetensors.torch import load_file

    llm = model.model.language_model
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / "adapter_model.safetensors")
        peft.inject_adapter_in_model(config, llm)
        found = peft.set_peft_model_state_dict(llm, state)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(folder, f"this adapter cannot be loaded ({' '.join(str(error).split())[:160]})") from error
    if found.unexpected_keys:
        raise UserError(folder, f"an adapter of another LLM; {found.unexpected_keys[0]} has no place in this one")


def _linear(llm: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in llm.named_modules() if isinstance(module, nn.Linear)]


def _merged(layer: nn.Module) -> nn.Module:
    if isinstance(layer, NystromLinear):
        return layer.merged()
    layer.merge()
    return layer.get_base_layer()


def _replace(llm: nn.Module, fresh: dict[str, nn.Module]) -> None:
    for name, module in fresh.items():
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, module)


def _peft(where: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(where, "peft is not installed", hint="pip install 'mmllm[lora]'") from error
    return peft
