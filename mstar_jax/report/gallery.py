"""Sampled responses with their images, as one JSON value that the page's script lets readers browse.

{"images": ["data:image/png;base64,..."],
 "stages": [{"name": "warmup_validation", "queries": [
   {"id": "validation_000012_0", "question": "...", "gold": "22", "images": [0], "missing": 0, "left": 9,
    "responses": [{"sample": 0, "temperature": 0, "verdict": "correct", "answer": "22", "truncated": false,
                   "reward": 0.91, "steps": ["Bars red 4", "..."], "scores": [0.97, 0.91],
                   "right": [true]}]}]}]}

A question is followed by its options where the rollouts hold them.
"""

import base64
import contextlib
import io
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import TypeVar

from mstar_jax.data import images, prompts, truth
from mstar_jax.report.runs import Missing, Record, RunRecord, lines, truths
from mstar_jax.rewards import selection, steps

QUERIES = 20  # shown of a stage
RESPONSES = 8  # shown of a query
TEXT = 4000  # characters shown of a question or response
SIDE = 240  # pixels of a thumbnail
SMALL = 96  # pixels; up to this size an image stays a PNG
PIXELS = 16_000_000  # of the largest image that is read
PICTURES = 240  # images in a report
STAGE = re.compile(r"(base|warmup|iteration_(\d+)|prm)(_validation|_test|_held_out)?")

T = TypeVar("T")


def folders(run: RunRecord, count: int) -> list[pathlib.Path]:
    """At most `count` stores to show, in the order of the stages; scores rather than rollouts.

    Validation comes first, evenly spaced and including both ends of the run; the test split and training
    rollouts fill up what is left.
    """
    there: dict[str, pathlib.Path] = {}
    for kind in ("rollouts", "scores"):
        for folder in sorted((run.workdir / kind).glob("*")):
            if STAGE.fullmatch(folder.name) and any(folder.glob("[0-9]*.jsonl")):
                there[folder.name] = folder
    names = sorted(there, key=_order)
    evaluated = [name for name in names if name.endswith("_validation")]
    others = [name for name in names if name not in evaluated]
    others.sort(key=lambda name: (name == "prm_held_out", _order(name)), reverse=True)  # the newest first
    chosen = _spread(evaluated, max(count * 2 // 3, count - len(others)))
    chosen += others[: count - len(chosen)]
    return [there[name] for name in names if name in chosen]


def _order(name: str) -> tuple[float, str]:
    stage, iteration = STAGE.fullmatch(name).groups()[:2]  # type: ignore[union-attr]
    return {"base": -1.0, "warmup": 0.0, "prm": 0.5}.get(stage, float(iteration or 0)), name


def _spread(found: Sequence[T], count: int) -> list[T]:
    """At most `count` items of a list, evenly spaced and including both ends."""
    if len(found) <= count:
        return list(found)
    return [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]


class Gallery:
    """Collects stages within a budget of characters."""

    def __init__(self) -> None:
        self.stages: list[Record] = []
        self.images: list[str] = []
        self._known: dict[pathlib.Path, dict[str, truth.Truth]] = {}
        self._index: dict[str, int | None] = {}  # by path of an image; None if it cannot be shown

    def add(self, run: RunRecord, folder: pathlib.Path, name: str, budget: int) -> int:
        """Adds the first queries of a store until there are QUERIES or the budget is used up.

        Returns:
          The number of characters used.

        Raises:
          Missing: the store cannot be read.
        """
        if run.workdir not in self._known:
            self._known[run.workdir] = {}
            with contextlib.suppress(Missing, OSError, ValueError, KeyError, TypeError):
                self._known[run.workdir] = truths(run)
        known = self._known[run.workdir]
        queries: list[Record] = []
        spent = 0
        for record in lines(folder):
            before = len(self.images)
            queries.append(self._query(run, record, known.get(str(record["query"]))))
            spent += len(json.dumps(queries[-1])) + sum(map(len, self.images[before:]))
            if len(queries) == QUERIES or spent > budget:
                break
        if queries:
            self.stages.append({"name": name, "queries": queries})
        return spent

    def json(self) -> str:
        """The value as text that is safe inside a <script> element."""
        text = json.dumps({"images": self.images, "stages": self.stages}, allow_nan=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def _query(self, run: RunRecord, record: Record, known: truth.Truth | None) -> Record:
        paths = [str(path) for path in record.get("images") or ()][:4]
        shown = [i for i in (self._image(run, path) for path in paths) if i is not None]
        gold = record.get("gold")
        responses = record["responses"]
        mixed = len({r.get("temperature") for r in responses}) > 2  # an exploration: show some of each
        few = _spread(responses, RESPONSES) if mixed else responses[:RESPONSES]
        return {
            "id": str(record["query"]),
            "question": str(record.get("question", ""))[:TEXT]
            + prompts.listed([str(text) for text in record.get("options") or ()])[:TEXT],
            "gold": None if gold is None else str(gold),
            "images": shown,
            "missing": len(paths) - len(shown),
            "left": len(responses) - len(few),
            "responses": [_response(r, known, run.aggregate) for r in few],
        }

    def _image(self, run: RunRecord, path: str) -> int | None:
        if path not in self._index:
            self._index[path] = None
            with contextlib.suppress(OSError, ValueError):  # ImageError is a ValueError
                if len(self.images) < PICTURES:
                    self.images.append(thumbnail(_moved(run.workdir, path)))
                    self._index[path] = len(self.images) - 1
        return self._index[path]


def _response(r: Record, known: truth.Truth | None, aggregate: str) -> Record:
    text = str(r.get("text", ""))
    answer = r.get("answer")
    shown = text if len(text) <= TEXT else text[:TEXT] + " ..."
    scores = r.get("step_scores")
    reward = None
    if scores is not None:
        scores = [s if isinstance(s, int | float) and math.isfinite(s) else None for s in scores]
        if scores and None not in scores and not r.get("truncated"):
            reward = float(selection.AGGREGATES.get(aggregate, min)(scores))
    return {
        "sample": r.get("sample"),
        "temperature": r.get("temperature"),
        "verdict": r.get("verdict"),
        "answer": None if answer is None else str(answer)[:200],
        "truncated": bool(r.get("truncated")),
        "reward": reward,
        "steps": steps.split(shown),
        "scores": scores and [s if s is None else round(s, 3) for s in scores],
        "right": truth.check_steps(text, known) if known else None,
    }


def _moved(workdir: pathlib.Path, path: str) -> pathlib.Path:
    """The image, or the file of the same relative path in a workdir that was copied from elsewhere."""
    found = pathlib.Path(path)
    if not found.exists() and ".." not in found.parts:
        inside = (workdir.joinpath(*found.parts[i:]) for i in range(1, len(found.parts)))
        return next((each for each in inside if each.is_file()), found)
    return found


def thumbnail(path: pathlib.Path) -> str:
    """A small copy of an image as a data URI.

    Raises:
      ImageError: the file is missing, too large or cannot be decoded.
    """
    image = images.load_image(str(path), max_pixels=PIXELS)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    if kind == "png":
        image.save(buffer, format="png", optimize=True)
    else:
        image.save(buffer, format="jpeg", quality=75)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
