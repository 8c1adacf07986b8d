r"""Readers for MathVerse, MATH-Vision, We-Math, MMMU and Geometry3K, from a local folder with their files.

    name         files looked for                             from
    mathverse    testmini.parquet, testmini.json              AI4Math/MathVerse
    mathvision   test-*.parquet, test.jsonl                   MathLLMs/MathVision, mathllm/MATH-V
    wemath       testmini-*.parquet, testmini.json            We-Math/We-Math
    mmmu         validation-*.parquet, also one a subject     MMMU/MMMU, lmms-lab/MMMU
    geometry3k   test/*/data.json, test-*.parquet             lupantech/InterGPS; hiyouga/geometry3k,
                                                              Yang130/geometry3k_4choices_mixed

A row of MathVerse, whose 788 problems come in five versions that move what the text says into the figure; in
the last, the figure shows the question and its options too:

    {"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant",
     "question": "As shown in the figure, in triangle ABC, ... angle CED is ()\nChoices:\nA:40°\nB:60°\n...",
     "image": "images_version_1-4/image_1.png", "answer": "D", "question_type": "multi-choice",
     "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
     "query_wo": "Please directly answer the question and ...", "query_cot": "Please first conduct ...",
     "question_for_eval": "As shown in the figure, in triangle ABC, ..."}

A row of We-Math, the first step of a problem of two steps, and one of MMMU:

    {"ID": "2steps_1", "key": "2steps_1", "knowledge concept": "Conversion Rates ...", "question number": 1,
     "question": "OA = ( ) m, AB = ( ) m", "option": "A. 300, 400;B. 400, 300; ... E. No correct answer",
     "answer": "C", "image_path": "2steps/image/1-1.png", "split": "testmini", ...}
    {"id": "validation_Math_1", "question": "Find the area in <image 1>.", "options": "['1', '2', '3', '4']",
     "image_1": {"bytes": b"...", "path": "validation_Math_1_1.png"}, "image_2": None, "answer": "B",
     "topic_difficulty": "Medium", "question_type": "multiple-choice", "subfield": "Calculus", ...}
"""

import re

from mstar_jax.data.turns import Unreadable, parse_answer
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
from mstar_jax.evaluate.tables import LETTERS, Record, cell, parse_options, texts

VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
IN_IMAGE = "Answer the question that the image shows."
DISCIPLINES = {  # of MMMU, with their subjects
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
_DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
_DIRECTLY = "Answer with the option's letter from the given choices directly."


def _free(answer: str) -> tuple[str, str]:
    """(gold answer, its type) of a question without options; no question is dropped for its answer."""
    if not answer.strip():
        raise Bad("no answer")
    try:
        return parse_answer(answer, None)
    except Unreadable:
        return answer.strip(), "text"


# ---- 1. MathVerse -------------------------------------------------------------------------------------


def mathverse(name: str, row: Record, number: int) -> Item:
    """A question in one of its five versions; the sixth, `Text Only`, has no image and no place here."""
    version = cell(row, "problem_version")
    if version not in VERSIONS:
        raise Bad("not one of the five versions")
    found = row.get("metadata")
    about: Record = found if isinstance(found, dict) else {}
    shown = version == VERSIONS[-1]
    whole = cell(row, "question_for_eval") if shown else cell(row, "question")
    answer = cell(row, "answer").strip()
    question, options = parse_options(whole)
    said: tuple[str, ...] | None = None  # the options that only the image shows
    kind = "choice"
    if cell(row, "question_type") == "multi-choice":
        if shown or not options:  # or they stand in the middle of the question
            said = tuple(options) or None
            question, options = whole, list(LETTERS[: max(4, len(options))])
        answer = gold_letter(answer, options)
    else:
        question, options = whole, []
        answer, kind = _free(answer)
    prompt = cell(row, "query_cot", "query_wo")
    if not prompt:
        raise Bad("no official prompt")
    id = cell(row, "sample_index").strip()
    columns = {"index": id, "question": prompt, "metadata": repr(about), **option_columns(options)}
    query = make_query(id, IN_IMAGE if shown else question, answer, options, source=name, kind=kind)
    groups = make_groups(
        problem_version=version,
        subject=cell(about, "subject"),
        subfield=cell(about, "subfield"),
        question_type=cell(row, "question_type"),
    )
    return Item(query, prompt, groups, id, official_record(row, columns), options=said)


# ---- 2. MATH-Vision -----------------------------------------------------------------------------------

_BOXED = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". '
    'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".\n'
)


def mathvision(name: str, row: Record, number: int) -> Item:
    """A question of a competition. Options that are only letters are in the image, which joins all."""
    id = cell(row, "id").strip()
    question = cell(row, "question")
    options = texts(row.get("options"))
    answer = cell(row, "answer")
    kind = "choice"
    if options:
        answer = gold_letter(answer, options)
    else:
        answer, kind = _free(answer.replace("\f", "\\f"))  # a form feed was the start of \frac
    shown = "".join(options) == LETTERS[: len(options)]
    prompt = f"{_BOXED}{question}\n" + ("" if shown else option_lines(options, "({}) {}\n"))
    subject = cell(row, "subject")
    columns = {"index": id, "choices": options, "category": subject}
    groups = make_groups(subject=subject, level=cell(row, "level"))
    query = make_query(id, question, answer, options, source=name, kind=kind)
    return Item(query, prompt, groups, id, official_record(row, columns))


# ---- 3. We-Math ---------------------------------------------------------------------------------------

STEPS = {"1": "one step", "2": "two steps", "3": "three steps"}


def wemath(name: str, row: Record, number: int) -> Item:
    """A problem of two or three steps (`..._multi`), or one of its steps, which have the same `ID`."""
    problem, key = cell(row, "ID").strip(), cell(row, "key").strip()
    if not re.fullmatch(r"2steps_[12]|3steps_[123]|[23]steps_multi", key) or not problem:
        raise Bad("not a step of a problem")
    question, asked = cell(row, "question"), cell(row, "option")
    options = parse_options("Options: " + asked.strip().replace("．", "."))[1]
    answer = gold_letter(cell(row, "answer"), options)
    prompt = (
        "Now, we require you to solve a multiple-choice math question. Please briefly describe your thought "
        f"process and provide the final answer(option).\nQuestion: {question}\nOption: {asked}\n"
        "Regarding the format, please answer following the template below, and be sure to include two <> "
        "symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your option>>"
    )
    id = f"{problem}/{key.rpartition('_')[2]}"
    columns = {"index": cell(row, "question number"), "answer": answer, **option_columns(options)}
    groups = make_groups(
        steps=STEPS[key[0] if key.endswith("multi") else "1"],
        knowledge_concept=cell(row, "knowledge concept"),
    )
    query = make_query(id, question, answer, options, source=name)
    return Item(query, prompt, groups, id, official_record(row, columns))


# ---- 4. MMMU ------------------------------------------------------------------------------------------


def mmmu(name: str, row: Record, number: int) -> Item:
    """A question of the validation split; `<image 2>` in its text means the second of its images."""
    id = cell(row, "id").strip()
    if not (m := re.fullmatch(r"validation_(\w+)_\d+", id)):
        raise Bad("not of the validation split")
    question = cell(row, "question")
    options = texts(row.get("options"))
    answer, kind = cell(row, "answer").strip(), "choice"
    also: tuple[str, ...] = ()
    if cell(row, "question_type") == "multiple-choice":
        answer = gold_letter(answer, options)
        lines = option_lines(options, "({}) {}\n")
        prompt = f"{question}\n{lines}\n{_DIRECTLY}"
    else:
        golds = texts(answer) or [answer]  # three questions have two
        (answer, kind), *others = map(_free, golds)
        also, options = tuple(gold for gold, _ in others), []
        prompt = f"{question}\nAnswer the question using a single word or phrase."
    groups = make_groups(
        discipline=_DISCIPLINE.get(m[1], ""),
        subject=m[1],
        difficulty=cell(row, "topic_difficulty"),
        question_type=cell(row, "question_type"),
        image_type=texts(row.get("img_type")),
    )
    columns = {"index": id, **option_columns(options)}
    query = make_query(id, question, answer, options, source=name, kind=kind)
    return Item(query, prompt, groups, id, official_record(row, columns), also=also)


# ---- 5. Geometry3K ------------------------------------------------------------------------------------

_QUADRILATERALS = ("Rectangle", "Rhombus", "Parallelogram", "Trapezoid", "Square")


def geometry3k(name: str, row: Record, number: int) -> Item:
    """A question with four choices (the authors' files, Yang130) or without (hiyouga)."""
    id = cell(row, "id").strip() or str(number)
    question = cell(row, "annotat_text", "problem", "problem_text").replace("<image>", "").strip()
    options = texts(row.get("choices"))
    answer, kind = cell(row, "ground_truth", "answer"), "choice"
    if options:
        answer = gold_letter(answer, options)
        prompt = f"{question}\n" + option_lines(options, "{}. {}\n") + _DIRECTLY
    else:
        answer, kind = _free(answer)
        prompt = f"{question} Put the final answer in \\boxed{{}}."
    goals = texts(row.get("problem_type_goal"))
    goals = [goal for goal in goals if goal != "Other"] or goals
    graphs = ["Quad" if g in _QUADRILATERALS else g for g in texts(row.get("problem_type_graph"))]
    columns = {"index": id, "question": question, "answer": answer, **option_columns(options)}
    query = make_query(id, question, answer, options, source=name, kind=kind)
    groups = make_groups(goal=goals, diagram=list(dict.fromkeys(graphs)))
    return Item(query, prompt, groups, id, official_record(row, columns))
