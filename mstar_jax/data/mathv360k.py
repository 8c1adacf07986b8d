r"""Reader of the MathV360K format, the pool of training queries.

A file is a JSON list of rows, or JSON lines (.jsonl, .jsonl.gz). One row:

    {
      "id": "TabMWP_7",
      "image": "TabMWP/images/416.png",
      "conversations": [
        {
          "from": "human",
          "value": "<image>\nHint: Please answer the question and provide the correct option letter, e.g., A,
            B, C, D, at the end.\nQuestion: Vijay has $9.00. Does he have enough to buy a book about music and
            a book about hiking?\nChoices:\n(A) yes\n(B) no"
        },
        {"from": "gpt", "value": "The answer is B"}
      ]
    }

`id` and `image` may be absent, and `image` may be a list, or be called `images`, `image_path` and the like.
Turns may have a `role` and `content`, of `user` and `assistant`; what they may say is in turns.py. The
first component of the image path is the source. About nine rows share an image.

The reader keeps the rows that can be trained on and counts all others by cause; an invalid row never stops
it.
"""

import dataclasses
import functools
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from mstar_jax.answers.check import equivalent
from mstar_jax.data import pictures
from mstar_jax.data.images import MAX_PIXELS, resolve
from mstar_jax.data.splits import split
from mstar_jax.data.turns import Unreadable, image_marks, is_long, parse_answer, parse_question
from mstar_jax.structs import Query

__all__ = ["Report", "read", "split"]

EXAMPLES = 3  # rows that the report names per cause


@dataclasses.dataclass
class Report:
    """What the reader kept and dropped.

    Attributes:
      path: the file.
      rows: the number of rows, including invalid JSON lines.
      kept: the number of queries returned.
      long: the number of kept queries whose answer is long, see `turns.is_long`.
      renamed: the number of kept queries whose id was taken, and which got a suffix `_2`, `_3`, ...
      dropped: the number of rows dropped per cause; with `kept`, they sum to `rows`.
      examples: up to three dropped rows per cause, as `line 7` or `row 7`, with the id if there is one.
    """

    path: str
    rows: int = 0
    kept: int = 0
    long: int = 0
    renamed: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def drop(self, cause: str, example: str) -> None:
        """Counts one dropped row."""
        self.dropped[cause] = self.dropped.get(cause, 0) + 1
        if self.dropped[cause] <= EXAMPLES:
            self.examples.setdefault(cause, []).append(example)

    def __str__(self) -> str:
        lines = [f"{self.path}: kept {self.kept} of {self.rows} rows"]
        lines += (
            [f"  of them {self.long:6d}  long text answers, kept for your own reward"] if self.long else []
        )
        lines += [f"  renamed {self.renamed:6d}  id was taken"] if self.renamed else []
        for cause, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  dropped {count:6d}  {cause} ({', '.join(self.examples[cause])})")
        return "\n".join(lines)


_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_IMAGE_FIELD = re.compile(r"(?:image|img)s?(?:_?(?:paths?|files?|names?|file_?names?))?", re.IGNORECASE)
_IMAGE_LIKE = re.compile(r"image(?!_?id)|img(?!_?id)|picture|photo", re.IGNORECASE)


# ---- 1. rows ------------------------------------------------------------------------------------------


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yields `line 7` or `row 7`, and the decoded row, or the error if the line is not valid JSON."""
    if path.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            number = 0
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"line {number}", _decode(line)
            except (EOFError, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: damaged gzip data after line {number}: {error}") from error
        return
    with open(path, "rb") as file:
        text = file.read()
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        offset = error.start if isinstance(error, UnicodeDecodeError) else 0
        at = error.lineno if isinstance(error, json.JSONDecodeError) else text.count(b"\n", 0, offset) + 1
        raise ValueError(f"{path}, line {at}: not valid JSON: {error}") from error
    if type(rows) is not list:
        raise ValueError(f"{path}, line 1: expected a JSON list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _decode(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return error


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise Unreadable("wrong types")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise Unreadable("wrong types")  # an unpaired surrogate, which cannot be encoded as UTF-8
    return value


def _turns(row: object) -> tuple[str, str]:
    """(the human turn, the gpt turn or an empty string)."""
    if not isinstance(row, dict):
        raise Unreadable("wrong types")
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unreadable("wrong types")
    speakers = [_SPEAKERS.get(str(turn.get("from", turn.get("role"))).lower()) for turn in turns]
    if speakers not in (["human"], ["human", "gpt"]):
        raise Unreadable("not one question and one answer")
    human, *answers = (turn.get("value", turn.get("content")) for turn in turns)
    answer = answers[0] if answers else ""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    return _string(human), "" if answer is None else _string(answer)


def _image_paths(row: dict) -> list[str]:
    named = [value for key, value in row.items() if _IMAGE_FIELD.fullmatch(key)]
    found = [value if isinstance(value, list) else [value] for value in named if value]
    if any(paths != found[0] for paths in found):
        raise Unreadable("several image fields")
    if not named and any(_IMAGE_LIKE.search(k) and isinstance(v, str | list | dict) for k, v in row.items()):
        raise Unreadable("image in an unknown field")
    return [_string(path) for path in found[0]] if found else []


# ---- 2. queries ----------------------------------------------------------------------------------------


def _query(
    row: dict, fallback_id: str, resolved: Callable[[str], str], unlabelled: bool, long: bool
) -> Query:
    human, value = _turns(row)
    paths = _image_paths(row)
    if image_marks(human) not in (0, len(paths)):
        raise Unreadable("image marks do not match images")
    question, options, hint = parse_question(human)
    name = fallback_id if row.get("id") is None else row["id"]
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else _string(name)
    asked_type = "choice" if options else _cue(hint)
    gold, answer_type = None, asked_type
    if not unlabelled:
        gold, answer_type = parse_answer(value, options, hint, question, long)
    try:
        images = tuple(map(resolved, paths))
    except ValueError as error:
        raise Unreadable("image path leaves the root") from error
    source = paths[0].split("/")[0] if paths and "/" in paths[0] else ""
    return Query(
        id=name or fallback_id,
        images=images,
        question=question,
        options=options,
        answer=gold,
        answer_type=answer_type,
        source=source,
        asked_type=asked_type,
    )


def _cue(hint: str) -> str:
    cues = {"integer answer": "integer", "floating-point": "float", "list": "math"}
    return next((answer_type for cue, answer_type in cues.items() if cue in hint), "text")


# ---- 3. the reader ------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike,
    root: str | os.PathLike,
    *,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
    unlabelled: bool = False,
    long: bool = False,
) -> tuple[list[Query], Report]:
    """Reads a file in the MathV360K format; invalid rows are dropped and counted by cause.

    Args:
      path: a .json list, .jsonl or .jsonl.gz file.
      root: the folder that image paths are relative to.
      max_pixels: the largest width x height of an image.
      check_images: decode every distinct image once; otherwise only the paths are checked.
      unlabelled: also keep rows without an answer, and set `answer=None` in every query.
      long: also keep rows whose answer is long, which the answer checker cannot judge.

    Returns:
      The queries in the order of the file, with absolute image paths and unique ids; and the report.

    Raises:
      ValueError: the file as a whole is not a JSON list, or its gzip data is damaged; the message names the
        file and the line.
    """
    path, root = os.fspath(path), os.fspath(root)
    report = Report(path)
    stem = os.path.basename(path).split(".")[0]
    found: list[tuple[str, Query]] = []  # (place in the file, query)
    real = functools.cache(os.path.realpath)  # of folders
    resolved = functools.cache(lambda relative: resolve(root, relative, real))
    for index, (place, row) in enumerate(_rows(path)):
        report.rows += 1
        if isinstance(row, Exception):
            report.drop("bad JSON line", place)
            continue
        try:
            query = _query(row, f"{stem}_{index}", resolved, unlabelled, long)
        except Unreadable as error:
            name = row.get("id") if isinstance(row, dict) else None
            report.drop(str(error), f"{place}: {name}" if isinstance(name, str) else place)
        else:
            found.append((f"{place}: {query.id}", query))

    if check_images:
        distinct = sorted({image for _, query in found for image in query.images})
        faults = pictures.faults(distinct, max_pixels=max_pixels)
        usable = []
        for place, query in found:
            if causes := [faults[image] for image in query.images if image in faults]:
                report.drop(causes[0], place)
            else:
                usable.append((place, query))
        found = usable
    queries = _rename(_distinct(found, report), report)
    report.kept = len(queries)
    report.long = sum(
        q.options is None and q.answer is not None and is_long(q.answer, q.answer_type) for q in queries
    )
    return queries, report


def _distinct(found: list[tuple[str, Query]], report: Report) -> list[Query]:
    """Of equal questions about the same images, the first; none if their answers differ, also where the
    same picture has several names."""
    groups: dict[tuple, list[Query]] = {}
    shown = pictures.contents({image for _, query in found for image in query.images})
    keys = [(tuple(shown[image] for image in q.images), q.question, q.options) for _, q in found]
    for key, (_, query) in zip(keys, found, strict=True):
        groups.setdefault(key, []).append(query)
    conflicting = {key for key, group in groups.items() if not all(_same_gold(q, group[0]) for q in group)}
    kept: list[Query] = []
    seen: set[tuple] = set()
    for key, (place, query) in zip(keys, found, strict=True):
        named = (query.images, query.question, query.options)
        if key in conflicting:
            report.drop("conflicting answers", place)
        elif named in seen:
            report.drop("duplicate", place)
        else:
            seen.add(named)
            kept.append(query)
    return kept


def _same_gold(a: Query, b: Query) -> bool:
    if a.answer is None or b.answer is None:
        return a.answer is b.answer
    return a.answer == b.answer or equivalent(a.answer, b.answer, options=a.options)


def _rename(queries: list[Query], report: Report) -> list[Query]:
    """Makes ids unique: a query whose id is taken gets the first free suffix."""
    taken: set[str] = set()
    reserved = {query.id for query in queries}
    unique = []
    for query in queries:
        name, suffix = query.id, 2
        while name in taken or (name != query.id and name in reserved):
            name, suffix = f"{query.id}_{suffix}", suffix + 1
        taken.add(name)
        report.renamed += name != query.id
        unique.append(query if name == query.id else dataclasses.replace(query, id=name))
    return unique
