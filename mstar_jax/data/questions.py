"""Questions about the figures of `data.figures`, and their answers step by step, in natural words."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LARGEST = 999  # of all numbers and results

Pairs = tuple[tuple[str, int], ...]  # names with their numbers
Step = tuple[str | int | Pairs, ...]  # ("read", pairs), ("+" or "-", a, b) or ("ends", largest, smallest)

# ---- 1. words ---------------------------------------------------------------------------------------------


def several(name: str) -> str:
    """The plural of a name: `red circles`."""
    return f"{name}s"


def counted(count: int, name: str) -> str:
    """`1 red circle` or `3 red circles`."""
    return f"{count} {name if count == 1 else several(name)}"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


class Words(NamedTuple):
    """How a kind of figure is spoken of.

    Attributes:
      one: what a name stands for, `the red bar`.
      read: wordings of a reading; each is a function of the pairs.
      ends: wordings of the largest and the smallest number.
      all: what all of it is.
      value: what a number is.
    """

    one: str
    read: tuple[Callable[[Pairs], str], ...]
    ends: tuple[str, ...]
    all: str
    value: str


def _said(start: str, first: str, other: str, end: str = ".") -> Callable[[Pairs], str]:
    """A reading whose first part is worded otherwise than the others."""

    def say(pairs: Pairs) -> str:
        wordings = [first, *[other] * (len(pairs) - 1)]
        parts = [w.format(name=n, value=v, s="" if v == 1 else "s") for w, (n, v) in zip(wordings, pairs)]
        text = start + listed(parts) + end
        return text[0].upper() + text[1:]

    return say


ENDS = (
    "The largest is {0} and the smallest is {1}.",
    "The highest value is {0}, the lowest {1}.",
    "The maximum is {0} and the minimum {1}.",
)
WORDS = {
    "bars": Words(
        "the {} bar",
        (
            _said("", "the {name} bar is at {value}", "the {name} bar at {value}"),
            _said("the chart shows ", "{name} {value}", "{name} {value}"),
            _said("I read ", "{value} for {name}", "{value} for {name}"),
            _said("the bars are ", "{name} with {value}", "{name} with {value}"),
        ),
        ENDS,
        "all bars",
        "value",
    ),
    "list": Words(
        "the {}",
        (
            _said("", "the {name} costs {value}", "the {name} {value}"),
            _said("the prices are ", "{value} for the {name}", "{value} for the {name}"),
            _said("the list has ", "the {name} for {value}", "the {name} for {value}"),
            _said("I read ", "{name} {value}", "{name} {value}"),
        ),
        (*ENDS, "The highest price is {0} and the lowest is {1}."),
        "all items",
        "price",
    ),
    "scene": Words(
        "the {}s",
        (
            _said("there are ", "{value} {name}{s}", "{value} {name}{s}"),
            _said("I see ", "{value} {name}{s}", "{value} {name}{s}"),
            _said("I count ", "{value} {name}{s}", "{value} {name}{s}"),
        ),
        (*ENDS, "The most is {0} and the fewest is {1}."),
        "all shapes",
        "number",
    ),
}
SUMS = ("{0} + {1} = {2}", "{0} + {1} = {2}.", "Adding gives {0} + {1} = {2}.", "Together: {0} + {1} = {2}.")
LESS = ("{0} - {1} = {2}", "{0} - {1} = {2}.", "The difference is {0} - {1} = {2}.", "Then {0} - {1} = {2}.")


def say(step: Step, kind: str, rng: np.random.Generator | None = None) -> str:
    """A step in words; without `rng` always in the first ones."""
    words = WORDS[kind]

    def pick(options):
        return options[0 if rng is None else int(rng.integers(len(options)))]

    name, *rest = step
    if name == "read":
        return pick(words.read)(rest[0])
    if name == "ends":
        return pick(words.ends).format(*rest)
    return pick(SUMS if name == "+" else LESS).format(*rest, result(step))


def result(step: Step) -> int:
    """What a step of arithmetic gives."""
    name, a, b = step
    assert isinstance(a, int) and isinstance(b, int)
    return a + b if name == "+" else a - b


# ---- 2. questions -----------------------------------------------------------------------------------------

Steps = list[Step]


class Family(NamedTuple):
    """A kind of question.

    Attributes:
      names: how many of a figure's names it speaks of; 0: of all, without naming them.
      solve: (their numbers, the others, the budget) -> the orders of steps after the reading.
      wordings: with {a} to {d} for the names, {all}, {value} and, where there is a budget, {n}.
    """

    names: int
    solve: Callable[[Sequence[int], Sequence[int], int], list[Steps]]
    wordings: tuple[str, ...]


def chain(first: int, *steps: tuple[str, int]) -> Steps:
    """Steps that each go on with the result of the one before."""
    found: Steps = []
    for sign, number in steps:
        found.append((sign, first, number))
        first = result(found[-1])
    return found


def added(numbers: Sequence[int]) -> Steps:
    """The numbers added up from left to right."""
    return chain(numbers[0], *(("+", number) for number in numbers[1:]))


def both_ways(numbers: Sequence[int]) -> list[Steps]:
    """The numbers added up from either end."""
    return [added(numbers), added(numbers[::-1])]


def gap(a: int, b: int) -> Step:
    """The difference of two numbers."""
    return "-", max(a, b), min(a, b)


def ends(numbers: Sequence[int], sign: str) -> list[Steps]:
    """The largest and the smallest number, and what they give."""
    high, low = max(numbers), min(numbers)
    return [[("ends", high, low), (sign, high, low)]]


def less(x: Sequence[int]) -> list[Steps]:
    """a + b - c, also with c taken from a or b first."""
    a, b, c = x
    ways = [chain(a, ("+", b), ("-", c)), chain(a, ("-", c), ("+", b)), chain(b, ("-", c), ("+", a))]
    return [ways[0], *(way for way in ways[1:] if result(way[0]) >= 0)]


def left(x: Sequence[int], n: int) -> list[Steps]:
    """What is left of n: the numbers are added up first, or taken from it one by one."""
    return [[*added(x), ("-", n, sum(x))], chain(n, *(("-", number) for number in x))]


def two_pairs(x: Sequence[int]) -> list[Steps]:
    """The difference of a + b and c + d."""
    first, second, end = added(x[:2]), added(x[2:]), gap(sum(x[:2]), sum(x[2:]))
    return [[*first, *second, end], [*second, *first, end]]


KNOWN = {
    "pair": Family(2, lambda x, rest, n: [added(x)], (
        "What is the sum of {a} and {b}?", "What do {a} and {b} make together?", "Add {a} and {b}.",
        "How much are {a} and {b} in total?", "Give the combined {value} of {a} and {b}.",
        "If {a} and {b} are put together, what is the result?",
    )),
    "apart": Family(2, lambda x, rest, n: [[gap(*x)]], (
        "What is the difference between {a} and {b}?", "How far apart are {a} and {b}?",
        "By how much do {a} and {b} differ?", "How much lies between {a} and {b}?",
        "Compare {a} with {b}: what is the gap?", "What separates {a} from {b}, as a number?",
    )),
    "total": Family(0, lambda x, rest, n: both_ways(x), (
        "What is the total of {all}?", "Add up {all}.", "What do {all} make together?",
        "How much is everything in the figure together?", "Give the sum of {all}.",
        "If {all} are added, what is the result?",
    )),
    "range": Family(0, lambda x, rest, n: ends(x, "-"), (
        "What is the range of {all}?", "How far is the largest {value} from the smallest one?",
        "What is the gap between the highest and the lowest {value}?",
        "Subtract the smallest {value} from the largest one.", "By how much do the two extremes differ?",
        "How much larger is the greatest {value} than the least?",
    )),
    "less": Family(3, lambda x, rest, n: less(x), (
        "Add {a} and {b}, then take away {c}. What is left?", "What is {a} plus {b} minus {c}?",
        "How much more are {a} and {b} together than {c}?", "From the sum of {a} and {b}, subtract {c}.",
        "By how much do {a} and {b} together exceed {c}?",
        "What is left of {a} and {b} together after {c} is subtracted?",
    )),
    "twice": Family(2, lambda x, rest, n: both_ways((x[0], x[0], x[1])), (
        "What is twice {a} plus {b}?", "Double {a} and add {b}.", "Add {b} to two times {a}.",
        "Take {a} two times and {b} once. What is the sum?",
        "If {a} counts double, what do {a} and {b} make together?",
        "How much are {a}, {a} again and {b} together?",
    )),
    "left": Family(2, lambda x, rest, n: left(x, n), (
        "What is left of {n} after {a} and {b} are taken away?", "Take {a} and {b} from {n}. What remains?",
        "Someone has {n} and spends {a} and {b}. How much remains?", "What is {n} minus {a} minus {b}?",
        "How much is missing from {a} and {b} together to {n}?",
        "Starting with {n}, subtract {a} and then {b}.",
    )),
}  # fmt: skip
UNSEEN = {  # in the test split alone
    "ends": Family(0, lambda x, rest, n: ends(x, "+"), (
        "What is the sum of the largest and the smallest {value}?", "What do the two extremes make together?",
        "Add the highest {value} and the lowest one.",
    )),
    "rest": Family(1, lambda x, rest, n: both_ways(rest), (
        "What is the total of {all} except {a}?", "Leave out {a}. What do the others make together?",
        "Add up everything but {a}.",
    )),
    "pairs": Family(4, lambda x, rest, n: two_pairs(x), (
        "What is the difference between {a} and {b} together and {c} and {d} together?",
        "How far is {a} plus {b} from {c} plus {d}?",
        "Compare the sum of {a} and {b} with the sum of {c} and {d}: what is the gap?",
    )),
    "thrice": Family(1, lambda x, rest, n: [added((*x, *x, *x))], (
        "What is three times {a}?", "Take {a} three times. What is the sum?",
        "If {a} counts three times, how much is it?",
    )),
    "all_left": Family(0, lambda x, rest, n: left(x, n), (
        "What is left of {n} after {all} are taken away?", "How much is missing from {all} together to {n}?",
        "Someone has {n} and spends it on {all}. How much remains?",
    )),
}  # fmt: skip


class Problem(NamedTuple):
    """A question about a figure.

    Attributes:
      family, question, answer: see `Truth`.
      orders: the valid sequences of steps, each with a reading of the whole figure or of what is asked about.
    """

    family: str
    question: str
    answer: str
    orders: tuple[tuple[Step, ...], ...]


def pose(rng: np.random.Generator, name: str, kind: str, objects: Pairs) -> Problem | None:
    """A question of a family about a figure; None if the figure has too few names or too large numbers."""
    family, words = {**KNOWN, **UNSEEN}[name], WORDS[kind]
    if len(objects) < max(family.names, 2):
        return None
    chosen = rng.permutation(len(objects))[: family.names].tolist() or range(len(objects))
    asked = tuple(objects[i] for i in chosen)
    rest = [objects[i][1] for i in range(len(objects)) if i not in chosen]
    numbers = [value for _, value in asked]
    budget = min(LARGEST, 50 * (sum(numbers) // 50 + int(rng.integers(1, 5))))
    if kind == "scene":
        budget = sum(numbers) + int(rng.integers(1, 9))
    ways = family.solve(numbers, rest, budget)
    if any(result(step) not in range(LARGEST + 1) for way in ways for step in way if step[0] != "ends"):
        return None
    wording = family.wordings[int(rng.integers(len(family.wordings)))]
    places = dict(zip("abcd", (words.one.format(n) for n, _ in asked))) if family.names else {}
    question = wording.format(**places, all=words.all, value=words.value, n=budget)
    readings = [objects]  # of all, or of what the question names
    if family.names and name != "rest":
        readings.append(asked)
    orders = dict.fromkeys((("read", pairs), *way) for way in ways for pairs in readings)
    return Problem(name, question[0].upper() + question[1:], str(result(ways[0][-1])), tuple(orders))


def problems(
    rng: np.random.Generator, families: Sequence[str], count: int, kind: str, objects: Pairs
) -> list[Problem]:
    """At most `count` questions of different families."""
    found = (pose(rng, name, kind, objects) for name in rng.permutation(list(families)).tolist())
    return list(itertools.islice((each for each in found if each), count))
