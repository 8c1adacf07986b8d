"""Answer checking: hand-checked cases, what `grade` and its neighbours return, hostile and random input."""

import random
import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from answer_cases import FALSE, FOUND, MARKED, RESPONSES

from mstar_jax.answers import symbolic, units
from mstar_jax.answers.check import Grade, as_gold, equivalent, extract, grade
from mstar_jax.answers.values import kind, number, tidy

CM = ("10 cm", "12 cm", "15 cm", "120 cm")
RED = ("red ball", "blue cube", "green cone")
VERDICTS = ("correct", "wrong", "unparsed", "gold-unparsed")
CASES = [(gold, f"The answer is {said}", *rest) for gold, said, *rest in MARKED + FOUND] + RESPONSES


@pytest.mark.parametrize(("gold", "response", "verdict", "kwargs", "why"), CASES)
def test_verdict(gold, response, verdict, kwargs, why):
    assert grade(response, gold, **kwargs).verdict == verdict, why


@pytest.mark.parametrize("kind", FALSE)
def test_no_false_reward(kind):
    rewarded = [
        (gold, said)
        for gold, kwargs, responses in FALSE[kind]
        for said in responses
        if grade(re.sub("^M ", "The answer is ", said), gold, **kwargs).verdict not in ("wrong", "unparsed")
    ]
    assert not rewarded


def test_cases_are_many_and_of_every_verdict():
    verdicts = [verdict for _, _, verdict, _, _ in CASES]
    assert len(verdicts) >= 300 and all(verdicts.count(v) >= 15 for v in VERDICTS)
    assert 0.3 < verdicts.count("correct") / len(verdicts) < 0.6
    keys = [(gold, response, str(kwargs)) for gold, response, _, kwargs, _ in CASES]
    assert len(set(keys)) == len(keys)


def test_what_is_correct_votes_for_the_gold():
    for gold, said, verdict, kwargs, why in MARKED:
        answer = extract(f"The answer is {said}", options=kwargs.get("options"))
        if verdict == "correct":
            assert equivalent(gold, answer, **kwargs) and equivalent(answer, gold, **kwargs), why


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
        ("several", None, "float", None),
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


@pytest.fixture(scope="module", autouse=True)
def worker():
    """The algebra's process is up: that takes longer than the inputs below may."""
    assert symbolic.equal("2x+x", "3x")


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
    start = time.process_time()
    for gold in ("3", "B", "[1, 2]", "red", "{1, 2}", text[-300:], text[14:300]):
        for options in (None, CM, (text[:500], "", "x")):
            for fallback in (False, True):
                grade(text, gold, options=options, fallback=fallback)
        equivalent(text, gold)
    assert time.process_time() - start < 2  # others may use this machine


# ---- random input ---------------------------------------------------------------------------------------

PIECES = (
    *("\\boxed{", "\\frac{", "\\sqrt{", "\\sqrt", "\\text{", "\\left(", "\\cdot", "\\pi", "}", "{", "$"),
    *("The answer is ", "answer:", "Final answer\n", "答案是", "选项", "[Answer]\n", "Therefore ", "**"),
    *("(B)", "option C", "A", "b)", "yes", "no", "not ", "12 cm", "red ball", "and", "or", ",", ". ", " "),
    *("1,000", "10^", "^", "9^9^9", "^{99}", "1e9", "1e999", "3.5", "-", "−", "½", "²", "٣", "Ⅷ", "x", "y"),
    *("9" * 300, "(" * 40, ")" * 40, "!", "!!", "/", "0", "1/0", "∪", "∞", "=", "<", "≤", "7:30", "3:4"),
    *("__import__('os').system('true')", "eval(1)", "lambda: 0", "x.__class__", "\\input{/etc/passwd}"),
    *("\ud800", "\ufdfa", "\u202e", "\x0c", "\ufeff", "\0", "\n", "[1, 2]", "{1, 2}", "①", "%", "°"),
    "\\begin{pmatrix}1&2\\end{pmatrix}",
)
TOWER = st.integers(1, 40).map(lambda n: "^".join(["9"] * n))
NESTED = st.tuples(
    st.sampled_from(("\\frac{1}{", "\\sqrt{", "\\boxed{", "(", "[", "|")), st.integers(1, 80)
).map(lambda pair: "The answer is " + pair[0] * pair[1] + "x" + "})]|"[pair[1] % 4] * pair[1])
HUGE = st.integers(0, 10**400).map(str)
FORMULA = st.lists(
    st.sampled_from(("x", "y", "2", "3", "+", "-", "*", "/", "^2", "^{99}", "(", ")", "√2", "!", "="))
)
SOUP = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
TEXTS = st.one_of(SOUP, st.text(max_size=200), TOWER, NESTED, HUGE, FORMULA.map("".join))
ARGUMENTS = st.fixed_dictionaries(
    {
        "options": st.sampled_from(
            (None, None, CM, RED, ("a", "", "x"), ("Aa", "AA"), ("the answer is option B",))
        ),
        "answer_type": st.sampled_from(
            (None, "choice", "integer", "float", "boolean", "math", "text", "list")
        ),
        "precision": st.sampled_from((None, 0, 2, -1, 10**6)),
    }
)


def check(text: str, gold: str, kwargs: dict, fallback: bool, prefix: str, clock=time.perf_counter) -> float:
    """Asserts what holds of any input, and returns the seconds of the slowest call."""
    start = clock()
    result = grade(prefix + text, gold, **kwargs, fallback=fallback)
    middle = clock()
    assert result.verdict in VERDICTS
    assert (result.answer is None) == (result.rule == "none")
    assert equivalent(text, gold, **kwargs) == equivalent(gold, text, **kwargs)
    assert tidy(text) is not None
    return max(middle - start, (clock() - middle) / 2)


INPUT = (TEXTS, TEXTS, ARGUMENTS, st.booleans(), st.sampled_from(("", "The answer is ", "\\boxed{")))


@hypothesis.settings(max_examples=600, deadline=None, derandomize=True, database=None)
@hypothesis.given(*INPUT)
def test_random_input_has_a_verdict(text, gold, kwargs, fallback, prefix):
    assert check(text, gold, kwargs, fallback, prefix, time.thread_time) < 2  # others may use this machine


# ---- what is never correct --------------------------------------------------------------------------------

NEVER = hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
VALUE = st.integers(0, 10**6)
DENIALS = (
    ", which is wrong", " which is not right", " is wrong", " is not the answer", " (incorrect)", ", maybe",
    "?", "不对", " 错", ", but that is false", ", or not", " isn't it", ", which cannot be",
)  # fmt: skip
UNKNOWN = st.one_of(
    st.sampled_from(
        ("万", "亿", "以上", "左右", "多", " lakh", " crore", " cubed", " a.m.", " p.m.", "k", "-ish", "!")
    ),
    st.sampled_from(
        (" dozen", " or so", " squared", "th", " thirds", " pairs", "x", "π", "^2", "e5", " to 9", ":30")
    ),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=2, max_size=6).filter(
        lambda text: units.unit(text) is None
    ),
    st.text("bcdfghjkqvwz", min_size=3, max_size=9).map(" {}".format),
)


@NEVER
@hypothesis.given(VALUE, st.sampled_from(DENIALS))
def test_a_denied_value_is_never_correct(value, denial):
    assert grade(f"The answer is {value}{denial}", str(value)).verdict != "correct"


@NEVER
@hypothesis.given(st.integers(2, 10**6), UNKNOWN)
def test_unknown_text_after_a_number_is_never_correct(value, text):
    assert grade(f"The answer is {value}{text}", str(value)).verdict != "correct"
    assert grade(rf"\boxed{{{value}{text}}}", str(value)).verdict != "correct"


@NEVER
@hypothesis.given(
    VALUE, st.sampled_from(("<", ">", "<=", ">=", "!=", "≠", "≤", "≥", r"\le", r"\geq", r"\neq", "=<"))
)
def test_a_bound_is_never_a_value(value, sign):
    for text in (f"x {sign} {value}", f"{sign} {value}", f"{value} {sign} x", f"2y {sign} {value}"):
        assert grade(f"The answer is {text}", str(value)).verdict != "correct"
        assert grade(f"The answer is {value}", text).verdict != "correct"


@NEVER
@hypothesis.given(VALUE, VALUE)
def test_a_false_equation_is_never_correct(left, right):
    hypothesis.assume(left != right)
    for text in (
        f"{left} = {right}",
        f"x = {left} = {right}",
        f"{left} + 1 = {right + 1}",
        f"{left}·2 = {2 * right}",
    ):
        gold = text.rpartition("=")[2].strip()
        assert grade(f"The answer is {text}", gold).verdict != "correct"


@NEVER
@hypothesis.given(SOUP, VALUE, st.sampled_from(("<think>", "<thinking>", "< Think >", "[THINK]", "◁think▷")))
def test_an_open_think_block_says_nothing(text, value, tag):
    for said in (f"The answer is {value}", rf"\boxed{{{value}}}", f"<answer>{value}</answer>"):
        assert grade(f"{text}{tag} so {said}", str(value)).verdict == "unparsed"


@NEVER
@hypothesis.given(
    st.sampled_from("ABCD"),
    st.sampled_from("ABCD"),
    st.sampled_from((CM, (*RED, "pink ring"), ("Rome", "Cairo", "Tokyo", "Paris"))),
    st.sampled_from(
        ("{text} ({letter})", "{text}, option {letter}", "{text}, which is {letter}", "{text} [{letter}]")
        + ("({letter}) {text}", "{letter}. {text}", "{letter}: {text}", "option {letter}, {text}")
        + ("{letter} = {text}", "{letter}, i.e. {text}")
    ),
)
def test_a_contradicting_letter_is_never_correct(letter, other, options, form):
    said = form.format(letter=letter, text=options["ABCD".index(other)])
    for gold in "ABCD":
        verdict = grade(f"The answer is {said}.", gold, options=options).verdict
        assert verdict == ("correct" if letter == other == gold else "wrong"), said


NUMBERS = st.lists(st.integers(2, 999), min_size=3, max_size=4, unique=True)
GOLDS = st.one_of(  # of all kinds
    st.integers(-999, 10**6).map(str),
    st.tuples(st.integers(0, 999), st.integers(1, 99)).map(lambda pair: f"{pair[0]}.{pair[1]:02}"),
    st.tuples(st.integers(1, 99), st.integers(2, 99)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.sampled_from(
        ("yes", "no", "2√3", "(3, 4)", "7:30", "3:4", "x^2+1", "red ball", "5 cm", "50%", "{1, 2}")
    ),
)


@NEVER
@hypothesis.given(
    NUMBERS,
    st.integers(0, 2),
    st.integers(0, 1500),
    st.sampled_from(("", " cm", "%", "°")),
    st.sampled_from(
        (
            "({letter}) {value}",
            "{letter}. {value}",
            "{letter}: {value}",
            "{value} ({letter})",
            "{letter}, {value}",
        )
        + ("option {letter}, {value}", "{letter} = {value}", "{letter}, i.e. {value}", "{letter} — {value}")
        + ("**{letter}** {value}", "({letter}) x = {value}", "({letter}) {value}, as shown")
    ),
)
def test_a_letter_beside_another_value_is_never_correct(numbers, at, value, unit, form):
    """Whether that value is another option's or none's."""
    options = tuple(f"{number}{unit}" for number in numbers)
    letter = "ABCD"[at]
    said = form.format(letter=letter, value=f"{value}{unit}")
    for response in (f"The answer is {said}.", rf"\boxed{{{said}}}", f"<answer>{said}</answer>"):
        for gold in "ABCD"[: len(options)]:
            right = value == numbers[at] and gold == letter
            if not right:
                assert grade(response, gold, options=options).verdict != "correct", (response, gold)
    if "**" not in form and "—" not in form and "x =" not in form:
        own = form.format(letter=letter, value=options[at])
        assert grade(f"The answer is {own}", letter, options=options).verdict == "correct", own


TWO = (
    (
        "{} or {}",
        "{} and {}",
        "{}, {}",
        "{}/{}",
        "{} & {}",
        "{}; {}",
        "{} as well as {}",
        "{}, or maybe {}",
        "{}或{}",
    )
    + (
        "{}、{}",
        "{} ({} is also possible)",
        "{}, but {} could be right too",
        "either {} or {}",
        "both {} and {}",
    )
    + (
        "{} in the first case and {} in the second",
        "{}... no, {}",
        "{}. No, wait, {}",
        "{}. Actually, {}",
        "{}\n{}",
    )
    + (
        "{} if it rains, else {}",
        "{}, alternatively {}",
        "{} → {}",
        "({})\n({})",
        "{} - {}",
        "{} = {}",
        "{}+{}",
    )
)


@NEVER
@hypothesis.given(st.permutations("ABCD"), st.sampled_from(TWO), st.one_of(st.just(RED), st.just(CM)))
def test_two_letters_are_never_correct(letters, form, options):
    letters = [letter for letter in letters if letter in "ABCD"[: len(options)]]
    for response in ("The answer is {}.", "Answer: {}", r"\boxed{{{}}}", "<answer>{}</answer>"):
        said = response.format(form.format(*letters[:2]))
        for gold in letters:
            assert grade(said, gold, options=options).verdict != "correct", (said, gold)


BACK = (
    "No, wait, that is wrong.",
    "Wait, I misread the axis.",
    "Actually it is not.",
    "Hmm, let me see.",
    "Oops.",
) + ("That's wrong.", "That is not right.", "No, it is 7777.", "不对，应该是7777", "I made a mistake there.")


@NEVER
@hypothesis.given(GOLDS, st.sampled_from(BACK), st.sampled_from((". ", ".\n", ".\n\n", "! ", " ... ")))
def test_what_is_taken_back_is_never_correct(gold, back, between):
    for said in (
        f"The answer is {gold}",
        rf"So \boxed{{{gold}}}",
        f"<answer>{gold}</answer>",
        f"答案是{gold}",
    ):
        assert grade(said + between + back, gold).verdict != "correct", said + between + back


BEFORE = (
    ("If the answer is {}, then x is 2.", "Suppose the answer is {}.", "I do not think the answer is {}.")
    + (
        "I'm not sure that the answer is {}.",
        "I doubt the answer is {}.",
        "The wrong answer is {}.",
        "Whether the ",
    )
    + (
        "Assuming that the final answer is {}, we fail.",
        "An incorrect answer: {}",
        "错误的答案是{}",
        "如果答案是{}",
    )
)


@NEVER
@hypothesis.given(GOLDS, st.sampled_from(BEFORE))
def test_what_is_supposed_or_denied_is_no_answer(gold, form):
    assert grade(form.format(gold), gold).verdict == "unparsed"


@NEVER
@hypothesis.given(
    GOLDS, st.sampled_from((*DENIALS, " if it rains", " unless it rains", ", if x is positive"))
)
def test_a_denied_answer_of_any_kind_is_never_correct(gold, denial):
    assert grade(f"The answer is {gold}{denial}", gold).verdict != "correct"
    assert grade(f"The answer is B{denial}", "B", options=CM).verdict != "correct"
    assert grade(f"The answer is the blue cube{denial}", "B", options=RED).verdict != "correct"


FORMS = (  # of the same answer
    (
        "The answer is {}",
        "The answer is {}.",
        "Final answer: {}",
        "**Answer:** {}",
        "## Answer\n\n{}",
        "答案是{}。",
    )
    + (
        r"$\boxed{{{}}}$",
        "<answer>{}</answer>",
        "The answer is **{}**.",
        "The answer is ${}$.",
        "So the answer equals {}.",
    )
    + ("<think>Or 7777? The answer is 7777.</think> The answer is {}", "The answer is:\n\n{}", r"\fbox{{{}}}")
    + (
        "The answer is {} ✓",
        "The answer is <b>{}</b>",
        r"\[\boxed{{{}}}\]",
        "The answer is {}</s>",
        "#### {}",
    )
)


@NEVER
@hypothesis.given(GOLDS, st.sampled_from(FORMS))
def test_an_answer_is_the_same_in_every_form(gold, form):
    assert grade(form.format(gold), gold).verdict == "correct", form
    assert grade(form.format("7777"), gold).verdict != "correct"


@NEVER
@hypothesis.given(st.integers(0, 10**7), st.data())
def test_a_value_is_the_same_in_every_spelling(value, data):
    wide = str(value).translate({ord("0") + i: 0xFF10 + i for i in range(10)})
    spellings = [
        f"{value:,}",
        f"{value}.0",
        f"x = {value}",
        f"{value} cm",
        wide,
        rf"\text{{{value}}}",
        f"{value} units",
    ]
    spellings += [
        f"{value:,}".replace(",", "'"),
        rf"{value}\text{{ cm}}",
        f"approximately {value}",
        f"({value})",
    ]
    spellings += [
        f"{value:,}".replace(",", r"\,"),
        f"{value:,}".replace(",", "{,}"),
        f"{value}, not {value + 1}",
    ]
    spellings += [
        rf"\mathbf{{{value}}}",
        f"{value} (see above)",
        f"{value}, since it fits",
        f"about ${value}",
    ]
    if value < 100:
        tens, ones = divmod(value, 10)
        chinese = "零一二三四五六七八九"
        spellings.append(
            chinese[value]
            if value < 10
            else f"{chinese[tens] if tens > 1 else ''}十{chinese[ones] if ones else ''}"
        )
    said = data.draw(st.sampled_from(spellings))
    assert grade(f"The answer is {said}", str(value)).verdict == "correct", said
    assert grade(f"The answer is {said}", str(value + 1)).verdict == "wrong", said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_000_random_inputs_have_a_verdict():
    busy, waited = [], []

    @hypothesis.settings(
        max_examples=100_000, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(*INPUT)
    def run(text, gold, kwargs, fallback, prefix):
        start = time.perf_counter()
        busy.append(check(text, gold, kwargs, fallback, prefix, time.thread_time))
        waited.append(time.perf_counter() - start)

    start = time.perf_counter()
    run()
    print(
        f"{len(busy)} inputs in {time.perf_counter() - start:.0f} s; at most {max(busy):.3f} s of processor"
    )
    print(f"time a call, and {max(waited):.3f} s of wall time an input, with the algebra's worker")
    assert len(busy) >= 100_000 and max(busy) < 2  # a worker's start on a busy machine takes seconds
