"""The published scorers of the paper's benchmarks, offline and deterministic.

A scorer says whether a response is right, and gives further verdicts by name. Where the published one asks a
language model to extract the answer, our rules take the model's place.

Sources: lupantech/MathVista (evaluation/calculate_score.py), LightChen233/M3CoT (utils/metric.py),
open-compass/VLMEvalKit (vlmeval/utils/matching_util.py, vlmeval/dataset/utils), EvolvingLMMs-Lab/lmms-eval.
"""

import math
import re
from collections.abc import Callable, Sequence

from mstar_jax.answers import check
from mstar_jax.evaluate.items import Item
from mstar_jax.evaluate.tables import LETTERS

Verdicts = tuple[bool, dict[str, bool]]
Scorer = Callable[[Item, str, check.Grade], Verdicts]  # of a response's text and its grade with fallback

# ---- 1. VLMEvalKit's matching of a reply with an option -----------------------------------------------

_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def infer(reply: str, options: Sequence[str]) -> str | None:
    """VLMEvalKit's `can_infer`: the letter of the option that a reply names, `Z` for a refusal, else None.

    A reply names an option if one option letter alone occurs, among its last four words; or by the first
    `answer is B`; or if it is at most twice as long as all options and contains the text of exactly one. The
    article `A` counts as a letter.
    """
    letters = LETTERS[: len(options)]
    if _FAILED not in reply:
        if any(refusal in reply for refusal in _REFUSALS):
            return "Z"
        words = reply.translate(_PUNCTUATION).split()
        named = [letter for letter in letters if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and "Z" in words:
            return "Z"
        if (m := _ANSWER_IS.search(reply)) and m[1].upper() in letters:
            return m[1].upper()
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, options)):
        return None
    found = [letter for letter, option in zip(letters, options) if option.lower() in reply]
    return found[0] if len(found) == 1 else None


def exact_matching(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """VLMEvalKit without a judge model, applied to the marked answer; to the whole reply as a variant."""
    options = item.query.options or ()
    gold = item.query.answer
    marked = check.extract(text)
    right = infer(text if marked is None else marked, options) == gold
    return right, {"whole_reply": infer(text, options) == gold}


# ---- 2. MathVista -------------------------------------------------------------------------------------

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def _number(text: str, to: type[int] | type[float]) -> int | float | None:
    try:
        return to(text)
    except ValueError:
        return None


def normalize(extraction: str, item: Item) -> str | None:
    """MathVista's normal form of an extracted answer: the text of an option, or a number as a string.

    An answer that is no option becomes the closest option by edit distance; an unreadable number, None.

    Raises:
      ImportError: rapidfuzz is not installed.
    """
    if item.query.options:
        options = item.query.options
        extraction = extraction.strip()
        if m := _BRACKETED.search(extraction):
            extraction = m[1].upper()
        if extraction in list(LETTERS[: len(options)]):
            return options[LETTERS.index(extraction)]
        try:
            from rapidfuzz.distance import Levenshtein
        except ImportError as error:
            hint = "pip install 'mstar_jax[benchmarks]'"
            raise ImportError(f"MathVista's official score needs rapidfuzz: {hint}") from error
        return min(options, key=lambda option: Levenshtein.distance(extraction, option))
    if item.query.answer_type not in ("integer", "float"):
        return extraction
    number = _number(extraction, float)
    if number is None:
        return None
    if item.query.answer_type == "float":
        return str(round(number, item.query.precision)) if math.isfinite(number) else str(number)
    return str(int(number)) if math.isfinite(number) else None


def mathvista(item: Item, text: str, loose: check.Grade) -> Verdicts:
    query = item.query
    extraction = loose.answer or ""
    options = query.options or ()
    gold = query.answer or ""
    if not text or text in options:
        extraction = text
    elif query.answer_type in ("integer", "float"):
        whole = _number(text, int if query.answer_type == "integer" else float)
        extraction = extraction if whole is None else str(whole)
    right = normalize(extraction, item) == (options[LETTERS.index(gold)] if options else gold)
    unread = bool(options) and not extraction.strip()
    return right, {"ignore_empty": right and not unread, "vlmevalkit": _vlmevalkit(item, text, extraction)}


def mathv360k(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """It has none of its own: MathVista's, and our equality for numbers: no row says their precision."""
    right, variants = mathvista(item, text, loose)
    if item.query.options or item.query.answer_type not in ("integer", "float"):
        return right, variants
    right = loose.verdict == "correct"
    return right, {**variants, "ignore_empty": right}


def _vlmevalkit(item: Item, text: str, extraction: str) -> bool:
    """VLMEvalKit's MathVista score: no edit distance, no rounding; a list is never right (as published)."""
    query = item.query
    if query.options:
        return (infer(text, query.options) or infer(extraction, query.options)) == query.answer
    if query.answer_type not in ("integer", "float"):
        return False
    to = int if query.answer_type == "integer" else float
    gold = _number(query.answer or "", to)
    return gold is not None and gold in (_number(text, to), _number(extraction, to))


# ---- 3. M3CoT -----------------------------------------------------------------------------------------

_PAUSES = str.maketrans(dict.fromkeys("\n.,!?", " "))


def m3cot(item: Item, text: str, loose: check.Grade) -> Verdicts:
    """M3CoT's judge: the last `(B)`, or the last option whose text occurs, or whose letter is a word."""
    if "[Answer]" in text:
        text = text.rpartition("[Answer]")[2].partition("[Rationale]")[0].partition("[Context]")[0]
    if found := _BRACKETED.findall(text):
        return found[-1].upper() == item.query.answer, {}
    options = list(zip(LETTERS, item.query.options or ()))
    mentioned = [letter for letter, option in options if option.lower() in text.lower()]
    words = text.translate(_PAUSES).split(" ")
    mentioned = mentioned or [letter for letter, _ in options if letter in words]
    mentioned = mentioned or [letter for letter, _ in options if letter.lower() in words]
    return bool(mentioned) and mentioned[-1] == item.query.answer, {}
