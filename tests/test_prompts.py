"""Rendering of prompts."""

import pytest

from mstar_jax.data import prompts
from mstar_jax.structs import Query

FREE = Query("q7", (), "How many {bars}?", answer="12")
CHOICE = Query("q8", (), "Which?", options=("3 cm", "4 cm"), answer="B")
HINT = "{question}{choices}\nThe answer is {answer}. Why?"


def test_render():
    assert prompts.render("{question}{choices}\nThink.", FREE) == "How many {bars}?\nThink."
    assert prompts.render(HINT, CHOICE) == "Which?\nChoices:\n(A) 3 cm\n(B) 4 cm\nThe answer is B. Why?"


def test_text_of_a_query_is_never_a_template():
    assert prompts.render("{question}", Query("q", (), "{answer} {0} {x")) == "{answer} {0} {x"


@pytest.mark.parametrize("template", ["{question} {hint}", "{} {question}", "{0}"])
def test_unknown_field(template):
    with pytest.raises(ValueError, match=r"unknown field .*\['answer', 'choices', 'question'\]"):
        prompts.check(template)
    with pytest.raises(ValueError, match="unknown field"):
        prompts.render(template, FREE)


def test_unlabelled_query_has_no_answer_to_show():
    unlabelled = Query("train_3", (), "How many?")
    with pytest.raises(ValueError, match="query train_3 has none"):
        prompts.render(HINT, unlabelled)
    assert prompts.render("{question}", unlabelled) == "How many?"
