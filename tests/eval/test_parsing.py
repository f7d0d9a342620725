"""The canonical parser on styles that are not in the reference cases."""

from __future__ import annotations

import pytest

from mmllm.eval.option_text import by_words, option_texts
from mmllm.eval.parsing import canonical, parsers

OPTIONS = ["Opened the window.", "Washed the plate.", "Put down the towel.", "Took the laptop."]

NAMED = {
    "B": "B",
    "\uff08\uff22\uff09": "B",
    "b)": "B",
    "Answer:\nB": "B",
    "My final answer: **(C)**": "C",
    "I am going with (d).": "D",
    "It could be B, but I think it's D": "D",
    "The correct answer is not B but C": "C",
    "Option D is wrong, Option B is right.": "B",
    "B is wrong, C is right": "C",
    "C, not B": "C",
    "B? No, D.": "D",
    "A is correct": "A",
    "A Opened the window": "A",
    "option a": "A",
    "Answer is a": "A",
    "A person takes a laptop. D": "D",
    "The answer is: \\boxed{\\text{B}}": "B",
    "hmm (A)?</think>\n\nB<|im_end|>": "B",
    "<answer>C</answer>": "C",
    '{"answer": "c", "reason": "x"}': "C",
    "答えはBです": "B",
    "正确答案是\uff1aD": "D",
    "정답: A": "A",
    "She washed the plate and left": "B",
    "Based on the video, the person opened the window.": "A",
    "The answer is B (a plate is washed)": "B",
    "(A) The person opened the wind": "A",
    "A\n\nB is wrong": "A",
}
UNNAMED = [
    "",
    "   ",
    ".",
    "(",
    "E",
    "e.",
    "I",
    "1",
    "DBCA",
    "Because",
    "A person walks across the room.",
    "the answer is a dog",
    "Answer: A or B",
    "A, B and C",
    "Neither A nor B",
    "not A",
    "(B)(C)",
    "A)\nB)\nC)\nD)",
    "(A) Opened the window. (B) Washed the plate. (C) Put down the towel. (D) Took the laptop.",
    "opened the window or took the laptop",
    "(A) Washed the plate.",
    "<think>A? B?",
    "I cannot view the video, sorry",
    "None of the above",
]


@pytest.mark.parametrize(("response", "letter"), NAMED.items())
def test_named(response: str, letter: str) -> None:
    assert canonical(response, OPTIONS) == letter


@pytest.mark.parametrize("response", UNNAMED)
def test_unnamed(response: str) -> None:
    assert canonical(response, OPTIONS) is None


def test_the_last_of_several_boxes_and_statements_counts() -> None:
    assert canonical(r"At first \boxed{A}, but then \boxed{C}.", OPTIONS) == "C"
    assert canonical("The answer is A. No, the answer is C.", OPTIONS) == "C"


def test_letters_reach_as_far_as_the_options() -> None:
    assert canonical("(F)", list("uvwxyz")) == "F"
    assert canonical("(F)", OPTIONS) is None
    last = chr(ord("A") + len(OPTIONS) - 1)
    assert [canonical(text, OPTIONS) for text in (f"({last})", f"({chr(ord(last) + 1)})")] == [last, None]
    assert canonical("I think it is I", [f"number {n}" for n in range(9)]) == "I"


def test_option_strings_with_their_own_letter() -> None:
    assert option_texts(["A. Cafe.", "B. Bank."]) == ["Cafe.", "Bank."]
    assert option_texts(["A. Cafe.", "Bank."]) == ["A. Cafe.", "Bank."]
    assert canonical("bank", ["A. Cafe.", "B. Bank."]) == "B"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("moves left (B)", "A"),
        ("(A) moves up", "B"),
        ("B. moves left.", "A"),
        ("Moves up", "B"),
        ("3 (A)", "C"),
        ("B", None),
        ("moves left, then up (A)", None),
        ("", None),
    ],
)
def test_words_are_read_without_their_letter(said: str, meant: str | None) -> None:
    assert by_words(said, ["moves left", "moves up", "3"]) == meant


def test_the_longer_option_hides_the_shorter() -> None:
    options = ["Red", "Red and black", "Black", "Blue"]
    assert canonical("It is red and black", options) == "B"
    assert canonical("The car is red.", options) == "A"
    assert canonical("red, then blue", options) is None


def test_words_of_options_do_not_make_a_refusal() -> None:
    assert canonical("(A) I'm sorry, I can't", ["I'm sorry, I can't", "yes"]) == "A"
    assert canonical("B. She cannot see it", ["yes", "She cannot see it"]) == "B"


def test_an_empty_option_is_never_said() -> None:
    assert canonical("", ["yes", ""]) is None
    assert canonical(".", ["yes", ""]) is None


def test_parsers_by_name() -> None:
    assert parsers["canonical"] is canonical
