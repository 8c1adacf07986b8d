r"""The published scorers of MathVerse, MATH-Vision, We-Math, MMMU and Geometry3K, as in official.py.

Nothing that a model wrote is evaluated: where MATH-Vision's scorer runs the Python that latex2sympy makes of
an answer, `formulas.arithmetic` reads its value. A guess at random, MMMU's for a choice that cannot be read,
is no credit.

Sources: ZrrSkywalker/MathVerse (evaluation/score_answer_s2.py), mathllm/MATH-V (evaluation/evaluate.py,
utils.py), We-Math/We-Math (evaluation/four_dimensional_metrics.py), MMMU-Benchmark/MMMU
(mmmu/utils/eval_utils.py), EvolvingLMMs-Lab/lmms-eval (tasks/geometry3k/utils.py).
"""

import re
from fractions import Fraction

from mstar_jax.answers import check
from mstar_jax.answers.extraction import boxed
from mstar_jax.answers.formulas import arithmetic
from mstar_jax.answers.text import tidy
from mstar_jax.evaluate.items import Item
from mstar_jax.evaluate.official import Verdicts
from mstar_jax.evaluate.tables import LETTERS, texts

# ---- 1. MathVerse -------------------------------------------------------------------------------------


def mathverse(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """Our rules in place of GPT's extraction and of its judgement; `quick_match` is the published equality of
    the extracted text and the answer."""
    quick = loose.answer == item.record["answer"].strip()
    return quick or loose.verdict == "correct", {"quick_match": quick}


# ---- 2. MATH-Vision -----------------------------------------------------------------------------------

_SAID = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOX = re.compile(r"oxed{(.*)}", re.DOTALL)
_REPLACED = (  # in this order
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", "")),
    *((gone, "") for gone in ("\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ")),
    *((gone, "") for gone in ("{m}^3", "m^3", "{units}", "units", "{km}", "km", "\\!", "\\$", "$", "\\%")),
    *(("tfrac", "frac"), ("dfrac", "frac")),
)


def mathvision(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """The letter or value that the reply ends with or boxes, equal to the answer to two decimals."""
    options = item.query.options or ()
    golds = [item.record.get("answer", "")]
    golds += [options[LETTERS.index(item.query.answer or "")]] if options else []
    said = stated(text)
    return any(_same(gold, said) for gold in golds), {}


def stated(text: str) -> str:
    """MATH-Vision's answer of a reply, in lower case and without spaces and units."""
    text = text.strip()
    for letter in LETTERS[:5]:
        heads = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(heads):
            text = letter
    last = text.rpartition("is ")[2].rstrip(".")
    if _float(last) is not None:
        text = last
    if "oxed{" not in text:
        for said in (flag for low in _SAID for flag in (low, "The" + low[3:])):
            found = said in text
            text = text.rpartition(said)[2].strip()
            text = text.partition("\n")[0].partition(". ")[0] if found else text
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.rpartition("oxed{")[2]
    text = text.lower().replace("{}", "")
    boxes = _BOX.findall(text)
    text = boxes[-1] if boxes else text
    opening, closing = text.find("{"), text.find("}")
    if closing != -1 and (opening == -1 or closing < opening):
        text = text[:closing]
    text = text.rpartition("=")[2].rpartition("\\approx")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = f"0{text}" if text.startswith(".") else text
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return text.rstrip(".").lstrip(":").strip()


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _same(gold: str, said: str) -> bool:
    gold, said = gold.lower(), said.lower()
    if not gold.strip() or not said.strip():
        return False
    return gold.strip() == said.strip() or _values(gold) == _values(said) is not None


def _values(text: str) -> tuple[str, list[str | float]] | None:
    """(brackets, values to two decimals) of a number or of a list in brackets; None of anything else."""
    text = tidy(text)
    brackets = text[:1] + text[-1:]
    listed = brackets in ("()", "[]") and "," in text
    found: list[str | float] = []
    for part in text[1:-1].split(",") if listed else [text]:
        value = _worth(part)
        if listed and "infty" in part:
            found.append(part)
        elif value is None or abs(value) > 1e300:  # a product of powers may be larger than any float
            return None
        else:
            found.append(round(float(value), 2))
    return brackets if listed else "", found


def _worth(text: str) -> Fraction | None:
    """Its value; a colon divides, as for latex2sympy: 3:2 is 1.5, and 7:30 is 0.23."""
    if ":" not in text or re.search(r"\S\s*[-+]", text):
        return arithmetic(text)
    worth, *others = (arithmetic(part) for part in text.split(":"))
    for part in others:
        worth = worth / part if worth is not None and part else None
    return worth


# ---- 3. We-Math ---------------------------------------------------------------------------------------

_AROUND = str.maketrans(dict.fromkeys("<>:."))


def wemath(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """The first letter after the last `Answer`, as the official prompt asks: `<Answer>: <<B>>`. A reply
    without the word is read from its beginning."""
    said = text.rpartition("Answer")[2].strip().translate(_AROUND).strip()
    return said[:1] == item.query.answer, {}


# ---- 4. MMMU ------------------------------------------------------------------------------------------

_NUMBERS = (  # with commas, in powers of ten, others
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """The last option named; of an open question, any number or phrase of its key sentences."""
    query = item.query
    if query.options:
        return chosen(text, query.options) == query.answer, {}
    answer = item.record["answer"]
    golds = [form for gold in (texts(answer) or [answer]) for form in _forms(gold)]
    found = [form for said in key_phrases(text) for form in _forms(said)]
    words = [gold for gold in golds if isinstance(gold, str)]
    right = any(
        any(word in said for word in words) if isinstance(said, str) else said in golds for said in found
    )
    return right, {}


def chosen(text: str, options: tuple[str, ...]) -> str | None:
    """MMMU's letter of a reply: the last `(B)`; else the last ` B `; else the option whose text comes last,
    if there are more than five words."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for style in ("({})", " {} "):
        if found := [(text.rfind(style.format(x)), x) for x in letters if style.format(x) in text]:
            return max(found)[1]
    places = [(text.lower().rfind(option.lower()), x) for x, option in zip(letters, options)]
    places = [(at, x) for at, x in places if at >= 0] if len(text.split()) > 5 else []
    return min(places, key=lambda place: (-place[0], place[1]))[1] if places else None


def key_phrases(text: str) -> list[str]:
    """What follows the last key word of each line, the shortest where several fit, and all numbers in it."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")  # sentences end before a capital letter, and there is none
    phrases = []
    for number, line in enumerate(lines, 1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        tails = [line.rpartition(key)[2].strip() for key in keys if key in line]
        shortest = ""
        for tail in tails:  # an empty one gives way to the next
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in tuple(":,.!?;'"):
            phrases.append(shortest)
    phrases = phrases or [text]
    return phrases + [m for phrase in phrases for pattern in _NUMBERS for m in pattern.findall(phrase)]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals; a text in lower case, a single letter with a space on either side."""
    text = text.strip()
    value = _float(text.replace(",", ""))
    if value is not None:
        return [round(value, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# ---- 5. Geometry3K ------------------------------------------------------------------------------------

_LETTERED = (
    re.compile(r"[Aa]nswer\s*[:=]\s*\(?([A-Da-d])\)?"),
    re.compile(r"\b([A-Da-d])\s*[.)\]]"),
    re.compile(r"^\s*\(?([A-Da-d])\)?$"),
    re.compile(r"\b([A-Da-d])\b"),
)


def geometry3k(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """lmms-eval's letter of a reply (the article `a` counts as one), else the first option that it contains.
    Without choices, the content of the last box, equal by our rules."""
    query = item.query
    if not query.options:
        found = boxed(text)
        same = found is not None and check.equivalent(
            found, query.answer or "", answer_type=query.answer_type, precision=query.precision
        )
        return same, {}
    text = text.strip()
    for pattern in _LETTERED:
        if letters := pattern.findall(text):
            return letters[-1].upper() == query.answer, {}
    held = [x for x, option in zip(LETTERS, query.options) if option.lower() in text.lower()]
    return bool(held) and held[0] == query.answer, {}
