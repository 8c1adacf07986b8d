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

`id`, the hint, the `Question:` mark and the choices may be absent, and `image` may be a list, or be called
`images`, `image_path` and the like. Choices may be called options, or stand on one line, and an instruction
may follow them. An answer may be a number, or a solution that ends in `The answer is`. The first component of
the image path is the source. About nine rows share an image.

The reader keeps the rows that can be trained on and counts all others by cause; an invalid row never stops
it.
"""

import concurrent.futures
import dataclasses
import gzip
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mstar_jax.answers.check import equivalent
from mstar_jax.answers.values import kind, plain
from mstar_jax.data.images import MAX_PIXELS, ImageError, load_image, resolve
from mstar_jax.data.splits import split
from mstar_jax.structs import Query

__all__ = ["Report", "parse_answer", "parse_question", "read", "split"]

LONGEST_TEXT = 5  # words; a longer text answer cannot be checked by comparison
EXAMPLES = 3  # rows that the report names per cause


@dataclasses.dataclass
class Report:
    """What the reader kept and dropped.

    Attributes:
      path: the file.
      rows: the number of rows, including invalid JSON lines.
      kept: the number of queries returned.
      renamed: the number of kept queries whose id was taken, and which got a suffix `_2`, `_3`, ...
      dropped: the number of rows dropped per cause; with `kept`, they sum to `rows`.
      examples: up to three dropped rows per cause, as `line 7` or `row 7`, with the id if there is one.
    """

    path: str
    rows: int = 0
    kept: int = 0
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
        lines += [f"  renamed {self.renamed:6d}  id was taken"] if self.renamed else []
        for cause, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  dropped {count:6d}  {cause} ({', '.join(self.examples[cause])})")
        return "\n".join(lines)


class _Bad(Exception):
    """A row that is dropped; the message is the cause."""


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
        raise _Bad("wrong types")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise _Bad("wrong types")  # an unpaired surrogate, which cannot be encoded as UTF-8
    return value


def _turns(row: object) -> tuple[str, str]:
    """(the human turn, the gpt turn or an empty string)."""
    if not isinstance(row, dict):
        raise _Bad("wrong types")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Bad("wrong types")
    speakers = [turn.get("from") for turn in turns]
    if speakers not in (["human"], ["human", "gpt"]):
        raise _Bad("not one question and one answer")
    human = _string(turns[0].get("value"))
    answer = turns[1].get("value") if len(turns) == 2 else ""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    return human, "" if answer is None else _string(answer)


def _image_paths(row: dict) -> list[str]:
    named = [value for key, value in row.items() if _IMAGE_FIELD.fullmatch(key)]
    found = [value if isinstance(value, list) else [value] for value in named if value]
    if any(paths != found[0] for paths in found):
        raise _Bad("several image fields")
    if not named and any(_IMAGE_LIKE.search(k) and isinstance(v, str | list | dict) for k, v in row.items()):
        raise _Bad("image in an unknown field")
    return [_string(path) for path in found[0]] if found else []


# ---- 2. question and answer ---------------------------------------------------------------------------

_IMAGE_FIELD = re.compile(r"(?:image|img)s?(?:_?(?:paths?|files?|names?|file_?names?))?", re.IGNORECASE)
_IMAGE_LIKE = re.compile(r"image(?!_?id)|img(?!_?id)|picture|photo", re.IGNORECASE)
_MARK = "<image>"
_HINT = re.compile(r"\s*Hint:[^\n]*?(?=\n|Question:|$)")
_QUESTION = re.compile(r"\s*Question:\s*")
_CHOICES = re.compile(
    r"^[ \t]*(?:answer )?(?:choices|options)[ \t]*:[ \t]*(?=$|\(?[A-Z][).:])"  # at the beginning of a line
    r"|(?<=[.?!:\s])(?:choices|options)[ \t]*:[ \t]*(?=\(?A[).:]\s)",  # or within it, before the first option
    re.MULTILINE | re.IGNORECASE,
)
_INSTRUCTION = re.compile(
    r"(?:^|(?<=[.;])\s+|\n)(?:please\b|answer(?::|\s+(?:with|the|in|using|by)\b)|(?:select|choose|pick|give|"
    r"write|provide|return|respond|reply|output)\b[^\n]*\b(?:answers?|options?|choices?|letters?)\b)",
    re.IGNORECASE,
)
_SAID = re.compile(r"\b(?:the|final) (?:final |correct )?answer(?: is\b|(?=\s*:))\s*:?|####", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}(?!\w)")  # of a language, not a command of LaTeX
_PLAIN_TEX = re.compile(r"\\(?:text|mathrm|begin|end)\s*\{[^{}]*\}")
_SENTENCE = re.compile(r"(?:[\d)\]}$]|[^\W\d_]{4})[.!?]\s+[A-Z][a-z]")  # one ends and another begins
_ANSWER = re.compile(r"\s*(?:(?:the )?answer\b(?: is\b)?\s*:?)?\s*", re.IGNORECASE)


def parse_question(value: str) -> tuple[str, tuple[str, ...] | None, str]:
    """(question, options or None, hint) of a human turn, without image marks.

    Raises:
      _Bad: there is no question, or the lines after `Choices:` are not (A), (B), (C), ...
    """
    text = value.replace(_MARK, "").replace("\r\n", "\n").strip()
    hint = ""
    if m := _HINT.match(text):
        hint, text = m[0].strip(), text[m.end() :]
    if m := _QUESTION.match(text):
        text = text[m.end() :]
    question, options = text, list[str]()
    if m := _CHOICES.search(text):
        question, options = text[: m.start()], _options(text[m.end() :].strip())
    if not question.strip():
        raise _Bad("no question")
    return question.strip(), tuple(options) if options else None, hint


def _options(text: str) -> list[str]:
    """The options of a list, one a line or several, without an instruction that follows the last one."""
    options = list[str]()
    style = r"\(({})\)\s*" if text.startswith("(") else r"({})[).:](?:\s+|$)"
    lines = [line.strip() for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        mark = re.match(style.format("[A-Z]"), line)
        if mark and mark[1] == chr(ord("A") + len(options)):
            options.append(line[mark.end() :])
            while len(options) < 26:  # the next option stands on this line if no further line begins with it
                following = style.format(chr(ord("A") + len(options)))
                mark = re.search(rf"(?<=[\s,;]){following}", options[-1])
                if not mark or any(re.match(following, line) for line in lines[number:]):
                    break
                options[-1:] = [options[-1][: mark.start()].rstrip(" ,;"), options[-1][mark.end() :]]
        elif options and not mark:  # an option with several lines
            options[-1] = f"{options[-1]}\n{line}".strip()
        else:
            raise _Bad("options not lettered (A), (B), ...")
    if found := _INSTRUCTION.search(options[-1]):
        options[-1] = options[-1][: found.start()].rstrip()
    return options


def parse_answer(value: str, options: tuple[str, ...] | None, hint: str = "") -> tuple[str, str]:
    """(gold answer, answer type) of a gpt turn; the gold answer is an option's letter if there are options.

    Raises:
      _Bad: there is no answer, no option equals it, or it is a text of more than LONGEST_TEXT words.
    """
    if said := [m.end() for m in _SAID.finditer(value)]:  # a solution that ends in its answer
        value = value[said[-1] :]
    gold = _ANSWER.sub("", value, count=1).strip()  # all parts are optional, so it matches at the start
    gold = gold[:-1].rstrip() if gold.endswith((".", "。")) else gold
    if not gold:
        raise _Bad("no answer")
    if options:
        letters = [chr(ord("A") + i) for i in range(len(options))]
        letter = gold.strip("()") if len(gold.strip("()")) == 1 else gold.partition(")")[0].strip("(")
        if letter in letters and gold in (letter, f"({letter})", f"({letter}) {options[ord(letter) - 65]}"):
            return letter, "choice"
        texts = [plain(option) for option in options]
        if plain(gold) not in texts:
            raise _Bad("options without gold")
        return letters[texts.index(plain(gold))], "choice"
    answer_type = kind(gold)
    if answer_type == "integer" and "floating-point" in hint:
        answer_type = "float"
    words = gold.split() if answer_type == "text" else _WORD.findall(_PLAIN_TEX.sub("", gold))
    if len(words) > LONGEST_TEXT or _SENTENCE.search(gold):
        raise _Bad("long text answer")
    return gold, answer_type


def _query(row: dict, fallback_id: str, root: str, unlabelled: bool, resolved: dict[str, str]) -> Query:
    human, value = _turns(row)
    paths = _image_paths(row)
    if human.count(_MARK) not in (0, len(paths)):
        raise _Bad("image marks do not match images")
    question, options, hint = parse_question(human)
    name = fallback_id if row.get("id") is None else row["id"]
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else _string(name)
    asked_type = "choice" if options else _cue(hint)
    gold, answer_type = (None, asked_type) if unlabelled else parse_answer(value, options, hint)
    for path in paths:
        if path not in resolved:
            try:
                resolved[path] = resolve(root, path)
            except ValueError as error:
                raise _Bad("image path leaves the root") from error
    source = paths[0].split("/")[0] if paths and "/" in paths[0] else ""
    return Query(
        id=name or fallback_id,
        images=tuple(resolved[path] for path in paths),
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
) -> tuple[list[Query], Report]:
    """Reads a file in the MathV360K format; invalid rows are dropped and counted by cause.

    Args:
      path: a .json list, .jsonl or .jsonl.gz file.
      root: the folder that image paths are relative to.
      max_pixels: the largest width x height of an image.
      check_images: decode every distinct image once; otherwise only the paths are checked.
      unlabelled: also keep rows without an answer, and set `answer=None` in every query.

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
    resolved: dict[str, str] = {}
    for index, (place, row) in enumerate(_rows(path)):
        report.rows += 1
        if isinstance(row, Exception):
            report.drop("bad JSON line", place)
            continue
        try:
            query = _query(row, f"{stem}_{index}", root, unlabelled, resolved)
        except _Bad as error:
            name = row.get("id") if isinstance(row, dict) else None
            report.drop(str(error), f"{place}: {name}" if isinstance(name, str) else place)
        else:
            found.append((f"{place}: {query.id}", query))

    if check_images:
        faults = _image_faults(sorted({image for _, query in found for image in query.images}), max_pixels)
        usable = []
        for place, query in found:
            if causes := [faults[image] for image in query.images if image in faults]:
                report.drop(causes[0], place)
            else:
                usable.append((place, query))
        found = usable
    queries = _rename(_distinct(found, report), report)
    report.kept = len(queries)
    return queries, report


def _image_faults(paths: Sequence[str], max_pixels: int) -> dict[str, str]:
    def fault(path: str) -> str | None:
        try:
            load_image(path, max_pixels=max_pixels)
        except ImageError as error:
            return error.cause
        return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return {path: cause for path, cause in zip(paths, pool.map(fault, paths), strict=True) if cause}


def _distinct(found: list[tuple[str, Query]], report: Report) -> list[Query]:
    """Of equal questions about the same images, the first; none if their answers differ."""
    groups: dict[tuple, list[Query]] = {}
    for _, query in found:
        groups.setdefault((query.images, query.question, query.options), []).append(query)
    conflicting = {key for key, group in groups.items() if not all(_same_gold(q, group[0]) for q in group)}
    kept = []
    for place, query in found:
        key = (query.images, query.question, query.options)
        if key in conflicting:
            report.drop("conflicting answers", place)
        elif query is not groups[key][0]:
            report.drop("duplicate", place)
        else:
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
