"""Responses that repeat the text of an option instead of its letter."""

from __future__ import annotations

import re

_LETTER_BESIDE = re.compile(r"\A\W*[A-Z][.):]+\s+|\s+[(\[]?[A-Z][)\].:]*\s*\Z")
_OWN_LETTER = re.compile(r"\s*\(?([A-Za-z])\s*[.):]\s*(?=\S|$)")


def option_texts(options: list[str]) -> list[str]:
    """The option texts, without letters where every option starts with the one of its position (``"A. Cafe."``)."""
    matches = [_OWN_LETTER.match(option) for option in options]
    for index, match in enumerate(matches):
        if match is None or match[1].upper() != chr(ord("A") + index):
            return list(options)
    return [option[match.end() :] for option, match in zip(options, matches, strict=True) if match]


def plain(text: str) -> str:
    """Case-folded, spaces collapsed, none around arrows, without surrounding quotes and the final dot."""
    text = re.sub(r"\s*(->|=>|→)\s*", r"\1", " ".join(text.casefold().split()))
    return text.strip(" \"'`*_").rstrip(".!").strip(" \"'`*_")


def starts_with_text(rest: str, option: str) -> bool:
    """True where `rest`, the text after a letter, starts with the text of that letter's option."""
    wanted = plain(option)
    return bool(wanted) and re.match(re.escape(wanted) + r"(?!\w)", plain(rest.lstrip(" .):],-*"))) is not None


def contradicts(letter: str, rest: str, options: list[str]) -> bool:
    """True where `rest`, the text beside a letter, is exactly the text of another option and not of its own."""
    said = plain(rest.strip(" .):],-*([{\"'"))
    texts = [plain(option) for option in options]
    return bool(said) and said in texts and texts[ord(letter) - ord("A")] != said


def by_exact_text(text: str, options: list[str]) -> str | None:
    """The letter of the only option whose text is the whole response (two characters or more)."""
    said = plain(text)
    indices = [index for index, option in enumerate(options) if plain(option) == said]
    if not said or len(indices) != 1 or (len(said) == 1 and said.isalpha()):
        return None
    return chr(ord("A") + indices[0])


def by_words(text: str, options: list[str]) -> str | None:
    """The letter of the only option whose text is in the response, whatever letter goes with it: "moves left (B)"."""
    return by_exact_text(_LETTER_BESIDE.sub("", text), option_texts(options))


def by_text(text: str, options: list[str]) -> str | None:
    """The letter of the only option whose text occurs in the response as whole words.

    An occurrence inside that of a longer option ("red" in "red and black") does not count.
    """
    said = plain(text)
    spans = []
    for index, option in enumerate(options):
        wanted = plain(option)
        if not wanted or (len(wanted) == 1 and wanted.isalpha()):
            continue
        for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", said):
            spans.append((match.start(), match.end(), index))
    indices = {
        index
        for start, end, index in spans
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
    }
    return chr(ord("A") + indices.pop()) if len(indices) == 1 else None
