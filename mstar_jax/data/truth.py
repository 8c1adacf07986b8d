"""What the embedded data set's generator knows of every query. It measures responses; it never trains."""

import dataclasses
import json
import os
import pathlib

ANSWER = "The answer is"


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the generator knows of a query; `objects` are (colour, height or kind), left to right."""

    id: str
    split: str
    family: str
    objects: tuple[tuple[str, int | str], ...]
    variants: tuple[tuple[str, ...], ...]
    answer: str


def read_truth(path: str | os.PathLike) -> dict[str, Truth]:
    """`truth.jsonl` by query id: dict[str, Truth]."""
    truths = {}
    for record in map(json.loads, pathlib.Path(path).read_text().splitlines()):
        lists = {name: tuple(tuple(item) for item in record[name]) for name in ("objects", "variants")}
        truths[record["id"]] = Truth(**record | lists)
    return truths


def check_steps(text: str, truth: Truth) -> list[bool]:
    """Whether every step of a response is right: list[bool].

    Steps are the non-empty lines without the final `The answer is X`; the description is the first. Step j is
    right iff lines 0..j begin a valid variant, so that nothing after a wrong step is right.
    """
    steps = _steps(text)
    return [any(v[: j + 1] == steps[: j + 1] for v in truth.variants) for j in range(len(steps))]


def all_right(text: str, truth: Truth) -> bool:
    """Whether the steps of a response are one whole valid variant; the final answer is not looked at."""
    return _steps(text) in truth.variants


def _steps(text: str) -> tuple[str, ...]:
    lines = tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())
    return lines[:-1] if lines and lines[-1].startswith(ANSWER) else lines
