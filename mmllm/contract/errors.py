"""Errors for people: one line that says where, what, and what to do next."""

from __future__ import annotations


class UserError(Exception):
    """The user's input does not fit. The command line prints it as one line and exits with code 2.

    The text reads ``<where>: <what>, expected <x>, got <y>. Try: <hint>``.

    Args:
        where: the file, key path or item that the error is about (``my.yaml:model.connector.pool.grid``).
        what: what is wrong, in a few words.
        expected: what would have been right, if it can be stated.
        got: what was found instead.
        hint: a command or a change that solves it.
    """

    def __init__(
        self,
        where: object,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.where, self.what, self.expected, self.got, self.hint = where, what, expected, got, hint
        text = f"{where}: {what}"
        if expected is not None:
            text += f", expected {expected}"
        if got is not None:
            text += f", got {got}"
        if hint is not None:
            text = f"{text.rstrip('.')}. Try: {hint}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple:
        """Pickle by fields, so that an error of a worker process arrives as itself."""
        return _rebuild, (self.where, self.what, self.expected, self.got, self.hint)


def _rebuild(where: object, what: str, expected: object, got: object, hint: str | None) -> UserError:
    return UserError(where, what, expected=expected, got=got, hint=hint)


def nearest(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the nearest known ones, or the whole list if none is near."""
    from difflib import get_close_matches

    close = get_close_matches(str(name), known, n=3, cutoff=0.5)
    return " or ".join(close) if close else "one of " + ", ".join(sorted(known))


def shown(value: object, most: int = 80) -> str:
    """A value as shown in an error, shortened if it is long; some values cannot even be printed."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits, a list that contains itself
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."
