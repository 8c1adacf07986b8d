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
  `unparsed`       no answer is marked
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
from mstar_jax.answers.values import LINE, NUMBER_WORDS, boolean, number, plain, sentence, tidy

TAIL = 8192  # characters at the end of a response that are looked at


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

_BRACE = re.compile(r"\\boxed\s{0,9}\{|\\[{}]|[{}]")
_MARKER = re.compile(
    r"(?:\b(?:answer(?:\s+(?:choice|option|letter))?|correct\s+(?:option|choice)(?:\s+letter)?)"
    r"(?:\s+to\s+(?:the|this|your)\s+(?:question|problem))?[\s*_]*"
    r"(?:(?:is|would\s+be|should\s+be|must\s+be)\b(?!\s+(?:in)?correct\b|\s+wrong\b)"
    r"(?:\s+(?:therefore|thus|hence|clearly|simply|then|indeed)\b,?)?|[:：]|=(?!\s?[\"']))"
    r"|答案\s*(?:选项)?\s*[是为选:：]|(?P<heading>answer[\s*_\]]*\n(?=\s*\S)|answer\]))[\s*_:：]*(?:\$\$|\\\[)?\s*",
    re.IGNORECASE,
)
_KEYS = (
    "nswer",
    "NSWER",
    "orrect",
    "ORRECT",
    "案",
)  # every marker contains one, from its second character on
_THINK = re.compile(
    r"[<◁]\s{0,3}(?P<close>/)?\s{0,3}(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)\s{0,3}[>▷]"
    r"|\[(?P<end>/)?THINK\]|<\|(?:begin|(?P<last>end))_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}(?:final[ _-]?)?answer\s{0,3}>", re.IGNORECASE)
_PROSE = ("", "text", "txt", "plaintext", "markdown", "md", "latex", "tex", "math")  # of a fence
_CODE = re.compile(
    r"^[ \t]{0,80}(?:"
    r"(?:if|elif|for|while|with|def|class|switch|function)\b[^\n]*(?:[:{][ \t]{0,9}$|:[ \t]?\w{1,40}[ \t]?=)"
    r"|(?:\}[ \t]?)?else\b[^\n]{0,40}[:{]|(?:let|const|var|int|float|double|string|bool)\s\w{1,40}\s?="
    r"|(?:return|import)\s\S|from\s\w{1,40}\simport|print[ \t]?\(|console\.log|#include)[^\n]*",
    re.MULTILINE,
)
_ASSIGNMENT = re.compile(r"^[ \t]*[A-Za-z_][\w.\[\]]*[ \t]*[-+*/]?=(?!=)[^\n]*$", re.MULTILINE)
_END_TOKEN = re.compile(r"(?:\s*<(?:/s|\|[\w ]{1,20}\|)>)+\s*$")


def _boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}, which may hold further braces. One pass."""
    stack: list[int] = []
    best: tuple[int, int] | None = None
    for m in _BRACE.finditer(text):
        if m[0][-1] == "{" and len(m[0]) != 2:
            stack.append(m.end() if len(m[0]) > 2 else -1)
        elif m[0] == "}" and stack:
            start = stack.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, m.start())
    return text[best[0] : best[1]] if best else None


def _spoken(response: str) -> str:
    """A response without its think blocks; nothing where one is still open at the end.

    A closing tag without an opening one ends a block that began in the prompt.
    """
    kept: list[str] = []
    inside = False
    start = 0
    for m in _THINK.finditer(response):
        closes = bool(m["close"] or m["end"] or m["last"])
        if closes and not inside:
            kept.clear()
        elif not closes and not inside:
            kept.append(response[start : m.start()])
        inside = not closes
        start = m.end()
    return "" if inside else "\n".join([*kept, response[start:]])


def _unfenced(response: str) -> str:
    """A response without its fenced blocks, but for those that hold prose."""
    kept = []
    for i, part in enumerate(response.split("```")):
        language, _, content = part.partition("\n") if i % 2 and "\n" in part else ("", "", part)
        if not i % 2 or (language.strip().lower() in _PROSE and not _CODE.search(content)):
            kept.append(content)
    return "\n".join(kept)


def _tail(response: str) -> str:
    """The end of what a response says: no thoughts, no code, no `</s>` or `<|im_end|>` of a tokenizer."""
    if _THINK.search(response):
        response = _spoken(response)
    if "```" in response:
        response = _unfenced(response)
    tail = response[-TAIL:]
    if _CODE.search(tail):
        tail = _ASSIGNMENT.sub("", _CODE.sub("", tail))
    return _END_TOKEN.sub("", tail) if ">" in tail[-24:] else tail


def _after_marker(text: str) -> int:
    """Where the last marker ends, -1 without one. Searches from the end, so most of a response is skipped."""
    last = {key: text.rfind(key) for key in _KEYS}
    while (at := max(last.values())) >= 0:
        key = next(k for k in last if last[k] == at)
        m = _MARKER.match(text, at - 1) if at else None
        if m and (not m["heading"] or _heads(text[: at - 1][-24:])):
            return m.end()
        last[key] = text.rfind(key, 0, at + len(key) - 1)
    return -1


def _heads(before: str) -> bool:
    """`Final answer` and `[Answer]` before a line break are markers, `this is my answer` is not."""
    return before.rstrip(" *_").lower().endswith(("final", "[", "[final"))


def _marked(text: str) -> tuple[str, str] | None:
    """(the marked answer up to the end of its line, rule), or None; `text` is the tail of a response."""
    if "<" in text and (tags := list(_ANSWER_TAG.finditer(text))):
        return _tagged(text, tags)
    if "\\boxed" in text and (content := (_boxed(text) or "").strip()):
        return content[:LINE], "boxed"
    start = _after_marker(text)
    if start < 0:
        return None
    line = text[start : start + LINE].split("\n", 1)[0].strip()
    return (line, "marker") if line.strip("*_$.:` ") else None


def _tagged(text: str, tags: list[re.Match[str]]) -> tuple[str, str] | None:
    """The content of the last answer tag, or what is marked in it; None where it is empty or left open."""
    if len(tags) < 2 or not tags[-1][1] or tags[-2][1]:
        return None
    content = text[tags[-2].end() : tags[-1].start()].strip()
    line, _ = _marked(content) or (" ".join(content[:LINE].split()), "")
    return (line, "tag") if line.strip("*_$.:` ") else None


def _last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()[-LINE:]


def extract(text: str, *, options: Sequence[str] | None = None, fallback: bool = False) -> str | None:
    """The marked final answer of a response as plain text, None where there is none.

    The last `<answer>` tag wins; else the last balanced \\boxed{}; else the last `the answer is`, `answer:`,
    `final answer`, `correct option is` ..., up to the end of its sentence; else, with `fallback`, the last
    line. Think blocks never count. The text of one of the `options` that itself talks about answers is not
    a second answer when it follows its letter.
    """
    text = _tail(text)
    if options:
        text = hushed(text, tuple(options[: len(LETTERS)]))
    found = _marked(text)
    if found is None:
        return (tidy(_last_line(text)) or None) if fallback else None
    line, rule = found
    return tidy(line if rule == "boxed" else sentence(line)) or None


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
        gold = _boxed(gold) or gold
    text = tidy(gold)
    if options:
        known = table(options)
        if (letter := text.strip("()")) in known.texts:
            return letter
        return next((letter for letter, option in known.texts.items() if option == known.text(text)), None)
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
    tail = _tail(response)
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


def _choice(tail: str, options: tuple[str, ...], fallback: bool) -> tuple[str | None, str]:
    """(letter, or the text given instead of one; rule)."""
    found = _marked(tail)
    text = tidy(found[0] if found[1] == "boxed" else sentence(found[0])) if found else ""
    if found and text and ((letter := choice(found[0], options)) or not fallback):
        return (
            (None, "none") if not letter and mentions_only(found[0], options) else (letter or text, found[1])
        )
    if fallback and not (found and _NAMED.match(text)):  # `(B) and (C)` is an answer, and a wrong one
        if found and (letter := mentioned(found[0], options)):
            return letter, "search"
        last, parts = _last_line(tail), _sentences(tail)
        if letter := lettered(parts, options):
            return letter, "search"
        if not found and (letter := choice(last, options, loose=True)):
            return letter, "last line"
        if letter := search(parts, options):
            return letter, "search"
        if not text and (last := tidy(sentence(last))):
            return last, "last line"
    return (text, found[1]) if found and text else (None, "none")


def _value(tail: str, numeric: bool, fallback: bool) -> tuple[str | None, str]:
    """(answer, rule) of a free-form question."""
    found = _marked(tail)
    text = tidy(found[0] if found[1] == "boxed" else sentence(found[0])) if found else ""
    if found and text and not (fallback and numeric and number(text) is None):
        return text, found[1]
    if fallback:
        if numeric and found and (said := _stated(found[0])):
            return said, "search"
        last = tidy(sentence(_last_line(tail)))
        if last and (not numeric or number(last)):
            return last, "last line"
        if numeric and (said := _number(_sentences(tail))):
            return said, "search"
        if last and not text:
            return last, "last line"
    return (text, found[1]) if found and text else (None, "none")


def _right(
    gold: str, answer: str, options: tuple[str, ...] | None, answer_type: str | None, precision: int | None
) -> bool:
    if not options:
        return same(gold, answer, answer_type, precision)
    return answer in table(options).texts and _same_option(gold, answer, options)
