"""VisualProcessBench: does a reward model tell right steps from wrong ones, as people labelled them?

A folder with the official `test.jsonl` and `images/` (OpenGVLab/VisualProcessBench), a solution a line:

    {"image": ["images/MathVerse/image_1.png"], "question": "In triangle ABC, ... is ()", "answer": "D",
     "response": {"steps": ["Angle C is 180 - 80 - 60 = 40.", "So angle CED is 40."],
                  "process_correctness": [1, -1]},
     "policy_model": "InternVL2_5-78B", "data_source": "MathVerse"}

A step is right (1), wrong (-1) or neither (0: nothing is inferred); neutral steps count for nothing. The
measure is the macro F1: the mean of the F1 of right and of wrong steps, over the steps of all solutions. The
paper does not say from which score on a step is right, and no evaluation code is published. So two are given:
at a threshold of 0.5, and at the one that is best on this very data, an upper bound.

Source: VisualPRM (arXiv 2503.10291), section 3.3.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from mstar_jax.data.images import ImageError
from mstar_jax.data.mathv360k import Report
from mstar_jax.evaluate import tables
from mstar_jax.evaluate.items import Bad, make_query
from mstar_jax.evaluate.tables import Record, cell
from mstar_jax.rewards import metrics
from mstar_jax.structs import Query

NAME = "visualprocessbench"
TITLE = "VisualProcessBench"
SIZE = 2866  # solutions in the official file
THRESHOLD = 0.5  # from this score on a step is right


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solution with labelled steps.

    Attributes:
      query: the question; its `source` is the benchmark that it comes from.
      steps: without line breaks, none of them blank.
      labels: 1, 0 or -1 for each.
      blank: the number of blank steps, which are left out with their labels.
    """

    query: Query
    steps: tuple[str, ...]
    labels: tuple[int, ...]
    blank: int


class F1(TypedDict):
    """F1 scores at a threshold; `macro` is the mean of the two."""

    threshold: float
    macro: float
    right: float
    wrong: float


# ---- 1. the file --------------------------------------------------------------------------------------


def read(folder: str | os.PathLike, images: str | os.PathLike) -> tuple[list[Solution], Report]:
    """Reads the file; broken rows are dropped and counted by cause.

    Args:
      folder: with the official files, or the file.
      images: where images inside the file would be written.

    Raises:
      FileNotFoundError: the file is not there.
    """
    paths = tables.find(folder, ("test.jsonl",))
    report = Report(", ".join(paths))
    found = []
    for number, (place, row, pictures) in enumerate(tables.load(paths, os.fspath(images))):
        report.rows += 1
        try:
            if isinstance(row, Exception):
                raise Bad("broken row")
            if isinstance(pictures, ImageError):
                raise Bad(pictures.cause)
            solution = _solution(row, number)
        except Bad as error:
            report.drop(str(error), place)
        else:
            found.append(
                dataclasses.replace(solution, query=dataclasses.replace(solution.query, images=pictures))
            )
    report.kept = len(found)
    return found, report


def _solution(row: Record, number: int) -> Solution:
    response = row.get("response")
    response = response if isinstance(response, dict) else {}
    steps, labels = response.get("steps"), response.get("process_correctness")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise Bad("steps without labels")
    if not all(isinstance(step, str) for step in steps) or not all(label in (1, 0, -1) for label in labels):
        raise Bad("a step is no text, or its label is not 1, 0 or -1")
    lines = [tables.encodable(step).split("\n") for step in steps]
    texts = [" ".join(line.strip() for line in each if line.strip()) for each in lines]
    pairs = [(text, int(label)) for text, label in zip(texts, labels) if text]
    if not pairs:
        raise Bad("no steps")
    query = make_query(
        str(number),
        cell(row, "question"),
        cell(row, "answer"),
        (),
        source=cell(row, "data_source"),
        kind="text",
    )
    kept, of_each = zip(*pairs)
    return Solution(query, kept, of_each, len(steps) - len(pairs))


# ---- 2. the measure -----------------------------------------------------------------------------------


def f1(scores: np.ndarray, right: np.ndarray, threshold: float) -> F1:
    """The F1 of right and of wrong steps if those with at least `threshold` are held to be right.

    Args:
      scores: float[N], of steps that are right or wrong.
      right: bool[N].
      threshold: see above.
    """
    held = scores >= threshold
    both, neither = int((held & right).sum()), int((~held & ~right).sum())
    errors = len(scores) - both - neither
    of_right, of_wrong = (2 * hits / max(2 * hits + errors, 1) for hits in (both, neither))
    return {
        "threshold": threshold,
        "macro": (of_right + of_wrong) / 2,
        "right": of_right,
        "wrong": of_wrong,
    }


def best(scores: np.ndarray, right: np.ndarray) -> F1:
    """The F1 at the score of a step at which the macro F1 is largest; of equal ones, the largest score."""
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], right[order]
    ends = np.append(ordered[1:] != ordered[:-1], True)  # the last step of each score
    both = np.cumsum(hits)[ends]
    held = np.flatnonzero(ends) + 1
    neither = (~right).sum() - (held - both)
    errors = len(scores) - both - neither
    macro = sum(2 * count / np.maximum(2 * count + errors, 1) for count in (both, neither)) / 2
    return f1(scores, right, float(ordered[ends][int(np.argmax(macro))]))


def measure(solutions: Sequence[Solution], scores: Mapping[str, Sequence[float] | None]) -> dict:
    """The measures of a reward model, ready for JSON.

    Args:
      solutions: that were asked about.
      scores: of every step, in 0..1, by `query.id`; a solution without any is left out and counted.

    Raises:
      ValueError: a solution has another number of scores than steps, or no step has a label.
    """
    parts: dict[str, list[tuple[float, bool]]] = {}
    counts = {"right": 0, "wrong": 0, "neutral": 0, "blank": 0}
    left_out = 0
    for solution in solutions:
        own = scores.get(solution.query.id)
        if not own:
            left_out += 1
            continue
        if len(own) != len(solution.steps):
            raise ValueError(
                f"solution {solution.query.id}: {len(own)} scores of {len(solution.steps)} steps"
            )
        part = parts.setdefault(solution.query.source, [])
        part += [(score, label > 0) for score, label in zip(own, solution.labels) if label]
        counts["blank"] += solution.blank
        for label in solution.labels:
            counts[{1: "right", -1: "wrong", 0: "neutral"}[label]] += 1
    if not any(parts.values()):
        raise ValueError(f"{TITLE}: no step that is right or wrong was scored; {left_out} solutions left out")
    values, right = _arrays([pair for part in parts.values() for pair in part])
    at_best = best(values, right)
    sources = {
        source: {
            "steps": len(part),
            "given": f1(*_arrays(part), THRESHOLD),
            "best": f1(*_arrays(part), at_best["threshold"]),
        }
        for source, part in sorted(parts.items())
        if part
    }
    return {
        "benchmark": NAME,
        "solutions": len(solutions),
        "expected": SIZE,
        "left_out": left_out,
        "steps": counts,
        "auc": metrics.auc(list(values), list(right)),
        "given": f1(values, right, THRESHOLD),
        "best": at_best,
        "sources": sources,
    }


def _arrays(pairs: Sequence[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in pairs]), np.array([right for _, right in pairs], bool)


def table(name: str, record: Mapping) -> str:
    """The measures of reward model `name` as Markdown: all sources, then each."""
    head = "steps | macro F1 at 0.5 | of right | of wrong | best macro F1 | its threshold"
    lines = [f"| {TITLE}, {name} | {head} |", "|---|" + "---:|" * 6]
    steps = record["steps"]["right"] + record["steps"]["wrong"]
    for source, part in [("all", {**record, "steps": steps}), *record["sources"].items()]:
        given, top = part["given"], part["best"]
        cells = [
            f"{100 * value:.1f}" for value in (given["macro"], given["right"], given["wrong"], top["macro"])
        ]
        lines.append(f"| {source} | {part['steps']} | {' | '.join(cells)} | {top['threshold']:.3f} |")
    area = "none" if record["auc"] is None else f"{record['auc']:.3f}"
    about = f"AUC {area}; {record['left_out']} of {record['solutions']} solutions left out; "
    about += (
        f"{record['steps']['neutral']} neutral and {record['steps']['blank']} blank steps count for nothing."
    )
    return "\n".join([*lines, "", about])
