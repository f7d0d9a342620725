"""Register our classes with transformers' Auto classes on `import mmllm`, without importing either of the two.

The library keeps its Auto classes in separate modules. Each of our modules that registers itself there (as documented,
by `AutoConfig.register` and the like) is imported as soon as the library's module has been.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

HOMES = {
    "transformers.models.auto.configuration_auto": "mmllm.model.config",
    "transformers.models.auto.modeling_auto": "mmllm.model.modeling",
    "transformers.models.auto.processing_auto": "mmllm.processing.processor",
}
"""{module of the library: our module that registers itself there}."""


class _Loader(importlib.abc.Loader):
    """Loads a module of the library as usual, then imports ours."""

    def __init__(self, loader: importlib.abc.Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the library's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the library's module, then import ours."""
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the library's modules in `HOMES` where Python does, but with our loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec with our loader; None for every other module."""
        if name not in HOMES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, HOMES[name])
        return spec


def register_auto_classes() -> None:
    """Register what the library has already loaded now, and the rest when it is loaded."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for theirs, ours in HOMES.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
