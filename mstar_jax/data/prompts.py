"""Prompts: templates from the config with the fields `{question}`, `{choices}` and `{answer}`."""

import string
from collections.abc import Sequence

from mstar_jax.structs import Query

FIELDS = {"question", "choices", "answer"}


def render(template: str, query: Query) -> str:
    """Fills in a template.

    `{choices}` is a newline, `Choices:` and one line `(A) text` per option, and empty for a free-form
    question. `{answer}` is the gold answer, which the warm-up's rationalisation prompt shows.

    Raises:
      ValueError: the template has an unknown field, or shows the answer of an unlabelled query.
    """
    choices = listed(query.options)
    if "{answer}" in template and query.answer is None:
        raise ValueError(f"the prompt template {template!r} shows the answer, but query {query.id} has none")
    check(template)
    return template.format(question=query.question, choices=choices, answer=query.answer)


def listed(options: Sequence[str] | None) -> str:
    """What `{choices}` stands for."""
    lines = [f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, options or ())]
    return "\nChoices:\n" + "\n".join(lines) if lines else ""


def check(template: str) -> None:
    """Checks a template's fields.

    Raises:
      ValueError: one is unknown; the message lists those that exist.
    """
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and field not in FIELDS:
            raise ValueError(
                f"prompt template {template!r}: unknown field {{{field}}}, known are {sorted(FIELDS)}"
            )
