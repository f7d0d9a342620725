"""mmllm: build, train, evaluate and compare video and image LLMs made of interchangeable parts.

Everything is imported on first use, so `import mmllm` costs nothing; the Auto classes of transformers still know our
models.
"""

from __future__ import annotations

from typing import Any

from mmllm.registration import register_auto_classes

__version__ = "0.1.0"

_HOMES = {
    "load": "mmllm.api",
    "generate": "mmllm.api",
    "evaluate": "mmllm.api",
    "pipeline": "mmllm.api",
    "reduce": "mmllm.api",
    "Video": "mmllm.api",
    "Image": "mmllm.api",
    "MMLLMConfig": "mmllm.model.config",
    "MMLLMForConditionalGeneration": "mmllm.model.modeling",
    "MMLLMProcessor": "mmllm.processing.processor",
    "UserError": "mmllm.contract.errors",
    "register": "mmllm.contract.registry",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmllm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_auto_classes()
