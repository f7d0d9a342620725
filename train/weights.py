"""Which weights of a model a stage trains, and which it takes from other runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmllm.config.recipe import Recipe
from mmllm.config.schema import Stage
from mmllm.contract.errors import UserError, nearest
from mmllm.model.adapters import adapter_parameters
from mmllm.model.checkpoint import load_weights
from mmllm.model.folder import model_folder
from mmllm.model.front_end_plan import FrontEndPlan

LORA = "llm.lora"
"""The LLM's adapter, in `trains`."""


def freeze_names(plan: FrontEndPlan, trains: tuple[str, ...], where: str) -> dict[str, list[nn.Module]]:
    """{name that `trains` may give: modules}, without the LLM; refuses unknown names.

    Raises:
        UserError: a name that the model does not have.
    """
    known: dict[str, list[nn.Module]] = {"llm": [], LORA: [], "encoders": [plan.bank], "connector": [plan.parts]}
    known |= {} if plan.vocabulary is None else {"vocabulary": []}  # its tables are known where they are built
    known |= {f"encoders.{name}": [part] for name, part in plan.bank.encoders.items()}
    known |= {"text": [plan.prompts]} | {f"text.{name}": [part] for name, part in plan.prompts.sources.items()}
    known |= {f"connector.{name}": [part] for name, part in plan.parts.items()}
    for name in trains:
        if name not in known:  # what the LLM has is known where it is built
            known[name] = [] if name.startswith("llm.") else [_below(name, known, where)]
    return known


def _below(name: str, known: dict[str, list[nn.Module]], where: str) -> nn.Module:
    """A module inside a part: `encoders.clip.adapter`.

    Raises:
        UserError: the part has no such module.
    """
    whole = max(
        (part for part in known if name.startswith(f"{part}.") and ("." in part or part == "llm")),
        key=len,
        default=None,
    )
    if whole is None:
        raise UserError(where, f"the model has no {name!r}", hint=nearest(name, list(known)))
    (part,) = known[whole]
    try:
        return part.get_submodule(name.removeprefix(f"{whole}."))
    except AttributeError:
        inside = [f"{whole}.{child}" for child, _ in part.named_modules() if child]
        raise UserError(where, f"{whole} has no such module: {name!r}", hint=nearest(name, inside)) from None


def freeze(model: nn.Module, trains: tuple[str, ...], where: str) -> None:
    """Let gradients reach what `trains` names and nothing else.

    Raises:
        UserError: a name that the model does not have.
    """
    chosen = trained_parameters(model, trains, where)
    model.requires_grad_(False)
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)


def trained_parameters(model: nn.Module, trains: tuple[str, ...], where: str) -> dict[str, list[nn.Parameter]]:
    """{name in `trains`: its parameters}; what two names have in common belongs to the first.

    Raises:
        UserError: a name that the model does not have.
    """
    known, taken = _modules(model, trains, where), set()
    found: dict[str, list[nn.Parameter]] = {}
    for name in trains:
        own = adapter_parameters(model) if name == LORA else [p for part in known[name] for p in part.parameters()]
        found[name] = [parameter for parameter in own if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in own}
    return found


def resolve_init(name: str, stage: Stage, recipe: Recipe) -> list[tuple[str | None, Path]]:
    """[(part or None for the whole model, model folder)] of what a stage starts from.

    Raises:
        UserError: a folder without a model.
    """
    given = stage.init if isinstance(stage.init, dict) else {None: stage.init} if stage.init else {}
    found = []
    for part, folder in given.items():
        try:
            found.append((part, model_folder(recipe.path(folder))))
        except UserError as error:
            root, _, rest = folder.partition(":")
            hint = f"roots.{root}=RUN" if rest and recipe.path(folder) == folder else error.hint
            where = recipe.where(f"stages.{name}.init")
            raise UserError(where, f"{error.where}: {error.what}", expected=error.expected, hint=hint) from error
    return found


def validate_module_names(plan: FrontEndPlan, stage: Stage, where: str) -> None:
    """Refuse names in `trains` and `init` that the model does not have; `where` is the stage's key path, for the error.

    Raises:
        UserError: names the key.
    """
    freeze_names(plan, stage.trains, f"{where}.trains")
    freeze_names(plan, tuple(stage.init) if isinstance(stage.init, dict) else (), f"{where}.init")


def load_init(model: nn.Module, part: str | None, folder: Path, where: str) -> None:
    """Load the weights of another run into the model, or into what `part` names, as in `trains`.

    Raises:
        UserError: a name that the model does not have, or weights that are not exactly the part's.
    """
    load_weights(model, folder, None if part is None else _modules(model, (part,), where)[part])


def _modules(model: nn.Module, names: tuple[str, ...], where: str) -> dict[str, list[nn.Module]]:
    known = freeze_names(model.model.front_end.plan, names, where)
    llm = {"llm": [model.model.language_model]}
    inside = {name: [_below(name, llm, where)] for name in names if name.startswith("llm.") and name != LORA}
    tables = {} if model.model.vocabulary is None else {"vocabulary": [model.model.vocabulary]}
    return {**known, **inside, **tables, "llm": [model.model.language_model, model.lm_head]}
