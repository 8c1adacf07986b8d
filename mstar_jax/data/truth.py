"""Ground truth of the embedded data set. It is used to evaluate responses, never to train."""

import dataclasses
import json
import os
import pathlib

ANSWER = "The answer is"


@dataclasses.dataclass(frozen=True)
class Truth:
    """Ground truth of a query.

    Attributes:
      id, split: of the query.
      family: the kind of question.
      objects: (colour, height or kind of shape), from left to right.
      variants: the valid sequences of steps.
      answer: the final answer.
    """

    id: str
    split: str
    family: str
    objects: tuple[tuple[str, int | str], ...]
    variants: tuple[tuple[str, ...], ...]
    answer: str


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
    right iff steps 0..j are a prefix of a valid variant, so no step after a wrong one is right.
    """
    steps = _steps(text)
    return [any(v[: j + 1] == steps[: j + 1] for v in truth.variants) for j in range(len(steps))]


def all_right(text: str, truth: Truth) -> bool:
    """Whether the steps of a response are a complete valid variant, whatever its final answer."""
    return _steps(text) in truth.variants


def _steps(text: str) -> tuple[str, ...]:
    lines = tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())
    return lines[:-1] if lines and lines[-1].startswith(ANSWER) else lines
