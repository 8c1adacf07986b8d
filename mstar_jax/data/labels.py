"""Steps with labels of a record: in columns, or as the turns of a conversation; see given.py."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mstar_jax.data.rows import Columns, column, dialogue, string, text
from mstar_jax.data.turns import Unreadable, structs
from mstar_jax.rewards import steps

_SIGNS = {"+": 1.0, "-": 0.0}
_ASKED, _SOLUTION = "### Question:", "### Solution Process:"  # of VisualPRM's prompt


def unrolled(record: object, columns: Columns) -> object:
    """A record with its steps in columns, where a conversation says them, as in VisualPRM400K: a step a turn,
    `+` or `-` after each, and the question in front of the first. Where there are both, the columns count.

    Raises:
      Unreadable: a conversation of other types.
    """
    if not isinstance(record, dict) or (turns := column(record, columns, "turns")) is None:
        return record
    plain = {key: None if value is turns else value for key, value in record.items()}
    if column(record, columns, "steps") is not None:
        return plain if column(record, columns, "question") is not None else record
    told, _, last = dialogue(turns, ())
    said = [*told, text(last)]
    asked, mark, first = said[0].partition(_SOLUTION)
    if not mark or not all(each.strip() in _SIGNS for each in said[1::2]):
        return record
    question = asked.replace(_ASKED, "", 1).strip()
    found = {"question": question, "steps": [first, *said[2::2]], "labels": said[1::2]}
    return plain | {getattr(columns, role) or role: value for role, value in found.items()}


def labelled_steps(record: Mapping[str, Any], columns: Columns) -> tuple[str, tuple[float, ...]]:
    """(a response, a line for each step; the label of each) of a record, see given.py.

    Raises:
      Unreadable: the steps or labels are absent, of other types, or not equally many.
    """
    found, labels = structs(column(record, columns, "steps", "no steps")), column(record, columns, "labels")
    if isinstance(found, str):
        found = steps.split(found)
    if not isinstance(found, list) or not (labels is None or isinstance(labels, list)):
        raise Unreadable("wrong types")
    if labels is None:
        labels = [_field(step, "label", "score") for step in found]
        found = [_field(step, "step", "text") for step in found]
    if not found or len(found) != len(labels):
        raise Unreadable("not a label for each step")
    lines = [" ".join(steps.split(string(step))) for step in found]  # what is several lines, is several steps
    if not all(lines):
        raise Unreadable("empty step")
    return "\n".join(lines), tuple(map(_label, labels))


def _field(step: object, *names: str) -> object:
    if not isinstance(step, dict):
        raise Unreadable("not a label for each step")
    return next((step[name] for name in names if step.get(name) is not None), None)


def _label(value: object) -> float:
    if isinstance(value, str):
        value = _SIGNS.get(value.strip(), value)
    if not isinstance(value, int | float | Decimal):  # a bool is 0 or 1
        raise Unreadable("wrong types")
    if not 0 <= value <= 1:
        raise Unreadable("label outside of 0..1")
    return float(value)
