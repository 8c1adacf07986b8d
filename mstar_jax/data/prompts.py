"""What the policy is asked: templates from the config with `{question}`, `{choices}` and `{answer}`."""

import string

from mstar_jax.structs import Query

FIELDS = {"question", "choices", "answer"}


def render(template: str, query: Query) -> str:
    """Fills a template.

    `{choices}` is a newline, `Choices:` and one `(A) text` line an option; empty for a free-form question.
    `{answer}` is the gold answer, as the warm-up's rationalisation shows it.

    Raises:
      ValueError: the template has another field, or shows the answer of an unlabelled query.
    """
    choices = ""
    if query.options:
        lines = [f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, query.options)]
        choices = "\nChoices:\n" + "\n".join(lines)
    if "{answer}" in template and query.answer is None:
        raise ValueError(f"the prompt {template!r} shows the answer, and query {query.id} has none")
    check(template)
    return template.format(question=query.question, choices=choices, answer=query.answer)


def check(template: str) -> None:
    """Refuses unknown fields.

    Raises:
      ValueError: with the field and those that there are.
    """
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and field not in FIELDS:
            raise ValueError(
                f"prompt template {template!r}: unknown field {{{field}}}, there are {sorted(FIELDS)}"
            )
