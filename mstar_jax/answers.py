r"""Answer checking: extract the final answer of a response, read it, compare it with the gold answer.

    grade(r"... so x = 4. The answer is \boxed{4}", "4").verdict             -> "correct"
    grade("The answer is (B) 12 cm.", "B", options=("10 cm", "12 cm"))       -> "correct", answer "B"
    grade("I think it is 4", "4").verdict                                    -> "unparsed" (no marker)

The checker decides the reward, so in doubt it says no: an answer has to be marked, a number has to stand
alone with at most a unit, an option is never guessed from similar spelling. `fallback=True` also looks for
an answer without a marker; that is meant for a separate, reported number, not for training.

A verdict is one of
  `correct`        the marked answer equals the gold answer
  `wrong`          an answer is marked and it does not
  `unparsed`       no answer is marked
  `gold-unparsed`  the gold answer itself cannot be read as its type; it never rewards anything
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from mstar_jax.values import LINE, Number, boolean, number, plain, same, same_number, tidy

TAIL = 8192  # characters at the end of a response that are looked at
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Grade:
    """Result of `grade`.

    Attributes:
      verdict: `correct`, `wrong`, `unparsed` or `gold-unparsed`.
      answer: the extracted answer, an option's letter where one was recognised; None where unparsed.
      rule: what found it: `boxed`, `marker`, `last line`, `search` (both only with fallback) or `none`.
    """

    verdict: str
    answer: str | None
    rule: str


# ---- 1. extraction ------------------------------------------------------------------------------------

_BRACE = re.compile(r"\\boxed\s{0,9}\{|\\[{}]|[{}]")
_MARKER = re.compile(
    r"(?:\b(?:answer|correct\s+(?:option|choice))(?:\s+to\s+(?:the|this)\s+(?:question|problem))?[\s*_]*"
    r"(?:(?:is|would\s+be|should\s+be|must\s+be)\b(?!\s+(?:in)?correct\b|\s+wrong\b)|[:：=])"
    r"|答案\s*[是为選选:：]|\bfinal\s+answer[\s*_]*\n(?=\s*\S))[\s*_:：]*(?:\$\$|\\\[)?\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=[\"')\]*$]*(?:\s|$))|[。！？]")
_ABBREVIATION = re.compile(r"(?:^\W*[A-Za-z]|\.[A-Za-z]|\b(?:St|Mt|Dr|Mr|Mrs|Ms|sq|vs|No|approx))$")


def _boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}; braces are counted, so nested ones are fine. One pass."""
    stack, best = [], None
    for m in _BRACE.finditer(text):
        if m[0][-1] == "{" and len(m[0]) != 2:
            stack.append(m.end() if len(m[0]) > 2 else -1)
        elif m[0] == "}" and stack:
            start = stack.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, m.start())
    return text[best[0] : best[1]] if best else None


def _marked(text: str) -> tuple[str, str] | None:
    """(the marked answer up to the end of its line, rule), or None; `text` is the tail of a response."""
    if "\\boxed" in text and (content := (_boxed(text) or "").strip()):
        return content[:LINE], "boxed"
    start = max((m.end() for m in _MARKER.finditer(text)), default=-1)
    if start < 0:
        return None
    line = text[start : start + LINE].split("\n", 1)[0].strip()
    return (line, "marker") if line.strip("*_$.:` ") else None


def _sentence(line: str) -> str:
    """First sentence of a line; a dot inside 3.5, after `B` in `B. text` or in an abbreviation ends none."""
    for m in _SENTENCE_END.finditer(line):
        if m[0] != "." or not _ABBREVIATION.search(line[max(0, m.start() - 8) : m.start()]):
            return line[: m.start()]
    return line


def _last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()[-LINE:]


def extract(text: str, *, fallback: bool = False) -> str | None:
    """The marked final answer of a response as plain text, None where there is none.

    The last balanced \\boxed{} wins, then the last of `the answer is`, `answer:`, `final answer`, `correct
    option is` ... up to the end of its sentence; with `fallback` then the last line.
    """
    text = text[-TAIL:]
    found = _marked(text)
    if found is None:
        return (tidy(_last_line(text)) or None) if fallback else None
    line, rule = found
    return tidy(line if rule == "boxed" else _sentence(line)) or None


# ---- 2. multiple choice -------------------------------------------------------------------------------

_LETTER = re.compile(
    r"(?P<named>(?i:(?:the\s)?(?:correct\s)?(?:option|choice|answer|letter)\s(?:is\s)?:?\s?)|选项\s?)?"
    r"(?:[(\[{]\s?(?P<bracketed>[A-Za-z])\s?[)\]}]|(?P<bare>[A-Za-z])(?![A-Za-z0-9_']))\s?(?P<rest>.*)$"
)
_AFTER_LETTER = re.compile(r"(?:because|since|as|is|in|for|which|with|and|or)\b|[(-]")
_ALSO = re.compile(r"(?:and|or|&|/|,)\s?[(]?([A-Z])(?=$|[\s).,;/&])")
_MENTION = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice|选项)\s?([A-Z])(?![A-Za-z0-9_'])")
_REASON = re.compile(r",|\b(?:because|since|as)\b")
_NEGATION = re.compile(r"\b(?:not|no|neither|nor|except|cannot)\b|n't", re.IGNORECASE)
_NOT_WORD = re.compile(r"[^\w%°.+/^√π-]+")


def _words(text: str) -> str:
    return f" {_NOT_WORD.sub(' ', plain(text)).strip(' .')} "


@functools.lru_cache(8192)
def _table(options: tuple[str, ...]) -> tuple[dict[str, str], dict[str, Number], dict[str, str]]:
    """Per letter: plain text, number (where it is one), words (none if options contain each other)."""
    texts = dict(zip(LETTERS, map(plain, options), strict=False))
    numbers = {letter: n for letter, text in zip(LETTERS, options, strict=False) if (n := number(text))}
    words = {letter: _words(text) for letter, text in zip(LETTERS, options, strict=False)}
    nested = any(a != b and words[a] in words[b] for a in words for b in words)
    return texts, numbers, {} if nested or "  " in words.values() else words


@functools.lru_cache(65536)
def choice(text: str, options: tuple[str, ...]) -> str | None:
    """The option's letter that a marked answer names, None where it names none or more than one.

    `B`, `(B)`, `b)`, `option B`, `B: text`, the option's text, a number equal to exactly one option, or a
    sentence that holds one option and no negation. A letter with another option's text names none.
    """
    texts, numbers, _ = _table(options)
    text = tidy(_sentence(text))
    single = len(text) == 1 and text.isupper()
    if not single:
        exact = [letter for letter in texts if texts[letter] and texts[letter] == plain(text)]
        if exact:
            return exact[0]
    if (m := _LETTER.match(text)) and (letter := (m["bracketed"] or m["bare"]).upper()) in texts:
        rest = m["rest"]
        own = bool(rest) and plain(rest) == texts[letter]
        delimited = not rest or rest[0] in ").:,;/&=" or rest[0] > "\u2e80"
        because = m["bare"] and m["bare"].isupper() and _AFTER_LETTER.match(rest)
        if m["named"] or m["bracketed"] or own or delimited or because:
            return _agreed(letter, rest, texts, numbers)
    if single:
        return next((letter for letter in texts if texts[letter] == plain(text)), None)
    if n := number(text):
        equal = [letter for letter in numbers if same_number(numbers[letter], n, None, None)]
        return equal[0] if len(equal) == 1 else None
    said = boolean(text)  # "no, there are not fewer ..."
    if said is not None and sorted(texts.values()) == ["no", "yes"]:
        return next(letter for letter in texts if boolean(texts[letter]) is said)
    return _mentioned(text, options)


def _agreed(letter: str, rest: str, texts: dict[str, str], numbers: dict[str, Number]) -> str | None:
    """`letter` unless the text after it names another option, by its letter, its text or its number."""
    stripped = rest.lstrip(").:;= ")
    for text in (plain(stripped.lstrip(",-")), plain(_REASON.split(stripped.lstrip(",- "), maxsplit=1)[0])):
        if text and text == texts[letter]:
            return letter
        if text and text in texts.values():
            return None
    others = [m[1] for m in (_ALSO.match(rest), _ALSO.match(stripped)) if m]
    others += [a or b for a, b in _MENTION.findall(stripped)]
    if any(other in texts and other != letter for other in others):
        return None
    n = number(stripped)
    equal = [other for other in numbers if n and same_number(numbers[other], n, None, None)]
    return None if equal and letter in numbers and letter not in equal else letter


def _mentioned(text: str, options: tuple[str, ...]) -> str | None:
    """The one option that a sentence mentions, by `(B)` or `option B` or by its text; None in doubt."""
    if _NEGATION.search(text):
        return None
    texts, _, words = _table(options)
    found = {a or b for a, b in _MENTION.findall(text)} & texts.keys()
    if words:
        spaced = _words(text)
        found |= {letter for letter in words if words[letter] in spaced}
    return found.pop() if len(found) == 1 else None


# ---- 3. grading ---------------------------------------------------------------------------------------


def equivalent(
    a: str,
    b: str,
    *,
    options: Sequence[str] | None = None,
    answer_type: str | None = None,
    precision: int | None = None,
) -> bool:
    """Whether two extracted answers are the same answer; symmetric, for voting and counting distinct ones."""
    a, b = tidy(a), tidy(b)
    if options:
        options = tuple(options)
        first, second = choice(a, options), choice(b, options)
        return first == second if first and second else plain(a) == plain(b)
    return same(a, b, answer_type, precision) or same(b, a, answer_type, precision)


@functools.lru_cache(65536)
def _gold(gold: str, options: tuple[str, ...] | None, answer_type: str | None) -> str | None:
    """The gold answer in the form compared with (a letter where there are options); None if unreadable."""
    if len(gold) > LINE:
        return None
    if "\\boxed" in gold:
        gold = _boxed(gold) or gold
    text = tidy(gold)
    if options:
        if (
            len(text.strip("()")) == 1
            and text.strip("()").isupper()
            and text.strip("()") in _table(options)[0]
        ):
            return text.strip("()")
        return next((letter for letter, option in _table(options)[0].items() if option == plain(text)), None)
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
    """An extracted answer in the form of a gold answer: the letter it names where there are options.

    None where `grade` could not grade by it: it names no option, or cannot be read as its type.
    """
    options = tuple(options[: len(LETTERS)]) if options else None
    letter = choice(answer, options) if options else None
    return _gold(letter or answer, options, answer_type)


_ANY_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30})(?:\.\d{1,30})?%?")


def _search(text: str, options: tuple[str, ...] | None, numeric: bool) -> str | None:
    """Fallback: the one option that a text mentions, or its last number."""
    if options:
        return _mentioned(text, options)
    found = _ANY_NUMBER.findall(text) if numeric else []
    return found[-1] if found else None


def grade(
    response: str,
    gold: str,
    *,
    options: Sequence[str] | None = None,
    answer_type: str | None = None,
    precision: int | None = None,
    fallback: bool = False,
) -> Grade:
    """Compares a response's final answer with the gold answer. Never raises; linear in the response.

    Args:
      response: what the model wrote; only its last TAIL characters are looked at.
      gold: an option's letter or text where there are options, otherwise the value.
      options: the texts of the choices (A), (B), ...; None for a free-form question.
      answer_type: `choice`, `integer`, `float`, `boolean`, `math` or `text`; None: judged from `gold`.
      precision: decimals that a float is asked for; None: those that `gold` is written with, at least 2.
      fallback: without a readable marked answer, also try the last line, then search for a number or option.
    """
    options = tuple(options[: len(LETTERS)]) if options else None
    expected = _gold(gold, options, answer_type)
    numeric = answer_type in ("integer", "float") or (expected is not None and number(expected) is not None)
    tail = response[-TAIL:]
    answer, rule, verdict = None, "none", "unparsed"
    for line, found_by in _candidates(tail, fallback):
        if found_by == "search":
            text = _search(line, options, numeric)
        else:
            text = tidy(line if found_by == "boxed" else _sentence(line))
        if not text:
            continue
        letter = choice(text if found_by == "search" else line, options) if options else None
        if answer is None or letter or (not options and numeric and number(text)):
            answer, rule = letter or text, found_by
        if letter or not fallback or (not options and (not numeric or number(text))):
            break
    if expected is None:
        verdict = "gold-unparsed"
    elif answer is not None:
        verdict = "correct" if _right(expected, answer, options, answer_type, precision) else "wrong"
    return Grade(verdict, answer, rule)


def _candidates(tail: str, fallback: bool):
    """Yields (text, rule) in the order they are tried; without fallback only the marked answer."""
    if found := _marked(tail):
        yield found
        if fallback:
            yield found[0], "search"
    elif fallback:
        yield _last_line(tail), "last line"
        yield _last_line(tail), "search"
        yield tail, "search"


def _right(
    gold: str, answer: str, options: tuple | None, answer_type: str | None, precision: int | None
) -> bool:
    if not options:
        return same(gold, answer, answer_type, precision)
    texts = _table(options)[0]  # two options with the same text are the same answer
    return answer in texts and (answer == gold or bool(texts[gold]) and texts[answer] == texts[gold])
