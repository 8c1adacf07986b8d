r"""Answer checking: extract the final answer of a response, read it, compare it with the gold answer.

    grade(r"... so x = 4. The answer is \boxed{4}", "4").verdict             -> "correct"
    grade("The answer is (B) 12 cm.", "B", options=("10 cm", "12 cm"))       -> "correct", answer "B"
    grade("I think it is 4", "4").verdict                                    -> "unparsed" (no marker)

The checker decides the reward, so in doubt the answer is not correct: it has to be marked, a number has to
stand alone with at most a unit, an option is never guessed from similar spelling. `fallback=True` also looks
for an answer without a marker; that is for a number reported separately, never for training.

A verdict is one of
  `correct`        the marked answer equals the gold answer
  `wrong`          the marked answer does not equal it
  `unparsed`       no answer is marked, or only a sentence that mentions one
  `gold-unparsed`  the gold answer itself cannot be read as its type; never rewarded
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from mstar_jax.answers.choices import (
    LETTERS,
    THEREFORE,
    choice,
    hushed,
    lettered,
    mentioned,
    mentions_only,
    search,
    table,
)
from mstar_jax.answers.equality import same
from mstar_jax.answers.extraction import Marked, boxed, ending, last_line, marked
from mstar_jax.answers.values import LINE, boolean, number, plain, sentence, tidy
from mstar_jax.answers.words import NUMBER_WORDS


@dataclasses.dataclass(frozen=True)
class Grade:
    """Result of `grade`.

    Attributes:
      verdict: `correct`, `wrong`, `unparsed` or `gold-unparsed`.
      answer: the extracted answer, an option's letter where one was recognised; None where unparsed.
      rule: how it was found: `tag`, `boxed`, `marker`, `none`; with fallback `last line`, `search`.
    """

    verdict: str
    answer: str | None
    rule: str


# ---- 1. extraction ------------------------------------------------------------------------------------


def extract(text: str, *, options: Sequence[str] | None = None, fallback: bool = False) -> str | None:
    """The marked final answer of a response as plain text, None where there is none.

    The last `<answer>` tag wins; else the last balanced \\boxed{}; else the last `the answer is`, `answer:`,
    `final answer`, `correct option is` ..., up to the end of its sentence; else, with `fallback`, the last
    line. Think blocks never count. The text of one of the `options` that itself talks about answers is not
    a second answer when it follows its letter.
    """
    text = ending(text)
    if options:
        text = hushed(text, tuple(options[: len(LETTERS)]))
    found = marked(text)
    if found is None:
        return (tidy(last_line(text)) or None) if fallback else None
    return tidy(found.said if found.rule == "boxed" else sentence(found.said)) or None


# ---- 2. fallback ----------------------------------------------------------------------------------------

_N = (
    r"(?<![\w.,])(?:[-+]\s?(?=[\d$]))?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30})(?:\.\d{1,30})?(?:/\d{1,9})?%?"
    rf"(?![\d:])|\b(?:{'|'.join(NUMBER_WORDS)})\b(?!-))"
)
_ANY_NUMBER = re.compile(_N, re.IGNORECASE)
_BOLD = re.compile(rf"\*\*[^*\d]{{0,12}}({_N})[^*\n]{{0,24}}\*\*", re.IGNORECASE)
_STATED = re.compile(
    r"(?:=|≈|\b(?:is|are|was|were|be|equals?|has|have|costs?|spend|spends|takes?|need|needs|left with))"
    r"(?:\s+(?:about|approximately|around|roughly|only|exactly|also|a total of|equal to)){0,2}"
    rf"\s{{0,3}}({_N})",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\(?[A-Z][).:]")
_LETTERED = re.compile(r"\(?([A-Za-z])(?:\)|[.):](?=\s))?\s*(.*)")
_BREAK = re.compile(r"\n+|(?<=[^\s.][.!?])\s+|(?<=[。！？])")


def _sentences(text: str) -> list[str]:
    return [part[:LINE] for part in _BREAK.split(text) if part and part.strip()][-64:]


def _number(sentences: list[str]) -> str | None:
    """The number that an unmarked response settles on.

    The number in the last conclusion (therefore, so ...) that has one; else the last in bold type; else the
    one that the last sentence states (`there are three`); else the last number.
    """
    for line in reversed(sentences):
        if THEREFORE.search(line) and (found := _stated(line)):
            return found
    text = "\n".join(sentences)
    if bold := _BOLD.findall(text):
        return bold[-1]
    return (_stated(sentences[-1]) if sentences else None) or next(reversed(_ANY_NUMBER.findall(text)), None)


def _stated(line: str) -> str | None:
    """The number that a sentence states: in bold, else after its last `is` or `=`, else its last."""
    for pattern in (_BOLD, _STATED, _ANY_NUMBER):
        if found := pattern.findall(line):
            return found[-1]
    return None


# ---- 3. grading ---------------------------------------------------------------------------------------


def equivalent(
    a: str,
    b: str,
    *,
    options: Sequence[str] | None = None,
    answer_type: str | None = None,
    precision: int | None = None,
) -> bool:
    """Whether two extracted answers are the same; symmetric, for votes and for counting distinct answers."""
    a, b = tidy(a), tidy(b)
    if options:
        options = tuple(options)
        first, second = choice(a, options), choice(b, options)
        return _same_option(first, second, options) if first and second else plain(a) == plain(b)
    return same(a, b, answer_type, precision) or same(b, a, answer_type, precision)


def _same_option(a: str, b: str, options: tuple[str, ...]) -> bool:
    """Whether two letters are the same answer: options with the same text are, unless they are pictures."""
    texts = table(options).texts
    return a == b or bool(texts[a]) and texts[a] == texts[b]


@functools.lru_cache(65536)
def _gold(gold: str, options: tuple[str, ...] | None, answer_type: str | None) -> str | None:
    """The gold answer as it is compared (a letter where there are options); None if unreadable."""
    if len(gold) > LINE:
        return None
    if "\\boxed" in gold:
        gold = boxed(gold) or gold
    text = tidy(gold)
    if options:
        known = table(options)
        if (letter := text.strip("()")) in known.texts:
            return letter
        same_text = [letter for letter, option in known.texts.items() if option == known.text(text) != ""]
        if same_text:
            return same_text[0]
        m = _LETTERED.fullmatch(text)  # `b`, `(b)`, `B. 12 cm`
        letter = m[1].upper() if m else ""
        own = m and letter in known.texts and (not m[2] or known.text(m[2]) == known.texts[letter])
        return letter if own else None
    readable = {
        "choice": lambda: False,
        "integer": lambda: number(text),
        "float": lambda: number(text),
        "boolean": lambda: boolean(text) is not None,
    }.get(answer_type or "text", lambda: plain(text))
    return text if readable() else None


def as_gold(
    answer: str, *, options: Sequence[str] | None = None, answer_type: str | None = None
) -> str | None:
    """An extracted answer as a gold answer: the letter it names where there are options.

    None where it cannot be one: it names no option, or cannot be read as `answer_type`.
    """
    options = tuple(options[: len(LETTERS)]) if options else None
    letter = choice(answer, options) if options else None
    return _gold(letter or answer, options, answer_type)


def grade(
    response: str,
    gold: str,
    *,
    options: Sequence[str] | None = None,
    answer_type: str | None = None,
    precision: int | None = None,
    fallback: bool = False,
) -> Grade:
    """Compares the final answer of a response with the gold answer. Never raises; linear in the response.

    Args:
      response: what the model wrote; only its last TAIL characters are read.
      gold: the letter or text of an option where there are options, else the value.
      options: the texts of the choices (A), (B), ...; None for a free-form question.
      answer_type: `choice`, `integer`, `float`, `boolean`, `list`, `math`, `text`; None: the kind of `gold`.
      precision: decimals asked of a float; None: those that `gold` is written with, at least 2.
      fallback: where no marked answer can be read, try the last line, then search for a number or option.
    """
    options = tuple(options[: len(LETTERS)]) if options else None
    expected = _gold(gold, options, answer_type)
    tail = ending(response)
    if options:
        answer, rule = _choice(hushed(tail, options), options, fallback)
    else:
        numeric = answer_type in ("integer", "float") or (
            expected is not None and number(expected) is not None
        )
        answer, rule = _value(tail, numeric, fallback)
    if expected is None:
        verdict = "gold-unparsed"
    elif answer is None:
        verdict = "unparsed"
    else:
        verdict = "correct" if _right(expected, answer, options, answer_type, precision) else "wrong"
    return Grade(verdict, answer, rule)


def _said(found: Marked | None) -> str:
    """The marked answer as plain text, '' where there is none."""
    return tidy(found.said if found.rule == "boxed" else sentence(found.said)) if found else ""


def _next_line(rest: str) -> str:
    return rest[:LINE].lstrip().partition("\n")[0]


def _choice(tail: str, options: tuple[str, ...], fallback: bool) -> tuple[str | None, str]:
    """(letter, or the text given instead of one; rule)."""
    found = marked(tail)
    text = _said(found)
    letter = choice(found.said, options) if found else None
    following = _next_line(found.rest) if found and letter and found.rule == "marker" else ""
    if found and lettered([following], options) not in (letter, None):  # a list: `(A) 10 cm`, `(B) 12 cm`
        return tidy(f"{text}; {following}"), found.rule
    if found and text and (letter or not fallback):
        if not letter and mentions_only(found.said, options):
            return None, "none"
        return letter or text, found.rule
    if fallback and not (found and _NAMED.match(text)):  # `(B) and (C)` is an answer, and a wrong one
        if found and (letter := mentioned(found.said, options)):
            return letter, "search"
        last, parts = last_line(tail), _sentences(tail)
        if letter := lettered(parts, options):
            return letter, "search"
        if not found and (letter := choice(last, options, loose=True)):
            return letter, "last line"
        if letter := search(parts, options):
            return letter, "search"
        if not text and (last := tidy(sentence(last))):
            return last, "last line"
    return (text, found.rule) if found and text else (None, "none")


def _value(tail: str, numeric: bool, fallback: bool) -> tuple[str | None, str]:
    """(answer, rule) of a free-form question."""
    found = marked(tail)
    text = _said(found)
    if found and text and not (fallback and numeric and number(text) is None):
        return text, found.rule
    if fallback:
        if numeric and found and (said := _stated(found.said)):
            return said, "search"
        last = tidy(sentence(last_line(tail)))
        if last and (not numeric or number(last)):
            return last, "last line"
        if numeric and (said := _number(_sentences(tail))):
            return said, "search"
        if last and not text:
            return last, "last line"
    return (text, found.rule) if found and text else (None, "none")


def _right(
    gold: str, answer: str, options: tuple[str, ...] | None, answer_type: str | None, precision: int | None
) -> bool:
    if not options:
        return same(gold, answer, answer_type, precision)
    return answer in table(options).texts and _same_option(gold, answer, options)
