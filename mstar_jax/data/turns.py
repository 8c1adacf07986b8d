r"""What the turns of a row say: the question, its options, and the gold answer.

    parse_question("<image>\nHint: ...\nQuestion: Odd?\nChoices:\n(A) yes\n(B) no")
        -> ("Odd?", ("yes", "no"), "Hint: ...")
    parse_answer("The answer is B", ("yes", "no"))           -> ("B", "choice")
    parse_answer("5 + 5 + 5 = 15. The answer is 15", None)   -> ("15", "integer")

The hint, the `Question:` mark and the options may be absent. Options may be called choices, or 选项, or
follow the question without a heading; they stand on lines of their own or on one, with letters of either
case, and an instruction may follow them. An answer may be a solution that ends in its answer, in a box or in
a tag. What looks like options and is not understood is refused: a model would be asked for one of them.
"""

import decimal
import itertools
import math
import re
import uuid
from collections.abc import Sequence

from mstar_jax.answers.check import as_gold, extract
from mstar_jax.answers.values import kind, plain

LONGEST_TEXT = 5  # words; a longer text answer cannot be checked by comparison


class Unreadable(Exception):
    """A row that is dropped; the message is the cause."""


def plain_number(value: object) -> str | None:
    """A finite number, or an id that is one to Arrow, as text; None for anything else, also for a bool."""
    if (
        type(value) is int
        or isinstance(value, uuid.UUID)
        or isinstance(value, float)
        and math.isfinite(value)
    ):
        return str(value)
    if not isinstance(value, decimal.Decimal) or not value.is_finite():
        return None
    known = f"{value:f}"
    return known.rstrip("0").rstrip(".") if "." in known else known  # the zeros are its type's


def structs(value: object) -> object:
    """A list of structs of a struct of lists, as which `datasets` stores a Sequence of them; or the value."""
    if not isinstance(value, dict) or not all(isinstance(each, list) for each in value.values()):
        return value
    same = len(set(map(len, value.values()))) == 1
    return [dict(zip(value, each)) for each in zip(*value.values())] if same else value


# ---- 1. questions -------------------------------------------------------------------------------------

_MARK = re.compile(  # `<image>`, `<image 1>`, `<|image_1|>`, `<ImageHere>`
    r"<\|?\s?(?:image|img)(?P<number>[ _]?\d{1,2})?(?:here|_?placeholder|_?token)?\s?\|?>", re.IGNORECASE
)
_HINT = re.compile(r"\s*Hint:[^\n]*?(?=\n|Question:|$)")
_QUESTION = re.compile(r"\s*Question:\s*")
_LETTERED = r"(?:[-*•]\s+)?(?:[(（\[]\s?A\s?[)）\]]|A[).:：])"
_CHOICES = re.compile(
    r"^[ \t]*[*_#]{0,4}[ \t]*(?:answer )?(?:choices|options|选项)"
    r"[ \t]*[*_]{0,2}[ \t]*[:：][ \t]*[*_]{0,2}[ \t]*"
    rf"(?=$|{_LETTERED}|\(?[A-Z][).:]|\[\s*['\"])"  # at the beginning of a line
    rf"|(?<=[.?!:？：\s])(?:choices|options|选项)[ \t]*[:：][ \t]*(?={_LETTERED}\s)",  # or within it
    re.MULTILINE | re.IGNORECASE,
)
_UNNAMED = (
    re.compile(  # options without a heading: (A) and (B) on lines of their own, or after a question mark
        rf"^[ \t]*(?={_LETTERED}\s*\S(?:.*\n)+[ \t]*{_LETTERED.replace('A', 'B')})"
        rf"|(?<=[?？:：])\s*(?=[(（]A[)）]\s*\S.*[(（]B[)）]|A[.)]\s\S.*\sB[.)]\s)",
        re.MULTILINE,
    )
)
_STARTED = r"(?:[(（\[]{0}[)）\]]|(?:^|\n|\\n|>|[?？])\s*{0}[).:：]\s)"
_LISTED = re.compile(  # something that offers options
    rf"(?:choices|options|选项)\s*[*_]{{0,2}}\s*[:：]|{_STARTED.format('A')}.*{_STARTED.format('B')}",
    re.DOTALL | re.IGNORECASE,
)
_QUOTED = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\"")
_QUOTED_LIST = re.compile(rf"\[\s*(?:{_QUOTED.pattern})(?:\s*,\s*(?:{_QUOTED.pattern}))+\s*\]\s*")
_INSTRUCTION = re.compile(
    r"(?:^|(?<=[.;])\s+|\n)(?:please\b|answer(?::|\s+(?:with|the|in|using|by)\b)|(?:select|choose|pick|give|"
    r"write|provide|return|respond|reply|output)\b[^\n]*\b(?:answers?|options?|choices?|letters?)\b)"
    r"|\s(?-i:Please)\s+(?:select|choose|pick|answer|give|write|provide|output|explain|think)\b"
    r"|\n\s*(?:(?:only|just|directly)\s+(?:answer|give|write|output|reply|respond|provide|state)\b"
    r"|(?:let(?:'|’)?s\s+)?think\b|hint\s*:|请|只需|直接)",
    re.IGNORECASE,
)


def image_marks(value: str) -> int:
    """How many images the marks of a turn stand for; a numbered one may be named several times."""
    found = list(_MARK.finditer(value))
    return len({m[0].lower() for m in found if m["number"]}) + sum(not m["number"] for m in found)


def name_marks(texts: Sequence[str], count: int) -> list[str]:
    """Texts with the marks within a line written out, where there are several images: `image 2` for the
    second one. The images come before the text, in order, so other marks say nothing.

        "Is <image> larger than <image>?"  ->  "Is image 1 larger than image 2?"
        "<image>\n<image>\nWhich is larger?"  is left as it is

    Args:
      texts: of a row's turns, in order.
      count: of its images.
    """
    if count < 2:
        return list(texts)
    numbers = itertools.count(1)
    named = []
    for text in texts:

        def written(mark: re.Match[str], text: str = text) -> str:
            number = int(mark["number"].strip(" _")) if mark["number"] else next(numbers)
            before = text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()]
            if not _MARK.sub("", before).strip():
                return mark[0]
            after = text[mark.end() : mark.end() + 1]
            gap = " " if not before[-1].isspace() and before[-1] not in "([" else ""
            return f"{gap}image {number}{' ' if after.isalnum() else ''}"

        named.append(_MARK.sub(written, text))
    return named


def parse_question(value: str) -> tuple[str, tuple[str, ...] | None, str]:
    """(question, options or None, hint) of a human turn, without image marks.

    Raises:
      Unreadable: there is no question, or the lines after `Choices:` are not (A), (B), (C), ...
    """
    text = _MARK.sub("", value).replace("\r\n", "\n").replace("\r", "\n")
    text = text.translate({0x200B: None, 0xFEFF: None}).strip()
    hint = ""
    if m := _HINT.match(text):
        hint, text = m[0].strip(), text[m.end() :]
    if m := _QUESTION.match(text):
        text = text[m.end() :]
    question, options = text, list[str]()
    if (m := _CHOICES.search(text)) or (m := _UNNAMED.search(text)) and text[: m.start()].strip():
        question, options = text[: m.start()], _options(text[m.end() :].strip())
    if not question.strip():
        raise Unreadable("no question")
    return question.strip(), tuple(options) if options else None, hint


def _options(text: str) -> list[str]:
    """The options of a list, one a line or several, without an instruction that follows the last one."""
    if _QUOTED_LIST.fullmatch(text):
        return [m[1] or m[2] or "" for m in _QUOTED.finditer(text)]
    options = list[str]()
    bullet = r"(?:[-*•]\s+)?"
    style = rf"{bullet}[(（\[]\s?({{}})\s?[)）\]]\s*" if re.match(rf"{bullet}[(（\[]", text) else ""
    style = style or bullet + r"({})[).:：](?:\s+|$)"
    first = "a" if re.match(style.format("a"), text) else "A"
    lines = [line.strip() for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        mark = re.match(style.format("[A-Za-z]"), line)
        if mark and mark[1] == chr(ord(first) + len(options)):
            options.append(line[mark.end() :])
            while len(options) < 26:  # the next option stands on this line if no further line begins with it
                following = style.format(chr(ord(first) + len(options)))
                mark = re.search(rf"(?<=[\s,;]){following}", options[-1])
                if not mark or any(re.match(following, line) for line in lines[number:]):
                    break
                options[-1:] = [options[-1][: mark.start()].rstrip(" ,;"), options[-1][mark.end() :]]
        elif options and (not mark or mark[1].islower() != first.islower()):  # an option with several lines
            options[-1] = f"{options[-1]}\n{line}".strip()
        else:
            raise Unreadable("options not lettered (A), (B), ...")
    if found := _INSTRUCTION.search(options[-1]):
        options[-1] = options[-1][: found.start()].rstrip()
    return options


# ---- 2. answers ---------------------------------------------------------------------------------------

_SAID = re.compile(
    r"\b(?:the|final) (?:final |correct )?answer(?: is\b|(?=\s*:))\s*:?|####"
    r"|答案\s*[是为]\s*[:：]?|[,，;；]\s*(?:therefore|thus|hence|so|所以)\s*(?=\S+$)",
    re.IGNORECASE,
)
_MARKED = re.compile(r"\\f?boxed\b|\\fbox\b|</\s?(?:final[ _-]?)?answer\s?>|</?\s?think", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}(?!\w)")  # of a language, not a command of LaTeX
_PLAIN_TEX = re.compile(r"\\(?:text|mathrm|begin|end)\s*\{[^{}]*\}")
_SENTENCE = re.compile(r"(?:[\d)\]}$]|[^\W\d_]{4})[.!?]\s+[A-Z][a-z]")  # one ends and another begins
_ANSWER = re.compile(r"\s*(?:(?:the )?answer\b(?: is\b)?\s*:?)?\s*", re.IGNORECASE)
_NOTHING = ("n/a", "nan", "null", "?", "-", "<no_answer>")  # how files write that there is no answer


def parse_answer(
    value: str, options: tuple[str, ...] | None, hint: str = "", question: str = "", long: bool = False
) -> tuple[str, str]:
    """(gold answer, answer type) of a gpt turn; the gold answer is an option's letter if there are options.

    Args:
      value: the turn.
      options: of the question.
      hint: of the question; it may ask for a floating-point number.
      question: refused where it offers options that were not understood, and the answer is a letter.
      long: whether an answer may be long (`is_long`).

    Raises:
      Unreadable: there is no answer, no option equals it, or it is long and must not be.
    """
    if _MARKED.search(value):
        value = extract(value) or ""
    elif said := [m.end() for m in _SAID.finditer(value)]:  # a solution that ends in its answer
        value = value[said[-1] :]
    gold = _ANSWER.sub("", value, count=1).strip()  # all parts are optional, so it matches at the start
    gold = gold[:-1].rstrip() if gold.endswith((".", "。")) else gold
    if not gold or gold.casefold() in _NOTHING:
        raise Unreadable("no answer")
    if options:
        return _option(gold, options), "choice"
    if re.fullmatch(r"\(?[A-Ha-h]\)?", gold) and _LISTED.search(question):
        raise Unreadable("options not lettered (A), (B), ...")
    answer_type = kind(gold)
    if answer_type == "integer" and "floating-point" in hint:
        answer_type = "float"
    if not long and is_long(gold, answer_type):
        raise Unreadable("long text answer")
    return gold, answer_type


def is_long(gold: str, answer_type: str) -> bool:
    """Whether an answer that is no option is too long to be checked by comparison: it has more than
    LONGEST_TEXT words, or is more than a sentence."""
    words = gold.split() if answer_type == "text" else _WORD.findall(_PLAIN_TEX.sub("", gold))
    return len(words) > LONGEST_TEXT or bool(_SENTENCE.search(gold))


def _option(gold: str, options: tuple[str, ...]) -> str:
    """The letter of the option that an answer names, by its letter, its text, or both where they agree."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if gold.strip("()") in letters:
        return gold.strip("()")
    texts = [plain(option) for option in options]
    if plain(gold) in texts:
        return letters[texts.index(plain(gold))]
    if letter := as_gold(gold, options=options, answer_type="choice"):
        return letter
    raise Unreadable("options without gold")
