"""Chat templates: Jinja that came with a tokenizer or a recipe, rendered in the library's sandbox with a time limit."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

from mmllm.contract.errors import UserError, nearest

SECONDS = 10.0
"""Time limit for rendering a conversation: a template may loop forever."""
GIVEN = ("messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
"""Template variables that the library itself provides."""
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""The library's own tag around the assistant's text."""
HINT = "model.llm.template, a Jinja text"


@dataclass(frozen=True, eq=False)
class Template:
    """A chat template, the tokenizer's or another; usable as a cache key: equal if they render alike.

    Attributes:
        tokenizer: its special tokens are written.
        text: used in place of the tokenizer's own template.
        variables: name and value.

    Raises:
        UserError: there is no template, or it does not use a variable of that name.
    """

    tokenizer: Any
    text: str | None = None
    variables: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        own = self.text or self.tokenizer.chat_template
        if own is None:
            raise UserError("tokenizer", "has no chat template", hint=HINT)
        known = variables_of(own) if isinstance(own, str) and self.variables else None
        for name, _ in self.variables:
            if known is not None and name not in known:
                hint = nearest(name, [*known, "frames", "fps"])
                raise UserError(
                    f"apply_chat_template: {name}", "neither the template nor the processor reads it", hint=hint
                )

    @property
    def _key(self) -> str:
        own, tokens = self.text or self.tokenizer.chat_template, (self.tokenizer.bos_token, self.tokenizer.eos_token)
        return repr((own, tokens, self.variables))

    @property
    def reads_entries(self) -> bool:
        """Whether it goes through a message's content entry by entry, and cannot write a plain text."""
        return _reads_entries(self)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self._key == other._key

    def __call__(self, messages: list[dict[str, str]], prompt: bool) -> str:
        """The text of messages whose contents are plain texts.

        Raises:
            UserError: the template is broken, or takes too long.
        """
        options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": self.text}
        try:
            with _deadline(SECONDS):
                return self.tokenizer.apply_chat_template(messages, **options, **dict(self.variables))
        except _TooLong:
            raise UserError("chat template", "rendering did not finish", expected=f"{SECONDS:g} s", hint=HINT) from None
        except Exception as error:  # a template is a program and can raise anything
            reason = " ".join(str(error).split())[:200]
            raise UserError("chat template", f"broken ({type(error).__name__}: {reason})", hint=HINT) from error


@lru_cache(maxsize=64)
def _reads_entries(template: Template) -> bool:
    probe, written = "\ue000probe\ue001", []
    for content in (probe, [{"type": "text", "text": probe}]):
        try:
            written.append(probe in template([{"role": "user", "content": content}], False))
        except UserError:
            written.append(False)
    return written == [False, True]


@lru_cache(maxsize=64)
def variables_of(template: str) -> tuple[str, ...] | None:
    """Names that a template uses and the library does not provide; None if it does not parse."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # with the library's own blocks and loop controls, as when it compiles templates
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        found = meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template)))
    except TemplateError:
        return None
    return tuple(sorted(found - set(GIVEN)))


class _TooLong(Exception):
    """The time limit has passed."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupt code that takes longer. Only the main thread can be interrupted; others have no limit."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
