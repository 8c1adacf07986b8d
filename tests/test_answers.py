"""Answer checking: hand-checked cases, the traps of benchmark answers, and hostile input."""

import random
import string
import time

import pytest

from mstar_jax.answers import Grade, as_gold, choice, equivalent, extract, grade
from mstar_jax.values import kind, number, tidy

CM = ("10 cm", "12 cm", "15 cm", "120 cm")
RED = ("red ball", "blue cube", "green cone")
TALK = ("the answer is option C", "option D in the image is the answer", "both are right")
INTEGER, FLOAT = {"answer_type": "integer"}, {"answer_type": "float"}

CASES = [
    # gold, response, arguments, verdict
    # extraction
    ("4", r"so \boxed{3} no, \boxed{4}.", {}, "correct"),
    ("1/2", r"\boxed{\frac{1}{2}} is it", {}, "correct"),
    ("4", r"The answer is 5. \boxed{4}", {}, "correct"),
    ("4", r"The answer is 4. \boxed{4", {}, "correct"),
    ("4", r"\boxed{\text{4}}", {}, "correct"),
    ("3", "The answer is 3.", {}, "correct"),
    ("3.5", "The answer is 3.5. It follows from 4.", {}, "correct"),
    ("1000", "The answer is 1,000. Done", {}, "correct"),
    ("3", "**Final Answer:** 3", {}, "correct"),
    ("3", "### Final Answer\n\n3", {}, "correct"),
    ("3", "**The answer is:** $3$", {}, "correct"),
    ("3", "The answer is:\n$$\n3\n$$", {}, "correct"),
    ("3", "The answer is 2. Wait. The answer is 3", {}, "correct"),
    ("2", "The answer is 2. Wait. The answer is 3", {}, "wrong"),
    ("3", "†Answer: 3", {}, "correct"),
    ("3", "因此，答案是3。", {}, "correct"),
    ("3", "I count 3 balls.", {}, "unparsed"),
    ("3", "", {}, "unparsed"),
    ("3", "The answer is", {}, "unparsed"),
    ("3", "I count 3 balls.", {"fallback": True}, "correct"),
    ("3", "So it is\n3", {"fallback": True}, "correct"),
    ("3", "The answer is not 3.", {}, "wrong"),
    ("3", "The answer is more than 3", {}, "wrong"),
    # multiple choice
    ("B", "The answer is B", {"options": CM}, "correct"),
    ("B", "The answer is (B).", {"options": CM}, "correct"),
    ("B", "The answer is b", {"options": CM}, "correct"),
    ("B", "The answer is B)", {"options": CM}, "correct"),
    ("B", "The answer is B: 12 cm", {"options": CM}, "correct"),
    ("B", "The answer is B. 12 cm", {"options": CM}, "correct"),
    ("B", "The answer is (B) 12 cm because (A) is too small.", {"options": CM}, "correct"),
    ("B", "The answer is (B), or rather (A)", {"options": CM}, "wrong"),
    ("B", "The answer is option B", {"options": CM}, "correct"),
    ("B", r"\boxed{\text{B}}", {"options": CM}, "correct"),
    ("B", "The answer is 12 cm.", {"options": CM}, "correct"),
    ("B", "The answer is 12", {"options": CM}, "correct"),
    ("12 cm", "The answer is B", {"options": CM}, "correct"),
    ("B", "The answer is 12 m", {"options": CM}, "wrong"),
    ("B", "The answer is (B) 15 cm", {"options": CM}, "wrong"),
    ("B", "The answer is A or B", {"options": CM}, "wrong"),
    ("B", "The answer is B and C", {"options": CM}, "wrong"),
    ("B", "The answer is E", {"options": CM}, "wrong"),
    ("B", "The answer is not B", {"options": CM}, "wrong"),
    ("A", "The answer is a blue cube", {"options": RED}, "wrong"),
    ("B", "The answer is A blue cube", {"options": RED}, "correct"),
    ("B", "The answer is that it must be the blue cube", {"options": RED}, "correct"),
    ("A", "The answer is the red or the blue cube", {"options": ("red", "blue")}, "wrong"),
    ("A", "The answer is anything but not the red ball", {"options": RED}, "wrong"),
    ("A", "The answer is red bal", {"options": RED}, "wrong"),
    ("B", "The answer is option D in the image is the answer", {"options": TALK}, "correct"),
    ("C", r"The answer is $\sqrt{2}$", {"options": ("2", "√{3}", "√{2}")}, "correct"),
    ("C", "The answer is A", {"options": ("5", "6", "5")}, "correct"),
    ("B", "The answer is no, there are not fewer", {"options": ("yes", "no")}, "correct"),
    ("B", "The correct option is B.", {"options": CM}, "correct"),
    ("A", "The answer is 2", {"options": ("2", "12", "20")}, "correct"),
    ("E", "The answer is B", {"options": CM}, "gold-unparsed"),
    # numbers
    ("-3", "The answer is −3", INTEGER, "correct"),
    ("-3", "The answer is - 3", INTEGER, "correct"),
    ("8,830", "The answer is 8830.0", INTEGER, "correct"),
    ("3", "The answer is 3.4", INTEGER, "wrong"),
    ("2014", "The answer is 2013", INTEGER, "wrong"),
    ("13", r"The answer is \$13.00", {}, "correct"),
    ("13", "The answer is €13", {}, "correct"),
    ("2", "The answer is two", INTEGER, "correct"),
    ("3", "The answer is three objects", INTEGER, "correct"),
    ("20", "The answer is twenty-one", INTEGER, "wrong"),
    ("3.30", "The answer is 3.3", FLOAT, "correct"),
    ("0.33", "The answer is 1/3", FLOAT, "correct"),
    ("1/3", "The answer is 0.33", {}, "wrong"),
    ("1.2", "The answer is 1.23", {**FLOAT, "precision": 1}, "correct"),
    ("1.2", "The answer is 1.26", {**FLOAT, "precision": 1}, "wrong"),
    ("1234.56", "The answer is 1234.66", FLOAT, "wrong"),
    ("1.5", "The answer is 1 1/2", {}, "correct"),
    ("1.5", r"The answer is 1\frac{1}{2}", {}, "correct"),
    ("0.5", r"The answer is \frac12", {}, "correct"),
    ("1.5", "The answer is 1½", {}, "correct"),
    ("10^4", "The answer is 10000", {}, "correct"),
    ("102", "The answer is 10²", {}, "wrong"),
    ("1500", "The answer is 1.5e3", {}, "correct"),
    ("20000", r"The answer is 2 \times 10^{4}", {}, "correct"),
    ("5", "The answer is x = 5", {}, "correct"),
    ("5", "The answer is x = 5 or x = 3", {}, "wrong"),
    ("5", "The answer is approximately 5 cm", {}, "correct"),
    ("5 cm", "The answer is 5", {}, "correct"),
    ("5 cm", "The answer is 5 m", {}, "wrong"),
    ("5 cm^2", "The answer is 5 square centimeters", {}, "correct"),
    ("5 cm", "The answer is 5 cm²", {}, "wrong"),
    ("0.5", "The answer is 50%", {}, "correct"),
    ("50%", "The answer is 0.5", {}, "correct"),
    ("50%", "The answer is 50", {}, "correct"),
    ("0.5", "The answer is 50", {}, "wrong"),
    ("69{degrees}", "The answer is 69°", {}, "correct"),
    (r"\frac{360}7", "The answer is 360/7", {}, "correct"),
    ("\x0crac{360}{7}", "The answer is 360/7", {}, "correct"),
    (r"\boxed{7}", "The answer is 7", {}, "correct"),
    ("45^2", "The answer is 2025", {}, "correct"),
    ("3", "The answer is 3 and 5", {}, "wrong"),
    ("2", "The answer is 2x+3", {}, "wrong"),
    ("7", "The answer is 7:30", {}, "wrong"),
    ("3!", "The answer is 3", {}, "wrong"),
    ("5", "The answer is 5 tenths", {}, "wrong"),
    ("12", "The answer is 12 months", {}, "correct"),
    ("1982", "The answer is 1982 with an income of 5", {}, "correct"),
    # math, ratios, times, lists
    ("25", r"The answer is 25\pi", {}, "wrong"),
    (r"25\pi", "The answer is 25π", {}, "correct"),
    (r"$5\sqrt{3}$", "The answer is 5*sqrt(3)", {}, "correct"),
    (r"5\sqrt{3}", "The answer is 5", {}, "wrong"),
    ("2x + 3", "The answer is 2x+3", {}, "correct"),
    ("3:4", "The answer is 3 : 4", {}, "correct"),
    ("3:4", "The answer is 3:5", {}, "wrong"),
    ("7:30", "The answer is 7:45.", {}, "wrong"),
    ("[2014, 2016]", "The answer is [2014,2016]", {}, "correct"),
    ("[2014, 2016]", "The answer is 2016", {}, "wrong"),
    ("2016", "The answer is [2014, 2016]", {}, "wrong"),
    ("[2014, 2016]", "The answer is [2016, 2014]", {}, "wrong"),
    ("(3, -4)", r"The answer is \left(3, −4\right)", {}, "correct"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", {}, "correct"),
    ("(3, 4]", "The answer is (3, 4)", {}, "wrong"),
    # yes or no, text
    ("yes", "The answer is Yes, because it is.", {}, "correct"),
    ("no", "The answer is yes and no", {}, "wrong"),
    ("no", "The answer is no idea", {}, "wrong"),
    ("True", "The answer is true", {"answer_type": "boolean"}, "correct"),
    ("right", "The answer is right.", {}, "correct"),
    ("Red  Ball", "The answer is the red ball.", {}, "correct"),
    ("red ball", "The answer is red", {}, "wrong"),
    ("ｆｕｌｌ", "The answer is full", {}, "correct"),
    ("St. Louis", "The answer is St. Louis. It lies there.", {}, "correct"),
    # golds that cannot be read
    ("", "The answer is 3", {}, "gold-unparsed"),
    ("several", "The answer is several", INTEGER, "gold-unparsed"),
    ("25π", "The answer is 25π", FLOAT, "gold-unparsed"),
    ("maybe", "The answer is maybe", {"answer_type": "boolean"}, "gold-unparsed"),
    ("B", "The answer is B", {"answer_type": "choice"}, "gold-unparsed"),
]


@pytest.mark.parametrize(("gold", "response", "kwargs", "verdict"), CASES)
def test_verdict(gold, response, kwargs, verdict):
    assert grade(response, gold, **kwargs).verdict == verdict


def test_grade_carries_answer_and_rule():
    assert grade("The answer is (B) 12 cm.", "A", options=CM) == Grade("wrong", "B", "marker")
    assert grade(r"\boxed{12\text{ cm}}", "12") == Grade("correct", "12 cm", "boxed")
    assert grade("none", "3") == Grade("unparsed", None, "none")
    assert grade("The answer is 3", "") == Grade("gold-unparsed", "3", "marker")
    assert grade("I count 3 of 5 balls, 4", "4", fallback=True).rule == "search"


def test_extract():
    assert extract("The answer is 3.5. So.") == "3.5"
    assert extract("The answer is B. 12 cm") == "B. 12 cm"
    assert extract("about 3\nor 4") is None
    assert extract("about 3\nor 4", fallback=True) == "or 4"
    assert extract(r"\boxed{a\boxed{b}} \boxed{c") == "b"


def test_equivalent_is_symmetric():
    for a, b, options, same in [
        ("0.33", "1/3", None, True),
        ("50%", "0.5", None, True),
        ("B", "(B) 12 cm", CM, True),
        ("B", "12", CM, True),
        ("B", "C", CM, False),
        ("nothing", "unclear", CM, False),
        ("two", "2", None, True),
        ("3:4", "3:5", None, False),
    ]:
        assert equivalent(a, b, options=options) == equivalent(b, a, options=options) == same


def test_as_gold_is_what_grade_can_read():
    for answer, options, answer_type, gold in [
        ("(B) 12 cm", CM, "choice", "B"),
        ("12", CM, "choice", "B"),
        ("A or B", CM, "choice", None),
        ("$\\frac{1}{2}$", None, "float", "1/2"),
        ("half", None, "float", None),
        ("Yes.", None, "boolean", "Yes"),
        ("The red ball.", None, "text", "The red ball"),
    ]:
        found = as_gold(answer, options=options, answer_type=answer_type)
        assert found == gold
        if found:
            text = f"The answer is {answer}"
            assert grade(text, found, options=options, answer_type=answer_type).verdict == "correct"


def test_kind():
    expected = {
        "4,656": "integer",
        "3.0": "float",
        "1/2": "math",
        "10^4": "math",
        "2π": "math",
        "No": "boolean",
    }
    assert {gold: kind(gold) for gold in expected} == expected
    assert kind("7:30") == kind("red ball") == "text"


@pytest.mark.parametrize(
    "text", ["25π", "3 and 5", "2x", "5a", "1-2", "3 of 4", "1/0", "9^999", "12/3/2020", "x"]
)
def test_no_number(text):
    assert number(text) is None


def test_every_gold_of_a_kind_answers_itself():
    rng = random.Random(0)
    for _ in range(2000):
        value = rng.choice([rng.randint(-(10**6), 10**6), round(rng.uniform(-100, 100), rng.randint(1, 5))])
        for gold in (str(value), f"{value:,}"):
            assert grade(f"The answer is {gold}.", gold, answer_type=kind(gold)).verdict == "correct"
            assert grade(f"The answer is {value + 1}.", gold, answer_type=kind(gold)).verdict == "wrong"


HOSTILE = [
    "\\boxed{" * 150_000,
    "{" * 10**6,
    "\\boxed{" + "{}" * 500_000 + "}",
    "the answer is " * 70_000,
    "answer" + " " * 10**6 + "is",
    "final answer" + "*" * 10**6,
    "The answer is " + "9" * 10**6,
    "The answer is " + "9^" * 10**5,
    "The answer is 9^999",
    "The answer is 1e999",
    "The answer is " + "1/" * 10**5,
    "The answer is " + "," * 10**6,
    "The answer is " + "(" * 10**6,
    "The answer is " + "[1, " * 10**5,
    "The answer is " + "[" * 150 + "]" * 150,
    "The answer is [[1, 2",
    r"The answer is \frac{}{} \frac{1}{} \sqrt{} \boxed{} \text{}",
    "The answer is " + "\\frac{" * 10**5,
    "The answer is " + "\ufdfa" * 10**5,
    "The answer is " + "1,000" * 10**5,
    "The answer is " + "about " * 10**5 + "3",
    "The answer is \ud800\0\x0c",
    "A" * 10**6,
    "\n" * 10**6,
    "The answer is ٣ ²³ ⁄ ½½½ Ⅷ ①",
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile_input_is_fast_and_raises_nothing(index):
    text = HOSTILE[index]
    start = time.perf_counter()
    for gold in ("3", "B", "[1, 2]", "red", "{1, 2}", text[-300:], text[14:300]):
        for options in (None, CM, (text[:500], "", "x")):
            for fallback in (False, True):
                grade(text, gold, options=options, fallback=fallback)
        equivalent(text, gold)
    assert time.perf_counter() - start < 2


def test_fuzz_raises_nothing():
    rng = random.Random(1)
    pieces = [
        *string.printable,
        *"−½²π√°％，：（）①Ⅷ٣答案是\ud800\ufdfa",
        "\\boxed{",
        "\\frac{",
        "\\text{",
        "The answer is ",
    ]
    pieces += [
        "answer:",
        "(B)",
        "option C",
        "1,000",
        "10^",
        "1e9",
        "3.5",
        "\\sqrt",
        "}",
        "$",
        "yes",
        "[1, 2]",
        "not ",
    ]
    start = time.perf_counter()
    for _ in range(4000):
        text, gold = ("".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(2))
        options = rng.choice([None, CM, RED, (gold, text, "")])
        answer_type = rng.choice([None, "choice", "integer", "float", "boolean", "math", "text"])
        kwargs = {"options": options, "answer_type": answer_type, "precision": rng.choice([None, 0, 2])}
        result = grade(text, gold, **kwargs, fallback=rng.random() < 0.5)
        assert result.verdict in ("correct", "wrong", "unparsed", "gold-unparsed")
        assert (result.answer is None) == (result.rule == "none")
        assert equivalent(text, gold, **kwargs) == equivalent(gold, text, **kwargs)
        tidy(text), choice(text, CM)
    assert time.perf_counter() - start < 20
