r"""Reader of the pool of training queries: MathV360K's rows, and others that say the same.

A row of MathV360K:

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
first component of the image path is the source. About nine rows share an image. Other shapes of rows are in
rows.py, formats of files in files.py.

The reader keeps the rows that can be trained on and counts all others by cause; an invalid row never stops
it. Images inside of a file are written to a folder, once, for the processes that decode them read files.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from mstar_jax.answers.check import equivalent
from mstar_jax.data import files, labels, pictures, prompts, rows
from mstar_jax.data.images import MAX_PIXELS, ImageError, resolve
from mstar_jax.data.splits import split
from mstar_jax.data.turns import Unreadable, is_long, parse_answer, parse_question
from mstar_jax.structs import Query

__all__ = ["Report", "read", "split"]

EXAMPLES = 3  # rows that the report names per cause
OPTIONAL = ("questions", "steps")  # what is wanted of rows that need no answer
_LETTER = re.compile(r"\s*\(?[A-Ha-h]\)?\.?\s*")  # of an option
TOGETHER = 16  # rows whose images are in memory together


@dataclasses.dataclass
class Report:
    """What the reader kept and dropped.

    Attributes:
      path: the file, folder or pattern.
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


# ---- 1. queries ----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A row that can be used.

    Attributes:
      place: where it is, with its id.
      query: with absolute image paths; its id may be another one's too.
      names: what the row calls its images; two copies of a picture may have two names.
      response: what the row answers, in full.
      labels: of its steps, where they are wanted.
    """

    place: str
    query: Query
    names: tuple[str, ...]
    response: str
    labels: tuple[float, ...] = ()


class Dropped(NamedTuple):
    """A row that cannot be used, and why."""

    place: str
    cause: str


def _query(row: rows.Row, name: str, paths: Sequence[str], wanted: str, long: bool) -> Query:
    """The query of a row whose images are at these paths; `name` is its id if it has none."""
    question, options, hint = parse_question(row.question)
    options = options or row.options
    name = name if row.id is None else rows.text(row.id) or name
    asked_type = "choice" if options else _cue(hint)
    gold, answer_type = None, asked_type
    said = {"answers": row.answer, "rationales": row.gold or row.response, "steps": row.gold}.get(wanted, "")
    if row.unread and not options and _LETTER.fullmatch(said):
        raise Unreadable("options in an unknown field")
    if said or wanted not in OPTIONAL:
        gold, answer_type = parse_answer(said, options, hint, row.question, long)
    first = row.images[0].path.split("/") if row.images else []
    return Query(
        id=name,
        images=tuple(paths),
        question="\n\n".join([*_told(row.earlier), question]),
        options=options,
        answer=gold,
        answer_type=answer_type,
        source=first[0] if len(first) > 1 and first[0] else row.source,
        asked_type=asked_type,
    )


def _told(turns: Sequence[str]) -> Iterator[str]:
    """The turns before the question, in front of it."""
    for asked, answer in zip(turns[::2], turns[1::2], strict=True):
        question, options, _ = parse_question(asked)
        yield f"Question: {question}{prompts.listed(options)}\nAnswer: {answer.strip()}"


def _cue(hint: str) -> str:
    cues = {"integer answer": "integer", "floating-point": "float", "list": "math"}
    return next((answer_type for cue, answer_type in cues.items() if cue in hint), "text")


# ---- 2. row by row ------------------------------------------------------------------------------------


def stream(
    path: str | os.PathLike,
    root: str | os.PathLike,
    *,
    folder: str | os.PathLike = "",
    columns: rows.Columns = rows.NAMES,
    max_pixels: int = MAX_PIXELS,
    wanted: str = "answers",
    long: bool = False,
) -> Iterator[Found | Dropped]:
    """Reads rows one by one; the images inside of a file are checked and written, and of others the paths.

    Args:
      path: a file, a folder of shards or a pattern, see `files.shards`.
      root: the folder that image paths are relative to.
      folder: that images inside of a file are written to.
      columns: their names, where they are unusual.
      max_pixels: the largest width x height of an image.
      wanted: `answers`; `questions` alone, so that no query has an answer; `rationales`, whose answers are
        those of a column, or else what they end in; or `steps` with labels, whose answers may be absent.
      long: also keep rows whose answer is long, which the answer checker cannot judge.

    Raises:
      ValueError: a file as a whole cannot be read, or has images inside and there is no folder for them; or
        no row has a column that was named.
    """
    root = os.fspath(root)
    absent = {name for role in rows.OPTIONAL if (name := getattr(columns, role))}
    real = functools.cache(os.path.realpath)  # of folders
    resolved = functools.cache(lambda relative: resolve(root, relative, real))

    def placed(image: rows.Shown) -> str | ImageError:
        if image.data is None:
            try:
                return resolved(image.path)
            except ValueError as error:
                return ImageError("image path leaves the root", str(error))
        if not folder:
            raise ValueError(f"{path} holds images, and there is no folder to write them to")
        try:
            return pictures.write(image.data, os.fspath(folder), max_pixels=max_pixels)
        except ImageError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(pictures.THREADS) as pool:
        records = files.all_records(files.shards(os.fspath(path)))
        while some := list(itertools.islice(records, TOGETHER)):
            if wanted == "steps":
                some = [(f, n, place, _unrolled(record, columns)) for f, n, place, record in some]
            parsed = [_parsed(record, columns) for *_, record in some]
            absent = absent.difference(*(record for *_, record in some if isinstance(record, dict)))
            images = [image for row in parsed if isinstance(row, rows.Row) for image in row.images]
            held = any(image.data is not None for image in images)
            paths = iter(pool.map(placed, images) if held else map(placed, images))
            for (file, number, place, record), row in zip(some, parsed, strict=True):
                given = f"{os.path.basename(file).split('.')[0]}_{number}"
                try:
                    if isinstance(row, Unreadable):
                        raise row
                    own = list(itertools.islice(paths, len(row.images)))
                    there = [each for each in own if isinstance(each, str)]
                    query = _query(row, given, there, wanted, long)
                    if faults := [each.cause for each in own if isinstance(each, ImageError)]:
                        raise Unreadable(faults[0])
                    names = [s.path if s.data and s.path else at for s, at in zip(row.images, there)]
                    response, values = row.response, tuple[float, ...]()
                    if wanted == "steps" and isinstance(record, dict):
                        response, values = labels.labelled_steps(record, columns)
                    yield Found(f"{place}: {query.id}", query, tuple(names), response, values)
                except Unreadable as error:
                    name = record.get("id") if isinstance(record, dict) else None
                    yield Dropped(f"{place}: {name}" if isinstance(name, str) else place, str(error))
    if absent:
        raise ValueError(f"{path}: no row has a column {sorted(absent)[0]!r}; see data.columns")


def _parsed(record: object, columns: rows.Columns) -> rows.Row | Unreadable:
    try:
        return rows.parse(record, columns)
    except Unreadable as error:
        return error


def _unrolled(record: object, columns: rows.Columns) -> object:
    try:
        return labels.unrolled(record, columns)
    except Unreadable as error:
        return error


Key = tuple[tuple[str, ...], str, tuple[str, ...] | None]  # contents of images, question, options


# ---- 3. the reader ------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike,
    root: str | os.PathLike,
    *,
    folder: str | os.PathLike = "",
    columns: rows.Columns = rows.NAMES,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
    unlabelled: bool = False,
    long: bool = False,
) -> tuple[list[Query], Report]:
    """Reads training queries; invalid rows are dropped and counted by cause.

    Args:
      path: a file, a folder of shards or a pattern, see `files.shards`.
      root: the folder that image paths are relative to.
      folder: that images inside of a file are written to.
      columns: their names, where they are unusual.
      max_pixels: the largest width x height of an image.
      check_images: decode every distinct image file once; otherwise only the paths are checked.
      unlabelled: also keep rows without an answer, and set `answer=None` in every query.
      long: also keep rows whose answer is long, which the answer checker cannot judge.

    Returns:
      The queries in the order of the file, with absolute image paths and unique ids; and the report.

    Raises:
      OSError: there is no such file.
      ValueError: a file as a whole cannot be read, such as JSON that is no list; the message names the file
        and the place in it.
    """
    report = Report(os.fspath(path))
    wanted = "questions" if unlabelled else "answers"
    each = stream(path, root, folder=folder, columns=columns, max_pixels=max_pixels, wanted=wanted, long=long)
    found = gather(each, report, max_pixels=max_pixels, check_images=check_images)
    queries = _rename(_distinct(found, report), report)
    report.kept = len(queries)
    report.long = sum(
        q.options is None and q.answer is not None and is_long(q.answer, q.answer_type) for q in queries
    )
    return queries, report


def gather(
    each: Iterable[Found | Dropped],
    report: Report,
    *,
    max_pixels: int = MAX_PIXELS,
    check_images: bool = True,
) -> list[Found]:
    """The rows of a `stream` whose images can be used; the others are counted in the report."""
    found = []
    for row in each:
        report.rows += 1
        if isinstance(row, Found):
            found.append(row)
        else:
            report.drop(row.cause, row.place)
    if not check_images:
        return found
    distinct = sorted({image for row in found for image in row.query.images})
    faults = pictures.faults(distinct, max_pixels=max_pixels)
    usable = []
    for row in found:
        if causes := [faults[image] for image in row.query.images if image in faults]:
            report.drop(causes[0], row.place)
        else:
            usable.append(row)
    return usable


def keys(queries: Sequence[Query]) -> list[Key]:
    """What makes two queries the same one: what their images show, and the text."""
    shown = pictures.contents({image for query in queries for image in query.images})
    return [(tuple(shown[image] for image in q.images), q.question, q.options) for q in queries]


def _distinct(found: list[Found], report: Report) -> list[Query]:
    """Of equal questions about the same images, the first; none if their answers differ, also where the
    same picture has several names."""
    groups: dict[Key, list[Query]] = {}
    same = keys([row.query for row in found])
    for key, row in zip(same, found, strict=True):
        groups.setdefault(key, []).append(row.query)
    conflicting = {key for key, group in groups.items() if not all(same_gold(q, group[0]) for q in group)}
    kept: list[Query] = []
    seen: set[tuple[Key, tuple[str, ...]]] = set()
    for key, row in zip(same, found, strict=True):
        named = (key, row.names)
        if key in conflicting:
            report.drop("conflicting answers", row.place)
        elif named in seen:
            report.drop("duplicate", row.place)
        else:
            seen.add(named)
            kept.append(row.query)
    return kept


def same_gold(a: Query, b: Query) -> bool:
    """Whether two queries have the same answer, or none."""
    if a.answer is None or b.answer is None:
        return a.answer is b.answer
    return a.answer == b.answer or equivalent(a.answer, b.answer, options=a.options)


def _rename(queries: list[Query], report: Report) -> list[Query]:
    """Makes ids unique: a query whose id is taken gets the first free suffix."""
    seen: set[str] = set()
    taken = {query.id for query in queries}
    tried: dict[str, Iterator[int]] = {}
    unique = []
    for query in queries:
        name = query.id if query.id not in seen else free_name(query.id, taken, tried)
        seen.add(name)
        taken.add(name)
        report.renamed += name != query.id
        unique.append(query if name == query.id else dataclasses.replace(query, id=name))
    return unique


def free_name(name: str, taken: Collection[str], tried: dict[str, Iterator[int]]) -> str:
    """The name, or the first free one with a suffix `_2`, `_3`, ...

    Args:
      name: the wanted one.
      taken: those that are not free; from call to call there may only be more.
      tried: of each name, the suffixes from which the next call goes on: a file may give all rows one id.
    """
    more = (f"{name}_{number}" for number in tried.setdefault(name, itertools.count(2)))
    return next(each for each in itertools.chain([name], more) if each not in taken)
