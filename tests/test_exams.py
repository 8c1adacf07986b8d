"""MathVerse, MATH-Vision, We-Math, MMMU and Geometry3K: small files in the official shapes, and the official
scores against straightforward readings of their rules."""

import itertools
import json
import math
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_benchmarks import check, image, parquet

from mstar_jax.answers import check as checker
from mstar_jax.evaluate import examiners, exams, fourfold, scoring, summary, tables
from mstar_jax.evaluate.benchmarks import SIZES, read
from mstar_jax.evaluate.items import Item
from mstar_jax.structs import Query

PICTURE = {"bytes": image(), "path": "1.png"}


def item(answer="B", options=("cat", "dog", "cow"), kind="choice", **more):
    query = Query("1", ("/x.png",), "?", options, answer, kind if not options else "choice")
    return Item(query, "?", {}, "1", {"answer": answer}, **more)


def official(name, one, text):
    return scoring.judge(name, one, text, False).official


# ---- MathVerse ----------------------------------------------------------------------------------------

WHOLE = "As shown in the figure, angle A = 80.0, then angle CED is ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"


def mathverse(index, version="Text Dominant", question=WHOLE, answer="D", kind="multi-choice", **more):
    about = {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}
    row = {"sample_index": str(index), "problem_index": "1", "problem_version": version, "answer": answer}
    row |= {"question": "" if version == "Vision Only" else question, "question_for_eval": question}
    row |= {"query_cot": f"Please first conduct reasoning.\nQuestion: {row['question']}", "query_wo": "?"}
    return row | {"image": PICTURE, "question_type": kind, "metadata": about} | more


def test_mathverse_in_five_versions(tmp_path):
    rows = [mathverse(n, version) for n, version in enumerate((*exams.VERSIONS, "Text Only"), 1)]
    inline = "Determine its equation.A. x^2 = 1 B. Can not determine."
    rows += [
        mathverse(7, question=inline, answer="A"),
        mathverse(8, question="Find x.", answer="x=-1", kind="free-form"),
    ]
    rows += [mathverse(9, answer="F"), mathverse(10, query_cot="", query_wo=""), mathverse(11, image=None)]
    rows += [mathverse(1)]
    folder = parquet(tmp_path / "testmini.parquet", rows)
    items, report = read("mathverse", folder, tmp_path / "cache")
    causes = {"not one of the five versions": 1, "options without gold": 1, "no official prompt": 1}
    check(items, report, 7, causes | {"no image": 1, "duplicate id": 1})
    first, last, middle, free = items[0], items[4], items[5], items[6]
    assert first.query.options == ("40°", "60°", "120°", "140°") and first.query.question.endswith(
        "CED is ()"
    )
    assert first.prompt == f"Please first conduct reasoning.\nQuestion: {WHOLE}" and first.options is None
    assert first.groups["problem_version"] == ("Text Dominant",) and first.groups["subfield"] == ("Angle",)
    # the image alone shows what is asked: nothing of it is in the prompt, but its options can be named
    assert "angle" not in last.query.question and last.query.options == ("A", "B", "C", "D")
    assert last.options == first.query.options and last.query.answer == "D"
    for one in (first, last):
        assert scoring.judge("mathverse", one, "The answer is 140°.", False).strict == "correct"
        assert scoring.judge("mathverse", one, "The answer is 120°.", False).strict == "wrong"
    assert middle.query.question == inline and middle.query.options == ("A", "B", "C", "D")
    assert (free.query.answer, free.query.options) == ("x=-1", None)
    assert json.loads(first.record["metadata"].replace("'", '"'))["subject"] == "Plane Geometry"


def test_mathverse_json_beside_its_images(tmp_path):
    (tmp_path / "images" / "images_version_1-4").mkdir(parents=True)
    (tmp_path / "images" / "images_version_1-4" / "image_1.png").write_bytes(image())
    rows = [mathverse(1, image="images_version_1-4/image_1.png"), mathverse(2, image="../../x.png")]
    rows += [mathverse(3, image="https://example.org/1.png")]
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    items, report = read("mathverse", tmp_path, tmp_path / "cache")
    check(items, report, 1, {"image path leaves the root": 1, "missing image": 1})


def test_mathverse_scores():
    one = item("x=-1", None, "math")
    for text, strict, right, quick in (
        ("The answer is x=-1.", "correct", True, True),
        ("The answer is -1.", "correct", True, False),
        ("So x = -1", "unparsed", True, False),  # GPT reads it, and so do our rules
        ("The answer is x=1.", "wrong", False, False),
    ):
        found = scoring.judge("mathverse", one, text, False)
        assert (found.strict, found.official, found.variants["quick_match"]) == (strict, right, quick), text


# ---- MATH-Vision --------------------------------------------------------------------------------------


def mathvision(id, options=(), answer="60", **more):
    row = {"id": str(id), "question": f"Which {id}?\n<image1>", "options": list(options), "answer": answer}
    row |= {"image": f"images/{id}.jpg", "decoded_image": PICTURE, "solution": None}
    return row | {"level": 2, "subject": "arithmetic"} | more


def test_texts_that_utf8_cannot_say():
    assert tables.texts(["a\ud800", None, 3]) == ["a\ufffd", "", "3"]


def test_mathvision_rows(tmp_path):
    rows = [mathvision(1), mathvision(2, "ABCDE", "C"), mathvision(3, ["$2+4$", "5", "6", "7", "8"], "A")]
    rows += [mathvision(4, answer="\x0crac{36}{13}"), mathvision(5, "ABCDE", "F"), mathvision(6, answer=" ")]
    shapes = {"options": pa.list_(pa.string())}
    types = {k: shapes.get(k) or pa.infer_type([row[k] for row in rows]) for k in rows[0]}
    folder = parquet(tmp_path / "data" / "test-00000-of-00001-3532b8d3f1b4047a.parquet", rows, **types)
    items, report = read("mathvision", folder.parent, tmp_path / "cache")
    check(items, report, 4, {"options without gold": 1, "no answer": 1})
    free, letters, texts, broken = items
    start = 'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a '
    start += 'multiple choice question, only one letter is allowed in the "\\boxed{}".\n'
    assert free.prompt == f"{start}Which 1?\n<image1>\n" and free.query.options is None
    assert letters.prompt == f"{start}Which 2?\n<image1>\n" and letters.query.options == tuple("ABCDE")
    assert texts.prompt == f"{start}Which 3?\n<image1>\n(A) $2+4$\n(B) 5\n(C) 6\n(D) 7\n(E) 8\n"
    assert broken.query.answer == "\\frac{36}{13}"
    assert free.groups == {"subject": ("arithmetic",), "level": ("2",)}
    assert (
        texts.record["choices"] == "['$2+4$', '5', '6', '7', '8']"
        and texts.record["category"] == "arithmetic"
    )


def mathvision_said(text):
    """MATH-Vision's `evaluate` and `find_math_answer`, step by step."""
    answer = text.strip()
    for c in "ABCDE":
        ends = any(answer.endswith(end) for end in (f" {c}.", f" ({c})."))
        begins = any(answer.startswith(begin) for begin in (c + "\n", f"({c})\n", f"({c}) {c}\n"))
        answer = c if ends or begins else answer
    tail = answer.split("is ")[-1].rstrip(".")
    try:
        float(tail)
        answer = tail
    except ValueError:
        pass
    if "oxed{" not in answer:
        for flag in ("the final answer is", "the answer is", "the correct answer is", "the answer should be"):
            for each in (flag, flag.replace("the", "The")):
                before = answer
                answer = answer.split(each)[-1].strip()
                if each in before:
                    answer = answer.split("\n")[0].split(". ")[0]
    elif answer.count("oxed{") > 1:
        answer = "\\boxed{" + answer.split("oxed{")[-1]
    answer = answer.lower().replace("{}", "")
    found = re.findall("oxed{(.*)}", answer, flags=re.DOTALL)
    answer = found[-1] if found else answer
    if "}" in answer and ("{" not in answer or answer.find("}") < answer.find("{")):
        answer = answer.split("}")[0]
    answer = answer.split("=")[-1].split("\\approx")[-1].replace(" ", "").replace("\\,", "")
    for gone in ("\n", "\\text", "^{\\circ}", "^\\circ", "{units}", "units", "{km}", "km", "$"):
        answer = answer.replace(gone, "")
    answer = "0" + answer if answer[:1] == "." else answer
    for around in ("()", "{}"):
        for c in "abcde":
            answer = answer.replace(around[0] + c + around[1], c)
    return answer.rstrip(".").lstrip(":").strip()


VALUES = {  # what can be written, and what it is worth
    "60": 60, "7.5": 7.5, "7.504": 7.5, ".5": 0.5, "\\frac{1}{2}": 0.5, "1/2": 0.5, "2\\sqrt{3}": 3.4641,
    "3.46": 3.46, "\\sqrt3": 1.732, "3\\pi": 9.42478, "45^2": 2025, "-3": -3, "6\\text{ km}": 6, "x": None,
    "[1, 2]": "[1,2]", "(3,-4)": "(3,-4)", "(3, -4.0)": "(3,-4)", "10:30": 1 / 3, "1:2:4": 0.125, "1:0": None,
    "A": "a", "(B)": "b",
}  # fmt: skip
FRAMES = [
    "{}",
    "\\boxed{{{}}}",
    "So the answer is {}.",
    "The final answer is {}. Good",
    "It is {}.",
    "x = {}",
]
FRAMES += ["The value is {}", "First \\boxed{{1}}, then \\boxed{{{}}}.", "{}\nmore", "$\\boxed{{{}}}$ units"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FRAMES), st.sampled_from(list(VALUES)), st.sampled_from(FRAMES))
@example("The answer is ({}).", "C", "{}")
@example("{}", "", "{}")
def test_mathvision_answers(frame, value, after):
    text = frame.format(value) + random.Random(value).choice(["", f"\nThat is, {after.format(value)}"])
    assert examiners.stated(text) == mathvision_said(text)


def rounded(worth):
    return worth if worth is None or isinstance(worth, str) else round(worth, 2)


@pytest.mark.parametrize(("gold", "said"), itertools.product(list(VALUES), list(VALUES)))
def test_mathvision_equality(gold, said):
    """Equal texts, or values that are equal to two decimals."""
    one = item(gold, None, "math")
    a, b = rounded(VALUES[gold]), rounded(VALUES[said])
    same = mathvision_said(f"\\boxed{{{said}}}") == gold.lower()
    if not {gold, said} & {"A", "(B)", "x", "1:0"} and not gold.endswith("km}"):  # these are texts
        same = same or a == b
    assert official("mathvision", one, f"\\boxed{{{said}}}") == same


@pytest.mark.parametrize("said", ["{0}", "({0}, 2)"])
def test_mathvision_values_that_no_float_holds(said):
    large = "99^{99}\\cdot 99^{99}\\cdot 99^{99}"
    one = item("5", None, "math")
    assert not official("mathvision", one, f"\\boxed{{{said.replace('{0}', large)}}}")


def test_mathvision_options_by_letter_or_value():
    one = item("B", ("1/2", "2\\sqrt{3}", "x", "y", "z"))
    for text in ("\\boxed{B}", "Therefore (B).", "B\nsince", "\\boxed{3.46}", "the answer is 2\\sqrt{3}"):
        assert official("mathvision", one, text), text
    assert not official("mathvision", one, "\\boxed{A}") and not official("mathvision", one, "")
    assert not official("mathvision", one, "\\boxed{__import__('os').getcwd()}")


# ---- We-Math ------------------------------------------------------------------------------------------


def wemath(problem, part, answer="B", **more):
    steps = problem[:6]
    row = {
        "ID": problem,
        "split": "testmini",
        "key": f"{steps}_{part}",
        "knowledge concept": "Area of Circles",
    }
    row |= {"question": "What area (  )", "option": "A. 1, 2;B. 3;C. 1,000; D. No correct answer"}
    row |= {"answer": answer, "image_path": "2steps/image/1-1.png", "question number": 1}
    return row | {"knowledge concept description": "..."} | more


def test_wemath_rows(tmp_path):
    (tmp_path / "2steps" / "image").mkdir(parents=True)
    (tmp_path / "2steps" / "image" / "1-1.png").write_bytes(image())
    rows = [wemath("2steps_1", part) for part in ("1", "2", "multi")]
    rows += [
        wemath("3steps_4", "1", option="A. ①;B．②; C. ③"),
        wemath("3steps_4", "4"),
        wemath("2steps_5", "3"),
    ]
    rows += [wemath("2steps_6", "1", answer="E"), wemath("2steps_1", "1")]
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    items, report = read("wemath", tmp_path, tmp_path / "cache")
    check(items, report, 4, {"not a step of a problem": 2, "options without gold": 1, "duplicate id": 1})
    assert [one.query.id for one in items] == ["2steps_1/1", "2steps_1/2", "2steps_1/multi", "3steps_4/1"]
    assert [one.groups["steps"] for one in items] == [
        (name,) for name in ("one step", "one step", "two steps", "one step")
    ]
    assert items[0].query.options == ("1, 2", "3", "1,000", "No correct answer")
    assert items[3].query.options == ("①", "②", "③")
    assert items[0].prompt.endswith(
        "symbols:\n<Thought process>: <<your thought process>> <Answer>: <<your option>>"
    )
    assert (
        "\nQuestion: What area (  )\nOption: A. 1, 2;B. 3;C. 1,000; D. No correct answer\n" in items[0].prompt
    )
    rows = [row | {"image_path": PICTURE} for row in rows]
    folder = parquet(tmp_path / "other" / "testmini-00000-of-00001.parquet", rows)
    others, _ = read("wemath", folder, tmp_path / "cache")
    assert [one.prompt for one in others] == [one.prompt for one in items]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<Thought process>: <<so>> <Answer>: <<B>>", "B"),
        ("<Answer>: <<B. 3>>.", "B"),
        ("<Answer>: <<(B)>>", None),
        ("B", "B"),
        ("Better not", "B"),  # as published
        ("The answer is B.", None),
        ("Answer: A. Answer: B", "B"),
        ("", None),
    ],
)
def test_wemath_letter(text, letter):
    """`split('Answer')[-1]`, without `<>:.`, then the first letter."""
    said = re.sub("[><:.]", "", text.split("Answer")[-1].strip()).strip()
    assert (said[0] if said and said[0] in "ABCDEFGH" else None) in (letter, "T")
    assert official("wemath", item(), text) == (letter == "B")


def four_dimensions(answers):
    """The published counts, one filter a table, for [(steps, problem)]; all of them as fractions of 525."""
    ig = [p for p in answers if all(p[0]) and not p[1]]
    ik = [p for p in answers if not all(p[0]) and not p[1]]
    cm = {
        "loose": [p for p in answers if any(p[0]) and p[1]],
        "strict": [p for p in answers if all(p[0]) and p[1]],
    }
    rm = {
        "loose": [p for p in answers if not any(p[0]) and p[1]],
        "strict": [p for p in answers if not all(p[0]) and p[1]],
    }
    out = {"problems": len(answers), "insufficient_knowledge": len(ik) / 525}
    out["inadequate_generalization"] = len(ig) / 525
    for kind in ("strict", "loose"):
        score = (525 - 0.5 * len(ig) - len(rm[kind]) - len(ik)) / 525
        rate = len(rm[kind]) / (len(cm[kind]) + len(rm[kind]))
        out[kind] = {"complete_mastery": len(cm[kind]) / 525, "rote_memorization": rate, "score": score}
    return out


def problems(rng, right=0.6):
    """Items and hits of 360 problems of two steps and 165 of three, shuffled; and the pairs they make."""
    pairs, rows = [], []
    for at in range(525):
        count = 2 if at < 360 else 3
        steps, whole = [rng.random() < right for _ in range(count)], rng.random() < right
        pairs.append((steps, whole))
        for part, hit in zip([*map(str, range(1, count + 1)), "multi"], [*steps, whole]):
            rows.append((exams.wemath("wemath", wemath(f"{count}steps_{at}", part), 0), hit))
    rng.shuffle(rows)
    return [one for one, _ in rows], [hit for _, hit in rows], pairs


@pytest.mark.parametrize("seed", range(3))
def test_wemath_in_four_dimensions(seed):
    items, hits, pairs = problems(random.Random(seed))
    assert len(items) == SIZES["wemath"]
    assert fourfold.dimensions(items, hits) == four_dimensions(pairs)


def test_wemath_in_the_summary_and_the_table():
    items, hits, pairs = problems(random.Random(3))
    texts = ["<Thought process>: <<C>> <Answer>: <<B>>" if hit else "<Answer>: <<A>>" for hit in hits]
    scores = [scoring.judge("wemath", one, text, False) for one, text in zip(items, texts)]
    out = scoring.summarise("wemath", items, scores)
    for kind in ("strict", "fallback", "official"):
        assert out["four_dimensions"][kind] == fourfold.dimensions(items, hits)
    assert {k: v["count"] for k, v in out["groups"]["steps"].items()} == {
        "one step": 1215,
        "two steps": 360,
        "three steps": 165,
    }
    result = summary.Result({"greedy": out, "left_out": 0}, {})
    lines = summary.table({"p": {"wemath": result}}, "").splitlines()
    expected = four_dimensions(pairs)
    shares = [
        expected["strict"]["score"],
        expected["insufficient_knowledge"],
        expected["inadequate_generalization"],
    ]
    shares += [expected["strict"]["complete_mastery"], expected["strict"]["rote_memorization"]]
    assert f"| p | strict | 525 | {' | '.join(f'{100 * x:.1f}' for x in shares)} |" in lines
    one = items[0]
    assert fourfold.dimensions([one], [True]) is None  # its problem is not whole


# ---- MMMU ---------------------------------------------------------------------------------------------


def mmmu(id, options="['1', '2', '3', '4']", answer="B", kind="multiple-choice", images=1, **more):
    row = {"id": id, "question": "Find it in <image 1>.", "options": options, "explanation": ""}
    row |= {
        f"image_{n}": {"bytes": image(n), "path": f"{n}.png"} if n <= images else None for n in range(1, 8)
    }
    row |= {"img_type": "['Plots and Charts']", "answer": answer, "topic_difficulty": "Medium"}
    return row | {"question_type": kind, "subfield": "Calculus"} | more


def test_mmmu_rows(tmp_path):
    first = [mmmu("validation_Math_1"), mmmu("validation_Math_2", images=3), mmmu("dev_Math_1")]
    golds = "['$MgS$', 'MgS']"
    second = [mmmu("validation_Public_Health_9", "[]", golds, "open"), mmmu("validation_Art_1", images=0)]
    second += [mmmu("validation_Art_2", answer="E"), mmmu("validation_Art_3", "[]", "24.32", "open")]
    types = {k: pa.infer_type([row[k] for row in [*first, *second]]) for k in first[0]}
    parquet(tmp_path / "Math" / "validation-00000-of-00001.parquet", first, **types)
    parquet(tmp_path / "Other" / "validation-00000-of-00001.parquet", second, **types)
    items, report = read("mmmu", tmp_path, tmp_path / "cache")
    check(items, report, 4, {"not of the validation split": 1, "no image": 1, "options without gold": 1})
    one, three, two_golds, number = items
    assert [len(i.query.images) for i in (one, three)] == [1, 3] and one.query.images[
        0
    ] == three.query.images[0]
    lines = "(A) 1\n(B) 2\n(C) 3\n(D) 4\n"
    end = "\nAnswer with the option's letter from the given choices directly."
    assert one.prompt == f"Find it in <image 1>.\n{lines}{end}"
    assert two_golds.prompt == "Find it in <image 1>.\nAnswer the question using a single word or phrase."
    assert one.groups["discipline"] == ("Science",) and two_golds.groups["subject"] == ("Public_Health",)
    assert not any(name.startswith("image") for name in one.record)
    for answer in ("MgS", "$MgS$"):
        found = scoring.judge("mmmu", two_golds, f"The answer is {answer}", False)
        assert found.strict == "correct" and found.official
    assert scoring.judge("mmmu", two_golds, "The answer is MgO", False).strict == "wrong"
    assert scoring.judge("mmmu", number, "The answer is 24.32", False).strict == "correct"
    assert sum(map(len, exams.DISCIPLINES.values())) == 30


def mmmu_letter(response, options):
    """`parse_multi_choice_response`, None in place of a random choice."""
    for char in [",", ".", "!", "?", ";", ":", "'"]:
        response = response.strip(char)
    response = " " + response + " "
    letters = "ABCDEFGHIJ"[: len(options)]
    bracketed = [c for c in letters if f"({c})" in response]
    bare = [c for c in letters if f" {c} " in response]
    if bracketed:
        return max(bracketed, key=lambda c: response.rfind(f"({c})"))
    if bare:
        return max(bare, key=lambda c: response.rfind(f" {c} "))
    if len(response.split()) > 5:
        held = [(c, o) for c, o in zip(letters, options) if o.lower() in response.lower()]
        if held:
            return max(held, key=lambda pair: response.lower().rfind(pair[1].lower()))[0]
    return None


WORDS = [
    "A",
    "B",
    "(A)",
    "(C)",
    "B.",
    "cat",
    "dog",
    "hot",
    "dog food",
    "is",
    "the",
    "I",
    "think",
    "12",
    "it",
    ",",
]
replies = st.lists(st.sampled_from(WORDS), max_size=10).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(replies)
@example("I think that it is a hot dog food")
def test_mmmu_choices(text):
    options = ("cat", "dog", "dog food", "12")
    assert examiners.chosen(text, options) == mmmu_letter(text, options)
    for letter in "ABCD":
        assert official("mmmu", item(letter, options), text) == (mmmu_letter(text, options) == letter)


def mmmu_open(response, gold):
    """`parse_open_response` and `eval_open`."""

    def normal(text):
        text = text.strip()
        try:
            return [round(float(text.replace(",", "")), 2)]
        except ValueError:
            text = text.lower()
            return [" " + text, text + " "] if len(text) == 1 else [text]

    response = response.strip().strip(".").lower()
    parts, keys = (
        response.split("\n"),
        ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "],
    )
    said = []
    for number, part in enumerate(parts):
        if number == len(parts) - 1:
            keys.append("=")
        best = None
        for key in keys:
            if key in part:
                tail = part.split(key)[-1].strip()
                if not best or len(tail) < len(best):
                    best = tail
        if best and best not in list(":,.!?;'"):
            said.append(best)
    said = said or [response]
    patterns = [r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+"]
    patterns.append(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
    numbers = [m for one in said for pattern in patterns for m in re.findall(pattern, one)]
    found = [form for one in [*said, *numbers] for form in normal(one)]
    golds = [form for one in gold for form in normal(one)]
    for form in found:
        if isinstance(form, str):
            if any(isinstance(g, str) and g in form for g in golds):
                return True
        elif form in golds:
            return True
    return False


PIECES = [
    "The answer ",
    "is ",
    "so ",
    "x = ",
    "1,000",
    "24.32",
    "24.321",
    "1e3",
    "-3",
    "8",
    "b",
    "Tampa",
    "\n",
    ". ",
]
OPEN = st.lists(st.sampled_from([*PIECES, "final ", "thus ", ",", "=", " or ", "florida"]), max_size=8).map(
    "".join
)
GOLDS = [("1000",), ("24.32",), ("-3",), ("B",), ("Tampa", "Florida"), ("8",), ("1/64",)]


@settings(max_examples=300, deadline=None)
@given(OPEN, st.sampled_from(GOLDS))
@example("x = 8", ("8",))
def test_mmmu_open_questions(text, golds):
    one = item(repr(list(golds)) if len(golds) > 1 else golds[0], None, "text")
    assert official("mmmu", one, text) == mmmu_open(text, golds)


# ---- Geometry3K ---------------------------------------------------------------------------------------


def test_geometry3k_in_its_three_shapes(tmp_path):
    own = {"problem_text": "Find m \\widehat A B.", "annotat_text": "Find $m\\widehat{A B}$.", "answer": "D"}
    own |= {"choices": ["30", "40", "60", "80"], "id": 2401, "problem_type_graph": ["Circle", "Square"]}
    own |= {"problem_type_goal": ["Angle", "Other"], "data_type": "test", "precise_value": [30.0, 40.0]}
    for name in ("2401", "2402", "2403", "2404"):
        (tmp_path / "own" / "test" / name).mkdir(parents=True)
        (tmp_path / "own" / "test" / name / "data.json").write_text(json.dumps(own | {"id": int(name)}))
        (tmp_path / "own" / "test" / name / "img_diagram.png").write_bytes(image() if name != "2402" else b"")
    (tmp_path / "own" / "test" / "2403" / "data.json").write_text("{")
    (tmp_path / "own" / "test" / "2404" / "data.json").write_text("[]")
    items, report = read("geometry3k", tmp_path / "own", tmp_path / "cache")
    check(items, report, 1, {"empty image": 1, "broken row": 2})
    one = items[0]
    assert (one.query.id, one.query.answer, one.query.options) == ("2401", "D", ("30", "40", "60", "80"))
    assert one.query.question == "Find $m\\widehat{A B}$."
    assert one.groups == {"goal": ("Angle",), "diagram": ("Circle", "Quad")}
    end = "Answer with the option's letter from the given choices directly."
    assert one.prompt == f"Find $m\\widehat{{A B}}$.\nA. 30\nB. 40\nC. 60\nD. 80\n{end}"
    rows = [
        {
            "images": [PICTURE],
            "problem": "<image>Find x.",
            "choices": ["1", "2", "3", "4"],
            "ground_truth": "B",
        }
    ]
    items, _ = read("geometry3k", parquet(tmp_path / "mixed" / "test-0.parquet", rows), tmp_path / "cache")
    assert items[0].query.question == "Find x." and items[0].query.answer == "B"
    rows = [{"images": [PICTURE], "problem": "<image>Find x.", "answer": "2 \\sqrt { 221 }"}]
    items, _ = read("geometry3k", parquet(tmp_path / "free" / "test-0.parquet", rows), tmp_path / "cache")
    free = items[0]
    assert free.query.options is None and free.prompt == "Find x. Put the final answer in \\boxed{}."
    for text, right in (("\\boxed{2\\sqrt{221}}", True), ("2\\sqrt{221}", False), ("\\boxed{221}", False)):
        assert official("geometry3k", free, text) == right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: (B)", "B"),
        ("Answer: A. Wait. Answer: b", "B"),
        ("so B.", "B"),
        ("B", "B"),
        ("the letter B it must be", "B"),
        ("it must be a dog", "A"),  # the article
        ("hot dogs", "B"),
        ("nothing", None),
        ("", None),
    ],
)
def test_geometry3k_letter(text, letter):
    for gold in "ABC":
        assert official("geometry3k", item(gold), text) == (gold == letter)


def test_nothing_official_needs_an_answer_that_can_be_read():
    for name in ("mathverse", "mathvision", "wemath", "mmmu", "geometry3k"):
        for one in (item(), item("4", None, "integer"), item("x", None, "math")):
            for text in ("", "\\boxed{", "(", "}", "is ", "=", "\x00", "9" * 5000):
                assert official(name, one, text) in (False, True)
    assert math.isfinite(examiners._forms("1e5")[0])
    assert checker.grade("", "B").verdict == "unparsed"


def test_a_parquet_file_of_either_writer_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist([mathverse(1, image=image())]), tmp_path / "testmini.parquet")
    assert len(read("mathverse", tmp_path, tmp_path / "cache")[0]) == 1
