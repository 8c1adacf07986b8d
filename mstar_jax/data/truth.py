"""Ground truth of the embedded data set. It is used to evaluate responses, never to train."""

import dataclasses
import json
import os
import pathlib
import re

ANSWER = "The answer is"
COLOURS = {"red": (212, 48, 52), "green": (50, 160, 72), "blue": (50, 98, 204)}
COLOURS |= {"yellow": (238, 200, 40), "purple": (142, 68, 182), "orange": (240, 128, 30)}
SHAPES = ("circle", "square", "triangle", "diamond", "star")

Fact = tuple[object, ...]  # what a line claims, see `facts`


@dataclasses.dataclass(frozen=True)
class Truth:
    """Ground truth of a query.

    Attributes:
      id, split: of the query.
      family: the kind of question.
      objects: (colour, height or kind of shape), from left to right.
      variants: the valid sequences of steps.
      answer: the final answer.
      part: of the split, where it has several.
      free: a step may be worded freely: it counts what it claims (`facts`), not its text.
    """

    id: str
    split: str
    family: str
    objects: tuple[tuple[str, int | str], ...]
    variants: tuple[tuple[str, ...], ...]
    answer: str
    part: str = ""
    free: bool = False


def read_truth(path: str | os.PathLike) -> dict[str, Truth]:
    """Reads `truth.jsonl`: {query id: its ground truth}."""
    truths = {}
    for record in map(json.loads, pathlib.Path(path).read_text().splitlines()):
        lists = {name: tuple(tuple(item) for item in record[name]) for name in ("objects", "variants")}
        truths[record["id"]] = Truth(**record | lists)
    return truths


def check_steps(text: str, truth: Truth) -> list[bool]:
    """Whether each step of a response is right.

    Steps are the non-empty lines except the final `The answer is X`; the first describes the image. Step j is
    right iff steps 0..j are a prefix of a valid variant, so no step after a wrong one is right. With
    `Truth.free`, a description may tell more than the variant's, as long as it is true.
    """
    steps, variants = _claims(text, truth)
    return [any(v[: j + 1] == steps[: j + 1] for v in variants) for j in range(len(steps))]


def all_right(text: str, truth: Truth) -> bool:
    """Whether the steps of a response are a complete valid variant, whatever its final answer."""
    steps, variants = _claims(text, truth)
    return steps in variants


def _claims(text: str, truth: Truth) -> tuple[tuple[object, ...], tuple[tuple[object, ...], ...]]:
    """The steps of a response and the valid sequences, as what is compared."""
    lines = tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())
    lines = lines[:-1] if lines and lines[-1].startswith(ANSWER) else lines
    if not truth.free:
        return lines, truth.variants
    steps = tuple(map(facts, lines))
    variants = tuple(tuple(map(facts, variant)) for variant in truth.variants)
    read = set(steps[0][1:]) if steps and steps[0][0] == "read" else set()
    if read and read <= set(truth.objects):  # a reading may tell more than a valid one, or the same twice
        whole = next((variant[0] for variant in variants if read.issuperset(variant[0][1:])), None)
        steps = (whole, *steps[1:]) if whole else steps
    return steps, variants


EQUATION = re.compile(r"(?<![-+*/=] )(?<![-+*/=])\b(\d+) ?([+-]) ?(\d+) ?= ?(\d+)\b")
LARGE, SMALL = "largest|highest|greatest|maximum|most", "smallest|lowest|least|minimum|fewest"
EXTREME = re.compile(rf"\b(?:(?P<large>{LARGE})|(?P<small>{SMALL})|(?P<number>\d+))\b", re.IGNORECASE)
_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
NAME = re.compile(rf"\b((?:{_COLOUR}) (?:{_SHAPE})|{_COLOUR}|{_SHAPE})s?\b|\b(\d+)\b", re.IGNORECASE)


def facts(line: str) -> Fact:
    """What a line claims, however it is worded; a line without a claim is its own text.

    Together: 45 + 120 = 165.                  ("+", 45, 120, 165); the terms of a sum in any order
    The largest is 120, the smallest 45.       ("ends", 120, 45)
    The red bar is at 120, the blue bar at 45. ("read", ("blue", 45), ("red", 120)); in any order
    I see 1 red circle and 3 blue stars.       ("read", ("blue star", 3), ("red circle", 1))
    """
    if "=" in line:
        found = EQUATION.findall(line)
        if len(found) != 1 or line.count("=") != 1:
            return (line,)
        a, sign, b, c = found[0]
        terms = [int(a), int(b)]
        return (sign, *(sorted(terms) if sign == "+" else terms), int(c))
    words = [(match.lastgroup, match.group()) for match in EXTREME.finditer(line)]
    kinds = [kind for kind, _ in words]
    if kinds == ["large", "number", "small", "number"]:
        return "ends", int(words[1][1]), int(words[3][1])
    if kinds == ["small", "number", "large", "number"]:
        return "ends", int(words[3][1]), int(words[1][1])
    parts = [name.lower() or int(number) for name, number in NAME.findall(line)]
    pairs = list(zip(parts[::2], parts[1::2]))
    if parts and isinstance(parts[0], int):
        pairs = [(name, number) for number, name in pairs]
    if len(parts) % 2 or not pairs or not all(isinstance(n, str) and isinstance(v, int) for n, v in pairs):
        return (line,)
    return ("read", *sorted(pairs))
