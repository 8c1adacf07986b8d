"""Two ways to find steps must agree: the text's lines, and the tokens that end them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax.rewards import steps

PIECES = [
    "Sum",
    " 4",
    "6",
    ".",
    "x = y",
    "\n",
    "\n\n",
    " ",
    "\t",
    "",
    " \n",
    "6\n",
    "\nThe answer is",
    "a\nb",
]
PIECES += ["6\n.\n", "\n \n", "a\n\n b \nc", "\r\n"]
BLANK = [i for i, piece in enumerate(PIECES) if not piece.strip()]
IDS = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)


def text(tokens):
    return "".join(PIECES[token] for token in tokens)


@settings(deadline=None)
@given(IDS)
def test_a_step_of_the_text_has_an_end_among_the_tokens(tokens):
    found = steps.ends(tokens, PIECES)
    assert len(found) == len(steps.split(text(tokens)))
    assert found == sorted(found)
    if found:
        assert found[-1] == len(tokens) - 1


@settings(deadline=None)
@given(IDS)
def test_an_end_is_the_first_token_to_complete_its_step(tokens):
    """The step and its line break are complete at its end, and no earlier."""
    for number, end in enumerate(steps.ends(tokens, PIECES)[:-1]):

        def complete(upto, number=number):
            lines = text(tokens[: upto + 1]).split("\n")[:-1]
            return sum(bool(line.strip()) for line in lines) > number

        assert complete(end) and not (end and complete(end - 1))


@settings(deadline=None)
@given(IDS.filter(lambda ids: text(ids).strip()), st.lists(st.sampled_from(BLANK), max_size=4))
def test_blanks_at_the_end_belong_to_the_last_step(tokens, blanks):
    before, after = steps.ends(tokens, PIECES), steps.ends([*tokens, *blanks], PIECES)
    assert after == [*before[:-1], len(tokens) + len(blanks) - 1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(BLANK), max_size=6))
def test_a_blank_response_has_no_steps(tokens):
    assert steps.ends(tokens, PIECES) == steps.split(text(tokens)) == []


@pytest.mark.parametrize(
    ("pieces", "split", "ends"),
    [
        ([], [], []),
        (["6"], ["6"], [0]),
        ([" ", "\n", " "], [], []),
        (
            ["The", " answer", " is 6", "</s>"],
            ["The answer is 6"],
            [3],
        ),  # one line: its end is the response's
        (["A", " 4", "\n", "\n", " B", "\n", "C", ""], ["A 4", "B", "C"], [2, 5, 7]),
        (["a\nb", "\n", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["6\n.\n", "x"], ["6", ".", "x"], [0, 0, 1]),
        (["6\n.\n", "\n"], ["6", "."], [0, 1]),
        (["a", "\n\n\n b"], ["a", "b"], [1, 1]),
    ],
)
def test_by_hand(pieces, split, ends):
    words = [piece if piece != "</s>" else "" for piece in pieces]  # a stop id adds nothing to a text
    assert steps.split("".join(words)) == split
    assert steps.ends(range(len(words)), words) == ends
