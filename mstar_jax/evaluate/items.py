"""Questions of benchmarks, and how they are made of the rows of official files."""

import dataclasses
from collections.abc import Mapping, Sequence

from mstar_jax.evaluate import tables
from mstar_jax.evaluate.tables import LETTERS, Record, cell
from mstar_jax.structs import Query


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      query: what the policy is asked, with the hint or context that the question needs before it. The gold
        answer of a choice is always its letter, whatever the file has.
      prompt: the text of the official prompt, which follows the image.
      groups: for each kind of group, e.g. `task`, the groups it belongs to; several for MathVista's `skills`.
      base: id of the question that this is a rotation of; `query.id` if there are no rotations.
      record: the official columns except the image, named as in VLMEvalKit's table of the data set (index,
        question, A, B, ..., answer, category, l2-category). With a `prediction` it can be scored there.
      unit: of the answer; also part of the question.
      options: the texts that a response may name, where the image alone shows them; else those of the query.
      also: further answers that are right.
    """

    query: Query
    prompt: str
    groups: Mapping[str, tuple[str, ...]]
    base: str
    record: Mapping[str, str]
    unit: str = ""
    options: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()


class Bad(Exception):
    """A row to drop; its text is the cause."""


def official_record(row: Record, more: Record) -> dict[str, str]:
    """The columns as text, including those of `metadata`; lists as Python literals."""
    flat: Record = {}
    for name, value in row.items():
        flat |= value if isinstance(value, dict) else {name: value}
    flat = {k: v for k, v in (flat | more).items() if k not in tables.IMAGES}
    return {k: repr(v) if isinstance(v, list) else cell(flat, k) for k, v in flat.items()}


def option_columns(options: Sequence[str]) -> Record:
    return dict(zip(LETTERS, options, strict=False))


def gold_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer that is a letter or the text of an option (the first of equal texts)."""
    answer = answer if answer in options else answer.strip()
    if not options or len(options) > len(LETTERS):
        raise Bad("no options" if not options else "too many options")
    if not answer:
        raise Bad("no answer")
    if answer in [letter for letter, text in zip(LETTERS, options) if text]:
        return answer
    if answer not in options:
        raise Bad("options without gold")
    return LETTERS[options.index(answer)]


def option_lines(options: Sequence[str], style: str) -> str:
    return "".join(style.format(*pair) for pair in zip(LETTERS, options, strict=False))


def make_query(
    id: str,
    question: str,
    answer: str,
    options: Sequence[str],
    *,
    source: str,
    kind: str = "choice",
    precision: int | None = None,
) -> Query:
    if not id:
        raise Bad("no id")
    if not question.strip():
        raise Bad("no question")
    choices = tuple(options) or None
    return Query(id, (), question.strip(), choices, answer, kind, source=source, precision=precision)


def make_groups(**names: str | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Tuples of the names that are not empty, one tuple for each kind of group."""
    lists = {kind: [value] if isinstance(value, str) else value for kind, value in names.items()}
    return {kind: tuple(name for name in values if name) for kind, values in lists.items()}
