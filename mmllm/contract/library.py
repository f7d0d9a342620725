"""The single entry point to transformers' `from_pretrained`: code in a folder or a repository is not run.

A config may name a Python file beside it (`auto_map`), for which the library asks on stdout whether to run it, and an
attention implementation may name a repository of compiled kernels. Both are refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from mmllm.contract.errors import UserError, shown

T = TypeVar("T")

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusting_remote_code(trusted: bool = True) -> Iterator[None]:
    """Run code that comes with a config while this context is active: what `--trust-remote-code` allows."""
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def pretrained(cls: type[T], name: str, **options: Any) -> T:
    """`cls.from_pretrained(name, **options)` for any class of the library: a config, tokenizer, processor or model.

    Raises:
        UserError: it needs code of its own, is damaged, or names an attention implementation that is not the library's.
        OSError, ValueError: it is absent or of another kind, as reported by the library.
    """
    if hasattr(cls, "config_class") or hasattr(cls, "_model_mapping"):  # only models have an attention implementation
        _check_attention_of(name, options)
    try:
        return cls.from_pretrained(name, trust_remote_code=_trusted.get(), **options)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            what, hint = (
                "comes with its own Python code, which is not run",
                "--trust-remote-code, if you trust its author",
            )
            raise UserError(name, what, hint=hint) from error
        raise
    except ImportError as error:
        raise UserError(name, f"needs a package that is not installed: {' '.join(str(error).split())[:200]}") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged files raise errors of any type
        reason = " ".join(str(error).split())[:200]
        raise UserError(name, f"damaged, or not what its files say ({type(error).__name__}: {reason})") from error


def check_attention(values: object, where: object) -> None:
    """Refuse a config, or any part of one, that names an attention implementation from a repository.

    Args:
        values: the config as plain values.
        where: its origin, for the error.

    Raises:
        UserError: names the key and the known ones.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    todo = [(values, "")]
    while todo:
        here, path = todo.pop()
        for key, value in here.items() if isinstance(here, dict) else ():
            if key in ATTENTION_KEYS and value is not None and value not in known:
                expected = ", ".join(sorted(known))
                raise UserError(f"{where}:{path}{key}", "not one the library has", expected=expected, got=shown(value))
            todo.append((value, f"{path}{key}."))


def _check_attention_of(name: str, options: dict[str, Any]) -> None:
    from transformers import PreTrainedConfig

    if "gguf_file" in options or "config" in options:
        return
    keep = {key: options[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in options}
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **keep)
    except (OSError, ValueError):  # only a tokenizer, or an error that from_pretrained reports better
        return
    check_attention(values, f"{name}/config.json")
