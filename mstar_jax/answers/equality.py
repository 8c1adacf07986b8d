r"""Whether two free-form answers are the same: yes and no, numbers, times, lists, formulas, text.

    same("0.33", "1/3", None, None)                        -> True
    same(r"\frac{\sqrt{2}}{2}", "1/sqrt(2)", None, None)    -> True    (by algebra, see symbolic.py)
    same("[2014, 2016]", "2016", None, None)               -> False

Kinds are never mixed: a ratio 3:4 is not a fraction, a time is not a number, an equation is not a value.
"""

import re

from mstar_jax.answers import symbolic
from mstar_jax.answers.units import UNITS, unit
from mstar_jax.answers.values import SYMBOLIC, Number, boolean, number, plain, same_number, tidy

_OPENING = re.compile(r"[\[({]")
_PRODUCT = re.compile(r"(?<=[\d)])\s?[*·]\s?(?=[a-zπ√(])")
_LAST = re.compile(r"(?<=[\d)%]),? and (?=[-$(\d]|[A-Za-z]\s?=)")  # before the last element
_POINT = re.compile(r"[A-Z]'?\s?(?:=\s?)?(?=\()")  # the name of a point
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_SQUARE_UNITS = re.compile(r" (?:square|cubic) [a-z]+$", re.IGNORECASE)
_RANGE = re.compile(r"(?:between |from )?(\S*\d\S*?)\s?(-|:| to | and )\s?(-?\S*\d\S*)")
_UNIT_LIKE = re.compile(r"[A-Za-z]+\^?[23]?|°")
_NAMED = re.compile(r"\s*\\?([A-Za-zα-ω](?:_?\w)?|[A-Z]{2}|[fg]\(x\))\s?=")


# ---- 1. formulas -------------------------------------------------------------------------------------------


def _formula(text: str) -> str:
    """A formula without `x =`, spaces and product signs, to be compared as text."""
    return _SPACE.sub("", _PRODUCT.sub("", plain(_NAMED.sub("", text, count=1))))


def _physical(text: str) -> tuple[str, str]:
    """(formula, unit or '') of `5√3 cm`. A single letter is a variable here, not a unit."""
    m = _SQUARE_UNITS.search(text)
    head, _, tail = text.rpartition(" ") if m is None else (text[: m.start()], "", "")
    if m is not None:
        return head, unit(m[0].lower()) or ""
    name = unit(" " + tail.lower()) if head and len(tail) > 1 and _UNIT_LIKE.fullmatch(tail) else None
    return (head, name) if name and tail.lower().rstrip("^23") in UNITS else (text, "")


def _same_formula(gold: str, other: str) -> bool:
    """Equal as text or by algebra; `x = 5` is `5` but not `y = 5`, and an equation is no number."""
    names = [m[1] for text in (gold, other) if (m := _NAMED.match(text))]
    if len(set(names)) > 1:
        return False
    if _formula(gold) == _formula(other):
        return True
    (first, one), (second, two) = _physical(gold), _physical(other)
    return not (one and two and one != two) and symbolic.equal(first, second)


# ---- 2. lists --------------------------------------------------------------------------------------------


def _elements(text: str) -> tuple[str, list[str]]:
    """(opening and closing bracket or '', the parts between top-level commas); no parts if it is no list."""
    text = tidy(text).replace("\\{", "{").replace("\\}", "}")
    ends = text[:1] + text[-1:]
    brackets = ends if ends in ("[]", "()", "{}", "[)", "(]") else ""
    inner = text[1:-1] if brackets else text
    inner = _LAST.sub(", ", inner)
    if "," not in inner:
        return brackets, [inner.strip()] if brackets == "[]" else []
    spaced = ", " in inner
    parts: list[str] = []
    depth = 0
    start = 0
    for i, c in enumerate(inner):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and (not spaced or inner[i + 1 : i + 2] == " "):
            parts.append(inner[start:i].strip())
            start = i + 1
    if not brackets and not parts:  # unbalanced: the commas are all inside
        return "", []
    return brackets, [*parts, inner[start:].strip()]


def _same_list(gold: str, other: str, answer_type: str | None, precision: int | None) -> bool:
    brackets, expected = _elements(gold)
    given_brackets, given = _elements(other)
    pair = len(expected) == 2 and answer_type != "list"  # may be an interval or a point
    alike = not pair and {brackets, given_brackets} <= {"[]", "()"}
    if len(expected) != len(given) or not (given_brackets in ("", brackets) or not brackets or alike):
        return False
    if brackets == "{}":  # a set
        return _paired(expected, given, precision)
    return all(same(a, b, None, precision) for a, b in zip(expected, given, strict=True))


def same(gold: str, other: str, answer_type: str | None, precision: int | None) -> bool:
    """Whether `other` answers a free-form `gold`; both are extracted answers. Rounding is not symmetric."""
    if gold == other:
        return True
    if other.endswith("?") and not gold.endswith("?"):
        return False
    if (expected := boolean(gold)) is not None:
        return boolean(other) is expected
    if _GENOTYPE.fullmatch(gold):
        return False  # Aa is not AA
    if _MAY_BE_CLOCK.search(gold) and (clock := _clock(gold)) and (other_clock := _clock(other)):
        return clock == other_clock
    if n := number(gold):
        m = number(other)
        names = {found[1] for text in (gold, other) if "=" in text and (found := _NAMED.match(text))}
        return m is not None and len(names) < 2 and same_number(n, m, answer_type, precision)
    if (pair := _range(gold)) and (other_pair := _range(other)):
        signs = {pair[1], other_pair[1]}
        same_ends = all(same_number(a, b, None, None) for a, b in zip(pair[0], other_pair[0], strict=True))
        return same_ends and (len(signs) == 1 or signs in ({"-", " to "}, {":", " to "}))
    if "∪" in gold:  # of intervals, in any order
        return _paired(gold.split("∪"), other.split("∪"), precision)
    if gold[:1] == "(" and (point := _POINT.match(other)):
        other = other[point.end() :]
    parts = _elements(gold)[1] if len(_OPENING.findall(gold)) <= 20 else []
    if (gold[:1] in "[({\\" and len(parts) > (gold[:1] != "[")) or (
        len(parts) > 1 and all(map(number, parts))
    ):
        return _same_list(gold, other, answer_type, precision)
    if plain(gold) == plain(other):
        return True
    return bool(SYMBOLIC.search(gold)) and _same_formula(gold, other)


def _range(text: str) -> tuple[tuple[Number, Number], str] | None:
    """(both numbers, the sign between them) of `5-10`, `between 5 and 10` (as `-`) and `3:4`; else None."""
    m = _RANGE.fullmatch(plain(text))
    if m is None or (m[2] == " and ") is not text.lower().startswith("between"):
        return None
    low, high = number(m[1]), number(m[3])
    return ((low, high), "-" if m[2] == " and " else m[2]) if low and high else None


def _paired(expected: list[str], given: list[str], precision: int | None) -> bool:
    """Whether the elements match one to one, in any order."""
    given = [each.strip() for each in given]
    for element in expected:
        match = next((g for g in given if same(element.strip(), g, None, precision)), None)
        if match is None:
            return False
        given.remove(match)
    return not given


_GENOTYPE = re.compile(r"(?:([A-Za-z])\1){1,4}", re.IGNORECASE)
_MAY_BE_CLOCK = re.compile(r":|clock|\d\s?[ap]\.?m", re.IGNORECASE)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d)| o'?clock)?\s?([ap])?(?(3)\.?m)\b\.?")


def _clock(text: str) -> tuple[int, int, str] | None:
    """(hour, minute, `a`, `p` or '') of `7:30 p.m.` and `7 o'clock`; None of anything else, such as 7."""
    m = _CLOCK.fullmatch(plain(text))
    if not m or not (m[2] or m[3] or "clock" in m[0]) or int(m[1]) > 24 or int(m[2] or 0) > 59:
        return None
    return int(m[1]), int(m[2] or 0), m[3] or ""
