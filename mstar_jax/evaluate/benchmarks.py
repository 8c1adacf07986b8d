r"""Readers for benchmarks, from a local folder with their official files: those that the paper reports, and
with exams.py five more.

    name           files looked for                                           from
    mathvista      testmini-*.parquet, MathVista_MINI.tsv, testmini.json      AI4Math, VLMEvalKit, git
    m3cot          test-*.parquet, test.jsonl                                 LightChen2333/M3CoT
    mmstar(_r)     mmstar.parquet, MMStar.tsv                                 Lin-Chen/MMStar, VLMEvalKit
    mmbench(_r)    MMBench_DEV_EN_V11.tsv                                     VLMEvalKit
    ai2d           AI2D_TEST.tsv, test-*.parquet (labels masked by letters)   VLMEvalKit, lmms-lab/ai2d
    ai2d_no_mask   AI2D_TEST_NO_MASK.tsv, test-*.parquet                      VLMEvalKit, lmms-lab
    mathv360k      test.json: 750 rows of the MathV360K format                the run's own split

`_r` is the reasoning part, without the perception dimensions (LLaVA-CoT, appendix E). A row of MathVista's
parquet file:

    {"pid": "1", "question": "When a spring does work on an object, ... what is d?", "image": "images/1.jpg",
     "decoded_image": {"bytes": b"\xff\xd8...", "path": "1.jpg"}, "choices": None, "unit": None,
     "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
     "metadata": {"category": "math-targeted-vqa", "context": "scientific figure", "grade": "college",
       "img_height": 720, "img_width": 1514, "language": "english", "source": "SciBench", "split": "testmini",
       "skills": ["arithmetic reasoning", "scientific reasoning"], "task": "textbook question answering"},
     "query": "Hint: Please answer the question requiring a floating-point number with one decimal place and
       provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: When a spring does work ..."}

and a row of MMBench's TSV, the first rotation of question 10, whose image is in row 10:

    index    question       hint  A  B  C  D  answer  category              l2-category        image  split
    1000010  How many legs?       6  8  4     B       attribute_comparison  coarse_perception  10     dev
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence

from mstar_jax.data import mathv360k
from mstar_jax.data.images import ImageError
from mstar_jax.data.mathv360k import Report
from mstar_jax.evaluate import exams, tables
from mstar_jax.evaluate.items import (
    Bad,
    Item,
    gold_letter,
    make_groups,
    make_query,
    official_record,
    option_columns,
    option_lines,
)
from mstar_jax.evaluate.tables import LETTERS, Record, cell, texts

ROTATION = 1_000_000  # rotation k of question i of MMBench has index i + k * ROTATION
MMSTAR_R = ("instance reasoning", "logical reasoning", "science & technology", "math")
MMBENCH_R = ("attribute_reasoning", "logic_reasoning", "relation_reasoning")
# Rows in the official files; for MMBench including the rotations.
SIZES = {"mathvista": 1000, "m3cot": 2318, "mmstar": 1500, "mmstar_r": 1000, "mmbench": 4876}
SIZES |= {"ai2d": 3088, "ai2d_no_mask": 3088, "mathv360k": 750}
SIZES |= {"mathverse": 3940, "mathvision": 3040, "wemath": 1740, "mmmu": 900, "geometry3k": 601}


# ---- 1. MathVista and MathV360K -----------------------------------------------------------------------

TASKS = {
    "figure question answering": "FQA",
    "geometry problem solving": "GPS",
    "math word problem": "MWP",
    "textbook question answering": "TQA",
    "visual question answering": "VQA",
}
SOURCES = {  # the sources of each task, from MathVista's data/source.json
    "FQA": "ChartQA DVQA DocVQA FigureQA IQTest MapQA PaperQA PlotQA",
    "GPS": "GEOS GeoQA+ Geometry3K UniGeo",
    "MWP": "CLEVR-Math IconQA TabMWP",
    "TQA": "AI2D FunctionQA SciBench ScienceQA TQA TheoremQA",
    "VQA": "A-OKVQA KVQA PMC-VQA ParsVQA-Caps Super-CLEVR TextVQA VQA-AS VQA-RAD VQA2.0 VizWiz",
}
_HINTED = re.compile(r"\s*Hint:[^\n]*\n\s*Question:\s*(.*?)\s*(?:\nChoices:\s*\n.*)?", re.DOTALL)
_UNIT = " (Unit: {})"


def _hinted(question: str, options: Sequence[str], answer_type: str, precision: int | None = None) -> str:
    """MathVista's official query: hint, question, choices (evaluation/build_query.py)."""
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
    choices = "\nChoices:\n" + option_lines(options, "({}) {}\n").rstrip("\n") if options else ""
    return f"Hint: Please answer the question {hint} at the end.\nQuestion: {question}{choices}"


def _mathvista(name: str, row: Record, number: int) -> Item:
    found = row.get("metadata")
    about: Record = found if isinstance(found, dict) else row
    question = cell(row, "question")
    prompt = cell(row, "query")
    unit = cell(row, "unit")
    if m := _HINTED.fullmatch(question):  # VLMEvalKit's question is the whole prompt
        prompt = question
        question = m[1]
    elif unit:
        question += _UNIT.format(unit)
    kind = cell(row, "answer_type")
    answer = cell(row, "answer")
    choice = cell(row, "question_type") == "multi_choice"
    options = texts(row.get("choices")) if choice else []
    letter = ""
    if choice:  # the gold answer is a text; VLMEvalKit's table also has the letter
        letter = gold_letter(cell(row, "answer_option", "answer"), options)
        letter = LETTERS[options.index(answer)] if answer in options else letter
    if not answer:
        raise Bad("no answer")
    places = re.fullmatch(r"(\d)(?:\.0*)?", cell(row, "precision"))
    precision = int(places[1]) if places else None
    prompt = prompt or _hinted(question, options, kind, precision)
    kinds = {"integer": "integer", "float": "float", "list": "math"}
    pid = cell(row, "pid", "index").strip()
    skills = texts(about.get("skills"))
    columns = {
        "index": pid,
        "question": prompt,
        "choices": options,
        "answer_option": letter,
        "skills": skills,
    }
    source = cell(about, "source")
    answer_type = "choice" if choice else kinds.get(kind, "text")
    groups = make_groups(
        task=TASKS.get(cell(about, "task"), cell(about, "task")),
        question_type=cell(row, "question_type"),
        answer_type=kind,
        language=cell(about, "language"),
        source=source,
        category=cell(about, "category"),
        context=cell(about, "context"),
        grade=cell(about, "grade"),
        skills=skills,
    )
    query = make_query(
        pid, question, letter or answer, options, source=source or name, kind=answer_type, precision=precision
    )
    return Item(query, prompt, groups, pid, official_record(row, columns | option_columns(options)), unit)


def _mathv360k(path: str, root: str) -> tuple[list[Item], Report]:
    queries, report = mathv360k.read(path, root)
    tasks = {source: task for task, sources in SOURCES.items() for source in sources.split()}
    items = []
    for query in queries:
        task = tasks.get(query.source, "other")
        about = {"task": task, "source": query.source, "answer_type": query.answer_type}
        groups = {kind: (group,) for kind, group in about.items()}
        options = query.options or ()
        columns = {
            "index": query.id,
            "question": query.question,
            "answer": query.answer,
            **option_columns(options),
        }
        prompt = _hinted(query.question, options, query.answer_type)
        items.append(Item(query, prompt, groups, query.id, official_record(columns, about)))
    return items, report


# ---- 2. M3CoT -----------------------------------------------------------------------------------------


def _m3cot(name: str, row: Record, number: int) -> Item:
    question = cell(row, "question")
    context = cell(row, "context")
    options = texts(row.get("choices"))
    letter = gold_letter(cell(row, "answer"), options)
    before = f"[Context]\n{context}\n\n" if context else ""
    choices = option_lines(options, "({}) {}\n").rstrip("\n")
    id = cell(row, "id").strip()
    columns = {"index": id, "hint": context, "choices": options, "answer": letter, **option_columns(options)}
    asked = f"{context}\n{question}" if context else question
    query = make_query(id, asked, letter, options, source=name)
    prompt = f"{before}[Question]\n{question}\n[Choices]\n{choices}"
    groups = make_groups(domain=cell(row, "domain"), topic=cell(row, "topic"))
    return Item(query, prompt, groups, id, official_record(row, columns))


# ---- 3. MMStar, MMBench, AI2D: VLMEvalKit's table -----------------------------------------------------


def _lettered(name: str, row: Record, number: int) -> Item:
    question = cell(row, "question")
    hint = cell(row, "hint")
    answer = cell(row, "answer").strip()
    options = texts(row.get("options"))
    if options and answer.isdecimal() and len(answer) < 3:  # lmms-lab/ai2d counts from 0
        answer = LETTERS[int(answer)] if int(answer) < len(LETTERS) else answer
    elif not options:
        options = [cell(row, letter) for letter in LETTERS if letter in row]
        while options and not options[-1]:
            options.pop()
        if not all(options[name.startswith("ai2d") :]):  # a row of AI2D has an empty option A
            raise Bad("an option is missing before others")
        if not options and name.startswith("mmstar"):
            question, options = tables.parse_options(question)
    letter = gold_letter(answer, options)
    before = f"Hint: {hint}\n" if hint else ""
    choices = "Options:\n" + "".join(f"{x}. {text}\n" for x, text in zip(LETTERS, options) if text)
    ask = "Please select the correct answer from the options above. \n"
    index = cell(row, "index").strip() or str(number)
    base = index
    if name.startswith("mmbench"):
        if not index.isdecimal() or len(index) > 18:
            raise Bad("index is not a number")
        base = str(int(index) % ROTATION)
    l2_category = cell(row, "l2-category", "l2_category", "L2-category")
    columns = {"index": index, "question": question, "answer": letter, **option_columns(options)}
    columns["l2-category"] = l2_category
    asked = f"{hint}\n{question}" if hint else question
    query = make_query(index, asked, letter, options, source=cell(row, "source") or name)
    prompt = f"{before}Question: {question}\n{choices}{ask}"
    groups = make_groups(category=cell(row, "category"), l2_category=l2_category)
    return Item(query, prompt, groups, base, official_record(row, columns))


# ---- 4. the reader ------------------------------------------------------------------------------------

_Builder = Callable[[str, Record, int], Item]
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
    "mathverse": (("testmini.parquet", "testmini.json"), exams.mathverse),
    "mathvision": (("test-*.parquet", "test.jsonl"), exams.mathvision),
    "wemath": (("testmini-*.parquet", "testmini.json"), exams.wemath),
    "mmmu": (("validation-*.parquet", "*/validation-*.parquet"), exams.mmmu),
    "geometry3k": (("test/*/data.json", "test-*.parquet"), exams.geometry3k),
}
NAMES = tuple(_SETS)
_PARTS = {"mmstar_r": ("category", MMSTAR_R), "mmbench_r": ("l2_category", MMBENCH_R)}


def read(name: str, folder: str | os.PathLike, images: str | os.PathLike) -> tuple[list[Item], Report]:
    """Reads a benchmark; broken rows are dropped and counted by cause.

    Rows with the id of an earlier row and rotations without their question are dropped too.

    Args:
      name: one of NAMES.
      folder: with the official files, or one such file.
      images: the folder to write images to that are inside of the files; created if it does not exist.

    Returns:
      The items in the order of the files, and the report. `SIZES[name]` is the expected number.

    Raises:
      FileNotFoundError: none of the official files is there.
      ValueError: the name is unknown, or a whole file cannot be read.
    """
    if name not in _SETS:
        raise ValueError(f"unknown benchmark {name!r}; expected one of {', '.join(NAMES)}")
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
                raise Bad("broken row")
            item = build(name, row, number)
            place = f"{place}: {item.query.id}"
            if name in _PARTS and item.groups[_PARTS[name][0]] not in [(each,) for each in _PARTS[name][1]]:
                raise Bad("not a reasoning question")
            if isinstance(picture, ImageError):
                raise Bad(picture.cause)
            if item.query.id in found:
                raise Bad("duplicate id")
        except Bad as error:
            report.drop(str(error), place)
            continue
        query = dataclasses.replace(item.query, images=picture)
        found[query.id] = place, dataclasses.replace(item, query=query)
    items = []
    for place, item in found.values():
        if item.base in found:
            items.append(item)
        else:
            report.drop("rotation without its question", place)
    report.kept = len(items)
    return items, report
