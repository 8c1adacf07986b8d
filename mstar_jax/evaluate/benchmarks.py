r"""Readers of the benchmarks that the paper reports, from a local folder with their official files.

    name           files looked for                                           from
    mathvista      testmini-*.parquet, MathVista_MINI.tsv, testmini.json      AI4Math, VLMEvalKit, git
    m3cot          test-*.parquet, test.jsonl                                 LightChen2333/M3CoT
    mmstar(_r)     mmstar.parquet, MMStar.tsv                                 Lin-Chen/MMStar, VLMEvalKit
    mmbench(_r)    MMBench_DEV_EN_V11.tsv                                     VLMEvalKit
    ai2d           AI2D_TEST.tsv, test-*.parquet (labels masked by letters)   VLMEvalKit, lmms-lab/ai2d
    ai2d_no_mask   AI2D_TEST_NO_MASK.tsv, test-*.parquet                      VLMEvalKit, lmms-lab
    mathv360k      test.json: 750 rows of the MathV360K format                the run's own split

`_r` is the reasoning part: without the perception dimensions (LLaVA-CoT, appendix E). One row of MathVista's
parquet, as it is:

    {"pid": "1", "question": "When a spring does work on an object, ... what is d?", "image": "images/1.jpg",
     "decoded_image": {"bytes": b"\xff\xd8...", "path": "1.jpg"}, "choices": None, "unit": None,
     "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
     "metadata": {"category": "math-targeted-vqa", "context": "scientific figure", "grade": "college",
       "img_height": 720, "img_width": 1514, "language": "english", "source": "SciBench", "split": "testmini",
       "skills": ["arithmetic reasoning", "scientific reasoning"], "task": "textbook question answering"},
     "query": "Hint: Please answer the question requiring a floating-point number with one decimal place and
       provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: When a spring does work ..."}

and one of MMBench's TSV, the first rotation of question 10, whose image stands in row 10:

    index    question       hint  A  B  C  D  answer  category              l2-category        image  split
    1000010  How many legs?       6  8  4     B       attribute_comparison  coarse_perception  10     dev
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence

from mstar_jax.data import mathv360k
from mstar_jax.data.images import ImageError
from mstar_jax.data.mathv360k import Report
from mstar_jax.evaluate import tables
from mstar_jax.evaluate.tables import Row, cell, texts
from mstar_jax.structs import Query

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROTATION = 1_000_000  # rotation k of MMBench's question i has the index i + k * ROTATION
MMSTAR_R = ("instance reasoning", "logical reasoning", "science & technology", "math")
MMBENCH_R = ("attribute_reasoning", "logic_reasoning", "relation_reasoning")
# Rows that the official files have; MMBench's with rotations.
SIZES = {"mathvista": 1000, "m3cot": 2318, "mmstar": 1500, "mmstar_r": 1000, "mmbench": 4876}
SIZES |= {"ai2d": 3088, "ai2d_no_mask": 3088, "mathv360k": 750}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      query: as the policy is asked; a hint or a context that the question needs stands before it. A choice's
        gold answer is the letter, whatever the file has.
      prompt: the official prompt's text; the image goes before it.
      groups: per kind of group, e.g. `task`, the ones it belongs to; several for MathVista's `skills`.
      base: id of the question that this is a rotation of; `query.id` where there are no rotations.
      record: the official columns but the image, as VLMEvalKit's table of the data set names them (index,
        question, A, B, ..., answer, category, l2-category): with a `prediction` it can be scored there.
      unit: unit of the answer; also in the question.
    """

    query: Query
    prompt: str
    groups: Mapping[str, tuple[str, ...]]
    base: str
    record: Mapping[str, str]
    unit: str = ""


class _Bad(Exception):
    """A row to drop; its text is the cause."""


# ---- 1. what the benchmarks have in common ------------------------------------------------------------


def _record(row: Row, more: Row) -> dict[str, str]:
    """Columns as text, those of `metadata` among them; lists as Python writes them."""
    flat: Row = {}
    for name, value in row.items():
        flat |= value if isinstance(value, dict) else {name: value}
    flat = {k: v for k, v in (flat | more).items() if k not in tables.IMAGES}
    return {k: repr(v) if isinstance(v, list) else cell(flat, k) for k, v in flat.items()}


def _columns(options: Sequence[str]) -> Row:
    return dict(zip(LETTERS, options, strict=False))


def _letter(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer names, as letter or else as text (of equal texts the first)."""
    answer = answer if answer in options else answer.strip()
    if not options or len(options) > len(LETTERS):
        raise _Bad("no options" if not options else "too many options")
    if not answer:
        raise _Bad("no answer")
    if answer in list(LETTERS[: len(options)]):
        return answer
    if answer not in options:
        raise _Bad("options without gold")
    return LETTERS[options.index(answer)]


def _lines(options: Sequence[str], style: str) -> str:
    return "".join(style.format(*pair) for pair in zip(LETTERS, options, strict=False))


def _item(
    name: str, id: str, question: str, answer: str, options: Sequence[str], row: Row, columns: Row, **more
) -> Item:
    if not id:
        raise _Bad("no id")
    if not question.strip():
        raise _Bad("no question")
    query = Query(id, (), question.strip(), tuple(options) or None, answer, more.pop("kind", "choice"))
    query = dataclasses.replace(
        query, source=more.pop("source", "") or name, precision=more.pop("precision", None)
    )
    groups = {key: (v,) if isinstance(v, str) else tuple(v) for key, v in more.pop("groups").items()}
    groups = {key: tuple(v for v in values if v) for key, values in groups.items()}
    return Item(query, groups=groups, record=_record(row, columns), **({"base": id} | more))


# ---- 2. MathVista and MathV360K -----------------------------------------------------------------------

TASKS = {
    "figure question answering": "FQA",
    "geometry problem solving": "GPS",
    "math word problem": "MWP",
    "textbook question answering": "TQA",
    "visual question answering": "VQA",
}
SOURCES = {  # MathVista's data/source.json: which task a source belongs to
    "FQA": "ChartQA DVQA DocVQA FigureQA IQTest MapQA PaperQA PlotQA",
    "GPS": "GEOS GeoQA+ Geometry3K UniGeo",
    "MWP": "CLEVR-Math IconQA TabMWP",
    "TQA": "AI2D FunctionQA SciBench ScienceQA TQA TheoremQA",
    "VQA": "A-OKVQA KVQA PMC-VQA ParsVQA-Caps Super-CLEVR TextVQA VQA-AS VQA-RAD VQA2.0 VizWiz",
}
_HINTED = re.compile(r"\s*Hint:[^\n]*\n\s*Question:\s*(.*?)\s*(?:\nChoices:\s*\n.*)?", re.DOTALL)
_UNIT = " (Unit: {})"


def _hinted(question: str, options: Sequence[str], answer_type: str, precision: int | None = None) -> str:
    """MathVista's stored query: hint, question, choices (evaluation/build_query.py)."""
    floating = "requiring a floating-point number {}and provide the final value, e.g., {},"
    hints = {
        "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
        "float": floating.format("", "1.2, 1.3, 1.4"),
        "float1": floating.format("with one decimal place ", "1.2, 1.3, 1.4"),
        "float2": floating.format("with two decimal places ", "1.23, 1.34, 1.45"),
        "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
        "[1.2, 1.3, 1.4],",
    }
    hint = "and provide the correct option letter, e.g., A, B, C, D,"
    if not options:
        default = hints.get(answer_type, "and provide the final answer")
        hint = hints.get(f"{answer_type}{precision}", default)
    choices = "\nChoices:\n" + _lines(options, "({}) {}\n").rstrip("\n") if options else ""
    return f"Hint: Please answer the question {hint} at the end.\nQuestion: {question}{choices}"


def _mathvista(name: str, row: Row, number: int) -> Item:
    found = row.get("metadata")
    about: Row = found if isinstance(found, dict) else row
    question, query, unit = cell(row, "question"), cell(row, "query"), cell(row, "unit")
    if m := _HINTED.fullmatch(question):  # VLMEvalKit's question is the query
        question, query = m[1], question
    elif unit:
        question += _UNIT.format(unit)
    kind, answer, options = cell(row, "answer_type"), cell(row, "answer"), texts(row.get("choices"))
    choice = cell(row, "question_type") == "multi_choice"
    options = options if choice else []
    letter = ""
    if choice:  # the gold answer is a text, in VLMEvalKit's table with the letter beside it
        letter = _letter(cell(row, "answer_option", "answer"), options)
        letter = LETTERS[options.index(answer)] if answer in options else letter
    if not answer:
        raise _Bad("no answer")
    places = re.fullmatch(r"(\d)(?:\.0*)?", cell(row, "precision"))
    precision = int(places[1]) if places else None
    query = query or _hinted(question, options, kind, precision)
    kinds = {"integer": "integer", "float": "float", "list": "math"}
    pid = cell(row, "pid", "index").strip()
    groups: Row = {"task": TASKS.get(cell(about, "task"), cell(about, "task"))}
    groups |= {key: cell(row, key) for key in ("question_type", "answer_type")}
    groups |= {key: cell(about, key) for key in ("language", "source", "category", "context", "grade")}
    skills = texts(about.get("skills"))
    columns = {"index": pid, "question": query, "choices": options, "answer_option": letter, "skills": skills}
    more = {"precision": precision, "unit": unit, "groups": groups | {"skills": skills}, "prompt": query}
    more |= {"kind": "choice" if choice else kinds.get(kind, "text"), "source": cell(about, "source")}
    return _item(name, pid, question, letter or answer, options, row, columns | _columns(options), **more)


def _mathv360k(path: str, root: str) -> tuple[list[Item], Report]:
    queries, report = mathv360k.read(path, root)
    tasks = {source: task for task, sources in SOURCES.items() for source in sources.split()}
    items = []
    for query in queries:
        groups = {"task": tasks.get(query.source, "other"), "source": query.source}
        groups |= {"answer_type": query.answer_type}
        options = query.options or ()
        columns = {"index": query.id, "question": query.question, "answer": query.answer, **_columns(options)}
        prompt = _hinted(query.question, options, query.answer_type)
        members = {key: (value,) for key, value in groups.items()}
        items.append(Item(query, prompt, members, query.id, _record(columns, groups)))
    return items, report


# ---- 3. M3CoT -----------------------------------------------------------------------------------------


def _m3cot(name: str, row: Row, number: int) -> Item:
    question, context, options = cell(row, "question"), cell(row, "context"), texts(row.get("choices"))
    letter = _letter(cell(row, "answer"), options)
    before = f"[Context]\n{context}\n\n" if context else ""
    choices = _lines(options, "({}) {}\n").rstrip("\n")
    id = cell(row, "id").strip()
    prompt = f"{before}[Question]\n{question}\n[Choices]\n{choices}"
    groups = {key: cell(row, key) for key in ("domain", "topic")}
    columns = {"index": id, "hint": context, "choices": options, "answer": letter, **_columns(options)}
    asked = f"{context}\n{question}" if context else question
    return _item(name, id, asked, letter, options, row, columns, prompt=prompt, groups=groups)


# ---- 4. MMStar, MMBench, AI2D: VLMEvalKit's table -----------------------------------------------------

_OPTIONS = re.compile(r"(?:Options|Choices)\s*[:：]\s*(?=\(?A\s?[:：.)])", re.IGNORECASE)
_FIRST = re.compile(r"(\(?)A\s?([:：.)])")


def parse_options(text: str) -> tuple[str, list[str]]:
    """(question, options) of MMStar's `...?\\nOptions: A: yes, B: no`; no options where there are none.

    Option n + 1 begins where its letter follows a comma, a semicolon or a line's end, written as `A` was.
    """
    starts = list(_OPTIONS.finditer(text))
    if not starts:
        return text, []
    rest, options = text[starts[-1].end() :], list[str]()
    first = _FIRST.match(rest)
    assert first is not None  # as _OPTIONS looks ahead for it
    rest = rest[first.end() :]
    for letter in LETTERS[1:]:
        label = rf"{re.escape(first[1])}{letter}\s?{re.escape(first[2])}"
        m = re.search(rf"(?:[,;\n]\s*){label}", rest) or re.search(rf"\s{label}", rest)
        if not m:
            break
        options.append(rest[: m.start()].strip(" \n,;"))
        rest = rest[m.end() :]
    return text[: starts[-1].start()].rstrip(), [*options, rest.strip()]


def _lettered(name: str, row: Row, number: int) -> Item:
    question, hint, answer = cell(row, "question"), cell(row, "hint"), cell(row, "answer").strip()
    options = texts(row.get("options"))
    if options and answer.isdecimal() and len(answer) < 3:  # lmms-lab/ai2d counts from 0
        answer = LETTERS[int(answer)] if int(answer) < len(LETTERS) else answer
    elif not options:
        options = [cell(row, letter) for letter in LETTERS if letter in row]
        while options and not options[-1]:
            options.pop()
        if not all(options):
            raise _Bad("an option is missing before others")
        if not options and name.startswith("mmstar"):
            question, options = parse_options(question)
    letter = _letter(answer, options)
    before = f"Hint: {hint}\n" if hint else ""
    choices = "Options:\n" + _lines(options, "{}. {}\n")
    ask = "Please select the correct answer from the options above. \n"
    index = cell(row, "index").strip() or str(number)
    base = index
    if name.startswith("mmbench"):
        if not index.isdecimal() or len(index) > 18:
            raise _Bad("index is not a number")
        base = str(int(index) % ROTATION)
    groups = {"category": cell(row, "category")}
    groups["l2_category"] = cell(row, "l2-category", "l2_category", "L2-category")
    columns = {"index": index, "question": question, "answer": letter, **_columns(options)}
    columns["l2-category"] = groups["l2_category"]
    prompt = f"{before}Question: {question}\n{choices}{ask}"
    asked = f"{hint}\n{question}" if hint else question
    more = {"source": cell(row, "source"), "prompt": prompt, "groups": groups, "base": base}
    return _item(name, index, asked, letter, options, row, columns, **more)


# ---- 5. the reader ------------------------------------------------------------------------------------

_Builder = Callable[[str, Row, int], Item]
_MATHVISTA = ("testmini-*.parquet", "MathVista_MINI.tsv", "annot_testmini.json", "testmini.json")
_MMSTAR = ("mmstar.parquet", "MMStar.tsv", "val-*.parquet")
_MMBENCH = ("MMBench_DEV_EN_V11.tsv",)
_SETS: dict[str, tuple[tuple[str, ...], _Builder | None]] = {
    "mathvista": (_MATHVISTA, _mathvista),
    "m3cot": (("test-*.parquet", "test.jsonl"), _m3cot),
    "mmstar": (_MMSTAR, _lettered),
    "mmstar_r": (_MMSTAR, _lettered),
    "mmbench": (_MMBENCH, _lettered),
    "mmbench_r": (_MMBENCH, _lettered),
    "ai2d": (("AI2D_TEST.tsv", "test-*.parquet"), _lettered),
    "ai2d_no_mask": (("AI2D_TEST_NO_MASK.tsv", "test-*.parquet"), _lettered),
    "mathv360k": (("mathv360k_test.json", "test.json", "test.jsonl", "test.jsonl.gz"), None),
}
NAMES = tuple(_SETS)
_PARTS = {"mmstar_r": ("category", MMSTAR_R), "mmbench_r": ("l2_category", MMBENCH_R)}


def read(name: str, folder: str | os.PathLike, images: str | os.PathLike) -> tuple[list[Item], Report]:
    """Reads a benchmark; broken rows are dropped and counted by cause.

    A row with the id of an earlier one is dropped too, and so is a rotation without its question.

    Args:
      name: one of NAMES.
      folder: where the official files are, or one such file.
      images: the folder that images out of tables are written to; made where it does not exist.

    Returns:
      The items in the order of the files, and the report. `SIZES[name]` says how many there should be.

    Raises:
      FileNotFoundError: none of the files is there; says which were looked for.
      ValueError: an unknown name, or a file that cannot be read at all.
      ImportError: a parquet file, and pyarrow is not installed.
    """
    if name not in _SETS:
        raise ValueError(f"benchmark {name!r}: there are {', '.join(NAMES)}")
    patterns, build = _SETS[name]
    paths = tables.find(folder, patterns)
    if build is None:
        return _mathv360k(paths[0], os.path.dirname(paths[0]))
    report = Report(", ".join(paths))
    found: dict[str, tuple[str, Item]] = {}
    for number, (place, row, picture) in enumerate(tables.load(paths, os.fspath(images))):
        report.rows += 1
        try:
            if isinstance(row, Exception):
                raise _Bad("broken row")
            item = build(name, row, number)
            place = f"{place}: {item.query.id}"
            if name in _PARTS and item.groups[_PARTS[name][0]] not in [(each,) for each in _PARTS[name][1]]:
                raise _Bad("not a reasoning question")
            if isinstance(picture, ImageError):
                raise _Bad(picture.cause)
            if item.query.id in found:
                raise _Bad("duplicate id")
        except _Bad as error:
            report.drop(str(error), place)
            continue
        query = dataclasses.replace(item.query, images=(picture,))
        found[query.id] = place, dataclasses.replace(item, query=query)
    items = []
    for place, item in found.values():
        if item.base in found:
            items.append(item)
        else:
            report.drop("rotation without its question", place)
    report.kept = len(items)
    return items, report
