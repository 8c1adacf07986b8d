r"""Responses that others have written: rationales to warm up on, and responses whose steps have labels.

A row of rationales says what every other row says (rows.py), but its answer turn reasons:

    {"id": "TabMWP_7", "image": "TabMWP/images/416.png", "conversations": [
       {"from": "human", "value": "<image>\nQuestion: Vijay has $9.00. Does he have enough to buy a book
          about music and a book about hiking?\nChoices:\n(A) yes\n(B) no"},
       {"from": "gpt", "value": "A book about music costs $4.73.\nA book about hiking costs $4.40.\n4.73 +
          4.40 = 9.13, more than 9.00.\nThe answer is B"}]}

A row with columns has the reasoning in `response` and may have the gold answer in `answer`. The gold answer
is that of the same question in the labelled data, or else that of the row's column, or else what the
rationale itself ends in.

A response with labelled steps, one JSON line; a file of any other format says the same in its columns:

    {"id": "7", "image": "TabMWP/images/416.png", "question": "Vijay has $9.00. Does he have enough to buy
     both books?\nChoices:\n(A) yes\n(B) no", "answer": "B",
     "steps": ["A book about music costs $4.73.", "4.73 + 4.40 = 9.23, more than 9.00.", "The answer is B"],
     "labels": [1.0, 0.25, 0.625]}

A label is the chance that the response so far ends well, in 0..1, or `+` or `-`. Steps may also be structs of
both, `{"step": "A book about music costs $4.73.", "score": 1.0}`, or turns with a sign after each, as in
VisualPRM400K (docs/data.md). `answer` may be absent.

Several rows may answer one question. What shows an image of the validation or test split, or
asks one of their questions that have none, is left out.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mstar_jax.data import mathv360k, rows
from mstar_jax.data.mathv360k import Found, Report
from mstar_jax.structs import Query


class Given(NamedTuple):
    """A response that exists.

    Attributes:
      query: the same for all responses to it.
      response: a line for each step.
      labels: of its steps; empty for a rationale.
    """

    query: Query
    response: str
    labels: tuple[float, ...] = ()


def read(
    path: str | os.PathLike,
    root: str | os.PathLike,
    wanted: str,
    *,
    folder: str | os.PathLike,
    columns: rows.Columns = rows.NAMES,
    labelled: Sequence[Query] = (),
    kept_apart: Sequence[Query] = (),
    long: bool = False,
) -> tuple[list[Given], Report]:
    """Reads responses that exist; rows that cannot be used are dropped and counted by cause.

    Args:
      path: a file, a folder of shards or a pattern, see `files.shards`.
      root: the folder that image paths are relative to.
      wanted: `rationales` or `steps`.
      folder: that images inside of the file are written to.
      columns: their names, where they are unusual.
      labelled: queries whose gold answers count, where a row asks one of them: of the same id or question,
        about the same images.
      kept_apart: queries whose images no row may show; of those without images, no row may ask the question.
      long: also keep rows whose answer is long, which the answer checker cannot judge.

    Raises:
      ValueError: a file as a whole cannot be read.
    """
    report = Report(os.fspath(path))
    try:
        each = mathv360k.stream(path, root, folder=folder, columns=columns, wanted=wanted, long=long)
        found = mathv360k.gather(each, report)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    apart = set(mathv360k.keys(kept_apart))
    hidden = {image for images, *_ in apart for image in images}
    known = dict(zip(mathv360k.keys(labelled), labelled, strict=True))
    by_id = {query.id: (key[0], query) for key, query in known.items()}
    groups: dict[mathv360k.Key, list[Found]] = collections.defaultdict(list)
    for key, row in zip(mathv360k.keys([row.query for row in found]), found, strict=True):
        if key in apart or hidden.intersection(key[0]):
            report.drop(f"{'image' if key[0] else 'question'} of the validation or test split", row.place)
            continue
        images, query = by_id.get(row.query.id, ((), None))
        same = known.get(key) or (query if images == key[0] else None)
        if same is not None:
            row, key = row._replace(query=same), (key[0], same.question, same.options)
        groups[key].append(row)
    taken = {query.id for query in labelled}
    tried: dict[str, Iterator[int]] = {}
    out: list[Given] = []
    for key, group in groups.items():
        golds = [row.query for row in group if row.query.answer is not None]
        if not all(mathv360k.same_gold(query, golds[0]) for query in golds):
            for row in group:
                report.drop("conflicting answers", row.place)
            continue
        query = (golds or [group[0].query])[0]
        if key not in known:
            query = dataclasses.replace(query, id=mathv360k.free_name(query.id, taken, tried))
            taken.add(query.id)
        out += [Given(query, row.response, row.labels) for row in group]
    report.kept = len(out)
    return out, report
