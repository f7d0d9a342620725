"""The registry of parts: exact names, a duplicate is an error, an unknown name suggests the nearest.

A kind maps to the package that holds its parts; the first look-up imports that package's modules, so a command that
only lists recipes imports no part. A user's own file registers its parts with the same decorator (`load_plugin`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mmllm.contract.errors import UserError, nearest, shown

PACKAGES = {
    "encoder": "mmllm.encoders",
    "text": "mmllm.encoders",
    "connector": "mmllm.connectors",
    "reducer": "mmllm.reducers",
    "objective": "mmllm.train.objectives",
    "backend": "mmllm.data.media.backends",
    "format": "mmllm.data.records.formats",
    "scorer": "mmllm.model.scorers",
}
_parts: dict[str, dict[str, type]] = {kind: {} for kind in PACKAGES}
_imported: set[str] = set()
_plugins: list[Path] = []


def register(kind: str, name: str) -> Callable[[type], type]:
    """Class decorator that registers a part as `name` among the parts of `kind`.

    Raises:
        UserError: unknown kind, or the name is taken by a class of another source (the same source again is fine: a
            plug-in loaded twice, a worker process that imports again).
    """
    if kind not in _parts:
        raise UserError(f"register({kind!r}, {name!r})", "unknown kind of part", hint=nearest(kind, list(_parts)))

    def add(cls: type) -> type:
        known = _parts[kind].get(name)
        if known is not None and _source_digest(known) != _source_digest(cls):
            taken = f"{known.__module__}.{known.__qualname__} of {_file(known)}"
            raise UserError(f"{kind} {name} of {_file(cls)}", f"the name is taken by {taken}", hint="another name")
        cls.kind, cls.registered_name = kind, name
        _parts[kind][name] = cls
        return cls

    return add


def find(kind: str, name: str, where: str = "") -> type:
    """The class registered as `name` among the parts of `kind`.

    Raises:
        UserError: no part of that name; the message suggests the nearest names.
    """
    known = parts(kind)
    if not isinstance(name, str):
        raise UserError(where or kind, "wrong type", expected=f"the name of a part ({kind})", got=shown(name))
    if name not in known:
        hint = nearest(name, list(known))
        if not _plugins:
            hint += ", or a plug-in that has it"
        raise UserError(where or kind, f"no {kind} is called {name!r}", hint=hint)
    return known[name]


def parts(kind: str) -> dict[str, type]:
    """{name: class} of all parts of a kind, shipped or from loaded plug-ins."""
    package = PACKAGES[kind]
    if package not in _imported:
        _imported.add(package)
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, f"{package}."):
            importlib.import_module(info.name)
    return _parts[kind]


def load_plugin(path: str | Path) -> None:
    """Run a user's file so that the parts it registers can be named in recipes.

    Raises:
        UserError: the file is missing, or it raises; the message names the line.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(path, "no such plug-in", expected="a .py file that registers parts")
    name = f"mmllm_plugin_{hashlib.sha256(path.resolve().as_posix().encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as error:
        at = f"{error.filename}:{error.lineno}" if error.lineno else path
        raise UserError(at, f"not Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise UserError(raised_at(error, path) or path, f"{type(error).__name__}: {error}") from error
    if path.resolve() not in _plugins:
        _plugins.append(path.resolve())


def plugins() -> list[Path]:
    """The files that were loaded, for a worker process to load again."""
    return list(_plugins)


def raised_at(error: BaseException, path: Path) -> str | None:
    """`file:line` of the innermost line of a file that an exception passed through; None where it did not."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else None


def said_by(error: BaseException) -> str:
    """An error in one line, including the line of a plug-in that it comes from."""
    line = next(filter(None, (raised_at(error, plugin) for plugin in _plugins)), None)
    return " ".join(str(error).split())[:200] + (f" ({line})" if line else "")


def _file(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__


def _source_digest(cls: type) -> str:
    try:
        text = inspect.getsource(cls)
    except (OSError, TypeError):
        text = f"{cls.__module__}.{cls.__qualname__}"
    return hashlib.sha256(text.encode()).hexdigest()
