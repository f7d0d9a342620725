"""From a free-form response to an option letter: the `canonical` rule.

The rule asks a list of readers in a fixed order; the first with an opinion decides. A reader returns a letter, `NONE`
("this response names no single option, stop here") or `None` ("nothing for me, ask the next one").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from mmllm.eval.option_text import by_exact_text, by_text, contradicts, option_texts, starts_with_text

NONE = ""

_THINK = re.compile(r"<(think|thinking|thought|reasoning)>.*?(</\1>|\Z)", re.S | re.I)
_THINK_TAIL = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.S | re.I)
_SPECIAL = re.compile(r"<\|[^<>|]{1,40}\|>|</?s>|<(?:pad|eos|bos|unk|image|video)>|\[/?INST\]|###", re.I)
_REFUSAL = re.compile(  # at the start only: an option may well say "she cannot see"
    r"\W*(?:(?:i'm |i am |we're )?(?:very |so )?sorry\b.{0,40}\b(?:can't|cannot|can not|unable|without)"
    r"|(?:i|we) (?:can't|cannot|can not) (?:process|determine|answer|see|help|tell|view|watch|access)"
    r"|(?:it )?(?:cannot|can't) (?:be determined|determine|answer)"
    r"|(?:i'm |i am )?unable to (?:determine|answer|process|see|view|watch)"
    r"|failed to obtain answer|none of (?:the above|the options|the choices|these|them)\b)",
    re.S | re.I,
)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\s*\(?([A-Za-z])\)?\.?\s*\}")
_LONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")

# what may come between "answer" and its letter, and what may wrap a letter
_OPEN = r"[\s\"'`*_:=(\[{<$#>-]*"
_LETTER = r"(?<![A-Za-z0-9'])(?P<letter>[A-Za-z])(?![A-Za-z0-9]|'[A-Za-z])"
_VERB = r"(?:(?:is|was|are|be|being|would be|should be|must be|seems to be|appears to be|as)\b)?"
_STATEMENTS = (
    re.compile(
        r"\b(?:answers?|ans|options?|choices?|solution|selection|response|letter|conclusion|correct one|best one)\b"
        rf"\.?{_OPEN}{_VERB}{_OPEN}(?:(?:the )?(?:correct |best |final |right )?(?:option|choice|answer|letter)\b)?"
        rf"{_OPEN}{_LETTER}",
        re.I,
    ),
    re.compile(
        r"\b(?:choose|chose|select|selected|pick|picked|go(?:ing)? (?:with|for)|went with|opt for|vote for"
        rf"|(?:'d|would|will|'ll|must) say|guess(?: is)?|settle on)\b"
        rf"{_OPEN}(?:(?:the )?(?:option|choice|answer|letter)\b)?{_OPEN}{_LETTER}",
        re.I,
    ),
    re.compile(
        r"(?:答案|正确答案|选项|選項|选择|選擇|应选|选|選|正解|答え|回答|정답|답|옵션|선택)"
        rf"\s*(?:应该是|應該是|是|为|為|は|은|는|이)?{_OPEN}(?P<letter>[A-Za-z])(?![A-Za-z0-9])"
    ),
)
_LEADING = re.compile(r"[\s\"'`*_#>-]*[(\[{]?[\s*_]*(?P<letter>[A-Za-z])[\s*_]*[)\]}.:,](?![.…])[*_]*")
_STANDALONE = re.compile(r"(?<![A-Za-z0-9'])(?P<letter>[A-Z])(?![A-Za-z0-9]|'[A-Za-z])|[(\[](?P<low>[a-z])[)\]]")
_NOT_BEFORE = re.compile(
    r"\b(?:not|n't|isn't|never|neither|nor|rather than|instead of|except|excluding|exclude|ruled? out|eliminate)"
    r"\W+(?:(?:be|the|option|choice|answer|letter)\W+)*[(\[\"'*]*$",
    re.I,
)
_NOT_AFTER = re.compile(
    r"[)\]\"'*.:]*\s*(?:(?:is|was|are|seems|looks|appears)\s*(?:n't|not\b|never\b|wrong|incorrect|false|ruled out)"
    r"|(?:does|do|did|can|could)\s*(?:n't|not\b)|cannot\b)",
    re.I,
)
_ENUMERATES = re.compile(
    r"[)\]\"'*.]*\s*(?:,|/|&|\||\bor\b|\band\b|[(\[])\s*(?:or|and)?\s*(?:maybe|perhaps|possibly)?\s*"
    r"[(\[\"'*]*(?:[B-HJ-Z]|A(?!\s+[a-z]))(?![A-Za-z0-9'])"
)
_FINITE = r"(?:is|are|was|were|or|and|but|because|since|as|so|for|seems|matches|fits|looks|would|should)\b"
_ARTICLE = re.compile(rf"\s+(?!{_FINITE})[a-z]")
_PRONOUN = re.compile(r"\s+[a-z]|'")


def _clean(response: str) -> str:
    """The response NFKC-normalised, without think blocks and special tokens, stripped."""
    text = unicodedata.normalize("NFKC", response).replace("\u2019", "'").replace("\u2018", "'")
    text = _THINK_TAIL.sub("", _THINK.sub("", text))
    return _SPECIAL.sub(" ", text).strip()


def _known(letter: str, options: list[str]) -> str:
    """The letter in upper case, or `NONE` where there is no such option."""
    letter = letter.upper()
    return letter if ord(letter) - ord("A") < len(options) else NONE


def _is_word(text: str, end: int, letter: str, options: list[str]) -> bool:
    """True where a letter that ends at `end` is a word of the sentence: "A person walks", "I think"."""
    if letter in "Aa" and _ARTICLE.match(text, end):
        return not starts_with_text(text[end:], options[0] if options else "")
    return letter in "Ii" and _PRONOUN.match(text, end) is not None


def _negated(text: str, start: int, end: int) -> bool:
    """True for the letter of "not C", "rather than C", "C is wrong", "(C) does not fit"."""
    return bool(_NOT_BEFORE.search(text[max(0, start - 60) : start]) or _NOT_AFTER.match(text, end))


def _refuses(text: str, options: list[str]) -> str | None:
    """`NONE` for an empty response, a refusal or the failure text of an interface."""
    if not text:
        return NONE
    return NONE if _REFUSAL.match(text) else None


def _boxed(text: str, options: list[str]) -> str | None:
    """The letter of the last ``\\boxed{X}``."""
    found = _BOXED.findall(text)
    return _known(found[-1], options) if found else None


def _lone(text: str, options: list[str]) -> str | None:
    """A single letter in any case and any wrapping: ``b``, ``(B).``, ``**B**``, ``B :)``.

    Where that letter is also the text of *another* option, the response is ambiguous: `NONE`.
    """
    match = _LONE.fullmatch(text)
    if match is None:
        return None
    letter = _known(match[1], options)
    return NONE if letter and contradicts(letter, text, options) else letter


def _stated(text: str, options: list[str]) -> str | None:
    """The last explicit statement: ``the answer is X``, ``Option X``, ``I choose X`` and East Asian equivalents."""
    found = []
    for pattern in _STATEMENTS:
        for match in pattern.finditer(text):
            start, end = match.span("letter")
            if not _is_word(text, end, match["letter"], options) and not _negated(text, start, end):
                found.append((start, end, match["letter"]))
    if not found:
        return None
    _, end, letter = max(found)
    return NONE if _ENUMERATES.match(text, end) else _known(letter, options)


def _letters(text: str, options: list[str]) -> list[tuple[int, str]]:
    """(end, letter) of the letters that stand alone, without articles, pronouns and negated ones."""
    found = []
    for match in _STANDALONE.finditer(text):
        letter = match["letter"] or match["low"]
        if not _is_word(text, match.end(), letter, options) and not _negated(text, match.start(), match.end()):
            found.append((match.end(), letter.upper()))
    return found


def _names_all(letters: set[str], options: list[str]) -> bool:
    """True where the letters are those of all options (three or more): the options repeated, none chosen."""
    return len(options) > 2 and letters >= {chr(ord("A") + index) for index in range(len(options))}


def _leading(text: str, options: list[str]) -> str | None:
    """``X)``, ``(X)``, ``X.``, ``X:`` or ``X,`` at the start, unless negated, listed or contradicted."""
    match = _LEADING.match(text)
    if match is None or _NOT_AFTER.match(text, match.end()):
        return None
    rest = text[match.end() :]
    letter = _known(match["letter"], options)
    if _names_all({name for _, name in _letters(text, options)}, options):
        return NONE
    if letter and contradicts(letter, rest.split("\n")[0], options):
        return NONE
    if letter and starts_with_text(rest, options[ord(letter) - ord("A")]):
        return letter
    if re.match(r"\s*(?:or\b|and\b|/|,)?\s*[(\[]?[A-Z](?:[)\],.;]|\s*$|\s+(?:and|or)\b)", rest):
        return None  # "B, D" and "(B)(C)" are lists: the next reader weighs them
    return letter


def _standalone(text: str, options: list[str]) -> str | None:
    """The only letter that stands alone; if there are several, the one that ends the text outside a list."""
    found = _letters(text, options)
    distinct = {letter for _, letter in found}
    if not distinct:
        return None
    end, letter = found[-1]
    if len(distinct) == 1:
        return _known(letter, options)
    ends = not re.search(r"[A-Za-z0-9]", text[end:])
    if not ends or _ENUMERATES.match(text, found[-2][0]) or _names_all(distinct, options):
        return NONE
    return _known(letter, options)


def canonical(response: str, options: list[str]) -> str | None:
    """The letter that a careful reader takes from a response, or None.

    Args:
        response: the raw text of the model.
        options: the option texts in order, 2 to 26 of them; a text may carry its own letter (``"A. Cafe."``).

    Returns:
        an upper-case letter below the number of options, or None where no single option is named.
    """
    text = _clean(response)
    texts = option_texts(options)
    for read in (by_exact_text, _refuses, _boxed, _lone, _stated, _leading, _standalone, by_text):
        letter = read(text, texts)
        if letter is not None:
            return letter or None
    return None


parsers: dict[str, Callable[[str, list[str]], str | None]] = {"canonical": canonical}
"""Parser functions by name; a protocol names one of them."""
