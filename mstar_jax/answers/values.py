r"""Reading answers as values: plain text and exact numbers.

    tidy(r"$\frac{1}{2}$ \text{ cm}.")   -> "1/2 cm"
    plain("The  Red Ball,")               -> "red ball"
    number("about $1,234.50")             -> Number(value=2469/2, unit="$", places=2)

Numbers are exact fractions. A text is a number only as a whole: `25π`, `3:4`, `3 and 5`, `2x+3` are not.
No expression is ever evaluated.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from mstar_jax.answers.formulas import arithmetic
from mstar_jax.answers.units import REASON, UNITS, unit
from mstar_jax.answers.words import spelled

LINE = 400  # longest answer that is read, in characters

# ---- 1. plain text ------------------------------------------------------------------------------------

_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴-⁹]+")
_PLAIN_CHARS = str.maketrans("−‐‑‒–—⁄“”‘’′∶", "------/\"\"''':", "\u200b\ufeff")
_NUMERIC = re.compile(r"-?[\d.,]+")


def _fraction(m: re.Match) -> str:
    top, bottom = (m[1] or m[2] or "").strip(), (m[3] or m[4] or "").strip()
    numeric = _NUMERIC.fullmatch(top) and _NUMERIC.fullmatch(bottom)
    return f" {top}/{bottom} " if numeric else f"({top})/({bottom})"


def _matrix(m: re.Match) -> str:
    """A matrix as a list of rows."""
    rows = re.split(r"\\\\\s*|\\\s+", m[2].strip())
    return "[" + ", ".join("[" + ", ".join(map(str.strip, row.split("&"))) + "]" for row in rows if row) + "]"


_FONTS = (
    r"text(?:bf|it|rm|sf|tt|sc|sl|normal)?|math(?:rm|bf|sf|tt|it|normal)|[mf]box|boxed|operatorname|bm|boldsymbol"
    r"|emph|underline|ensuremath"
)
_LATEX: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\begin\{([pbB]?)matrix\}(.{0,200}?)\\end\{\1matrix\}", re.DOTALL), _matrix),
    (re.compile(r"\\[()\[\]]|\$\$|\\(?:left|right|displaystyle|!|,)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\textsuperscript\s?\{"), "^{"),
    (re.compile(rf"\\(?:{_FONTS})\s?\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(r"\\(?:bf|rm|sf|tt|it)(?:series|family|shape)?(?![A-Za-z])\s?"), ""),
    (re.compile(r"\\(?:begin|end)\s?\{(?:align|aligned|equation|gather)\*?\}|(?<!\\)&(?=\s?=)"), " "),
    (re.compile(r"\\[lr]angle(?![A-Za-z])"), lambda m: "(" if m[0][1] == "l" else ")"),
    (re.compile(r"\{([^{}]*)()\\over(?![A-Za-z])([^{}]*)()\}"), _fraction),
    (re.compile(r"\\[;: ]|~|\\q?quad"), " "),
    (re.compile(r"\^?\{?\\circ\}?|\\(?:text)?degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\sqrt\s?\{([^{}]*)\}"), r"√(\1)"),
    (re.compile(r"\\(?:[dtc]?|nice|s)frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))"), _fraction),
    (re.compile(r"\\sqrt\s?(?!\[)"), "√"),
    (re.compile(r"\\(?:times)"), "×"),
    (re.compile(r"\\cdot"), "·"),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\approx"), "≈"),
    (re.compile(r"\\pm(?![A-Za-z])\s?"), "±"),
    (re.compile(r"(\d\.\d*)\\(?:overline|bar|dot)\s?\{(\d{1,6})\}"), r"\1\2\2\2⋯"),
    (re.compile(r"\\cup(?![A-Za-z])"), "∪"),
    (re.compile(r"\\infty(?![A-Za-z])"), "∞"),
    (re.compile(r"\\angle\s?"), "∠"),
    (re.compile(r"\\le(?:q|qslant)?(?![A-Za-z])"), "≤"),
    (re.compile(r"\\ge(?:q|qslant)?(?![A-Za-z])"), "≥"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:neq?(?![A-Za-z])|not\s?=)"), "≠"),
    (re.compile(r"(?<=[\d\s])\{([A-Za-z ]+)\}"), r" \1"),  # 69{degrees}
]


_RELATIONS = [
    (re.compile(r"<=(?!>)|=<"), "≤"),
    (re.compile(r">="), "≥"),
    (re.compile(r"=/=|(?<![\w)!])!="), "≠"),  # but 5!=120 is a factorial
    (re.compile(r"==+"), "="),
]

_TAG = re.compile(r"</?(?:b|strong|i|em|u|mark|code|p|br)\s?/?>", re.IGNORECASE)
_TICK = "✓✔✅☑"
_RECURRING = re.compile(r"(?<=\d)(?:\.\.\.+|\s?\\l?dots(?![A-Za-z]))")  # 0.333...
_SIMPLE = re.compile(r"[A-Za-z0-9(),.:% -]{0,80}")  # nothing to tidy but spaces


@functools.lru_cache(65536)
def tidy(text: str) -> str:
    r"""Plain text of an answer: NFKC, no LaTeX wrappers, \frac and \sqrt spelt out, no closing period.

    `$\text{B}$.` -> `B`, `1\frac{1}{2}` -> `1 1/2`, `10⁴` -> `10^4`, `\$13.00` -> `$13.00`.
    """
    if _SIMPLE.fullmatch(text) and ".." not in text:
        text = " ".join(text[:LINE].split())
        return text[:-1].rstrip() if text.endswith(".") else text
    text = text[:LINE].replace("\x0crac", r"\frac").replace("\times", r"\times")  # escapes lost in golds
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
        text = "".join(" " + c if c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" else c for c in text)
        text = unicodedata.normalize("NFKC", text.replace("º", "°")).translate(_PLAIN_CHARS)
    text = _RECURRING.sub("⋯", text).replace("**", "").replace("__", "")
    if text.count("$") - text.count("\\$") >= 2:  # $...$ is math, a single $ is money
        text = re.sub(r"(?<!\\)\$", "", text)
    text = text.replace("\\$", "$").replace("\\%", "%")
    if "<" in text:
        text = _TAG.sub("", text.replace("<sup>", "^{").replace("</sup>", "}"))
    if "\\" in text or "{" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if "=" in text:
        for pattern, sign in _RELATIONS:
            text = pattern.sub(sign, text)
    text = " ".join(text.split()).strip("\"'`*# " + _TICK)
    return text[:-1].rstrip("\"'`*# ") if text.endswith((".", "。")) else text


_SENTENCE_END = re.compile(r"(?:(?<!\d\.\.)\.|(?<!\d)!)(?=[\"')\]*$]*(?:\s|$))|[。！]")  # 5! is a factorial
_ABBREVIATION = re.compile(r"(?:^\W*[A-Za-z]|[.{][A-Za-z]|\b(?:St|Mt|Dr|Mr|Mrs|Ms|sq|vs|No|Rs|approx))$")


def sentence(line: str) -> str:
    """First sentence of a line; dots in 3.5, after `B` in `B. text` and in abbreviations do not end it."""
    for m in _SENTENCE_END.finditer(line):
        if m[0] != "." or not _ABBREVIATION.search(line[max(0, m.start() - 8) : m.start()]):
            return line[: m.start()]
    return line


_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\S)")
_ROOT = re.compile(r"(?:√|sqrt)\s?[({](\w+)[)}]")
_COLON = re.compile(r"\s?:\s?")


@functools.lru_cache(65536)
def plain(text: str) -> str:
    """Text as it is compared: tidied, lower case, without outer punctuation and leading article."""
    text = tidy(text).casefold().strip(" .,;:?\"'")
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    text = _ROOT.sub(r"√\1", _COLON.sub(":", text))
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


# ---- 2. numbers ---------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number as written: exact value, canonical unit ('' for none), decimals (None for 1/2, 10^4 ...)."""

    value: Fraction
    unit: str
    places: int | None


_N = (
    r"(?:(?:\d{1,3}(?:(?:,\d{3})+|(?:'\d{3})+|(?: \d{3}){2,})|\d{1,2}(?:,\d\d)+,\d{3})(?!\d)(?:\.\d+)?"
    r"|\d+(?:\.\d+)?|\.\d+)"
)
_SEPARATOR = re.compile(r"[,' ]")
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<money>[$€£¥₹]|us\$|(?:usd|eur|gbp|inr|rs\.?)\s|)\s?(?P<sign2>[-+]?)\s?"
    rf"(?:(?P<whole>\d+)\s(?P<top>\d+)\s?/\s?(?P<bottom>\d+)|(?P<a>{_N})(?:\s?/\s?(?P<b>-?{_N})"
    r"|(?P<ten>\s?[×x*·]\s?10)?\s?\^\s?[({]?(?P<pow>[-+]?\d{1,3})[)}]?|e(?P<exp>[-+]?\d{1,3})(?!\w))?)",
    re.IGNORECASE,
)
_SIGN_WORD = re.compile(r"(?:negative|minus)\s")
_PERIODIC = re.compile(r"(-?)(\d*)\.(\d*?)(\d{1,6}?)\4{2,}⋯")  # the period three times at least
_PERFECT = re.compile(r"-?(?:(∛|∜)|\\sqrt\s?\[([2-9])\])\s?([({]?)(\d{1,18})[)}]?")
_AGAIN = re.compile(r"\s?\(([\w-]{1,12})\)")  # `five (5)`
_NOT_ANOTHER = re.compile(r",?\s(?:not|rather than|instead of)\s(-?[\d.,]+)$")
_AND_HALF = re.compile(r"\s?and (?:a|one)[- ]half\b")
_INSTEAD = re.compile(  # `5 because ... no, it is 6`
    r"\b(?:no|wait|actually|sorry|i mean)\b\W{0,3}(?:it(?:'s| is) )?-?\d", re.IGNORECASE
)
_DECADE = re.compile(r"\b[12]\d\d0'?s\b")
_LEAD = re.compile(
    r"(?:(?:the )?(?:area|perimeter|length|width|height|volume|radius|diameter|value|sum|difference|product"
    r"|total|mean|median|mode|range|average|number|angle|probability|slope|distance|cost|price|ratio|time)"
    r"(?:\s?:|\s(?:is|equals))\s)?"
    r"(?:in (?=[12]\d{3}$))?"
    r"(?:(?:is|equals?|equal to|approximately|approx\.?|about|around|roughly|nearly|exactly|only|just"
    r"|(?:a )?total of|there (?:is|are)|(?:i (?:think|believe) )?it(?:'s| is))(?![a-z])"
    r"\s?|(?:\b[a-z]\s?)?≈\s?|[=:]\s?)*"
)
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_NAMED_VALUE = re.compile(r"[A-Za-z]\s?[≈=]\s?|[≈=]\s?")
_OPERATOR = re.compile(r"[-+*/^×·√!]|\d\s?[A-Za-z]")
_SEVERAL = re.compile(r",\s|;|\b(?:or|and)\b")
_MONEY_OR_COMMA = re.compile(r"[$€£¥]|(?<=\d),(?=\d{3})")
_DIGITS = re.compile(r"-?[0-9]{1,18}(?:\.[0-9]{1,18})?")  # the usual case
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"lakh": 10**5, "crore": 10**7, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_SCALE = re.compile(
    r"\s?(?:(hundred|thousand|million|billion|trillion|lakh|crore)s?\b|([百千万亿])(?![克米万亿]))"
)
_LETTER_UNIT = re.compile(r"[\d)]\s?([A-Za-zπ])$")  # 5m is 5 metres, 5a is algebra


@functools.lru_cache(65536)
def number(text: str) -> Number | None:
    r"""Reads a text that *is* one number, with at most a lead (`x =`, `about`) and a unit; else None.

    `$1,234.50`, `-3`, `1 1/2`, `2×10^4`, `1.5e3`, `twelve apples`, `50%`, `5 cm^2`; but neither `25π` nor
    `3:4`, `3 and 5`, `7:30`, `2x+3`, `2x = 4`, `[1, 2]`.
    """
    if _DIGITS.fullmatch(text):
        whole, _, decimals = text.partition(".")
        value = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))
        return Number(value, "", len(decimals))
    text = tidy(text)
    if _INSTEAD.search(text):
        return None
    text = REASON.split(text, maxsplit=1)[0]
    if "=" in text and not _SEVERAL.search(text):
        return _right_side(*(side.strip() for side in text.split("=")))
    if (m := _LETTER_UNIT.search(text)) and m[1] not in "mshglNJWVACFLΩ":
        return None
    if "⋯" in text or "∛" in text or "∜" in text or "\\sqrt" in text:
        return _exact(_NAMED_VALUE.sub("", text, count=1))
    text = text.lower()
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    if text[:1] in "({" and text[-1:] in ")}" and "," not in text:
        text = text[1:-1].strip()
    if _DECADE.search(text):
        return None
    places = None
    minus = _SIGN_WORD.match(text)
    text = text[minus.end() :] if minus else text
    if said := spelled(text):
        value, end = said
        money, negative = "", False
        places = 0 if value.denominator == 1 else None
    elif m := _NUMBER.match(text):
        money, negative = m["money"], (m["sign"] == "-") != (m["sign2"] == "-")
        try:
            value, places = _value(m)
        except (ArithmeticError, ValueError):
            return None
        end = m.end()
    else:
        return None
    tail = text[end:]
    if tail and (half := _AND_HALF.match(tail)) and value.denominator == 1:
        tail = tail[half.end() :]
        value += Fraction(1, 2)
        places = None
    elif tail and (scale := _SCALE.match(tail)):
        tail = tail[scale.end() :]
        value *= _SCALES[scale[1] or scale[2]]
        places = None
    value = -value if negative != bool(minus) else value
    for pattern, same_value in ((_AGAIN, True), (_NOT_ANOTHER, False)):
        if tail and (other := pattern.match(tail)) and (n := number(other[1])):
            if (n.value == value) is not same_value:
                return None
            tail = tail[other.end() :]
    name = unit(tail, one=value == 1)
    if name is None:
        return None
    money = UNITS.get(money.strip(), money)
    return Number(value, money + name if money and name[:1] == "/" else name or money, places)


def _exact(text: str) -> Number | None:
    """`0.1666⋯` with its period, `∛8` and `\\sqrt[3]{8}` where the root is a whole number."""
    if m := _PERIODIC.fullmatch(text):
        sign, whole, before, period = m.groups()
        repeated = Fraction(int(period), 10 ** len(before) * (10 ** len(period) - 1))
        value = Fraction(int(whole + before or "0"), 10 ** len(before)) + repeated
        return Number(-value if sign else value, "", None)
    if m := _PERFECT.fullmatch(text):
        degree, radicand = int(m[2] or {"∛": 3, "∜": 4}[m[1]]), int(m[4])
        root = round(radicand ** (1 / degree))
        signed = Fraction(-root if text[0] == "-" else root)
        return Number(signed, "", 0) if root**degree == radicand else None
    return None


def _right_side(*sides: str) -> Number | None:
    """The number on the right of `x = 3` and `3·4 = 12`; None of `2x = 10` and `40 = 12`."""
    *lefts, right = sides
    if any(set(left) & set("<>≤≥≠≈") for left in lefts):
        return None
    if len(lefts) == 1 and _VARIABLE.search(lefts[0]) and _OPERATOR.search(lefts[0]):
        return None  # an equation that was not solved
    if (value := number(right)) is None:
        return None
    for left in lefts:
        said = number(left)
        if said is None and (result := arithmetic(_MONEY_OR_COMMA.sub("", left))) is not None:
            said = Number(result, "", None)
        comparable = said is not None and (said.unit == value.unit or "" in (said.unit, value.unit))
        if said and comparable and not (_rounded(said, value) or _rounded(value, said)):
            return None
    return value


def _rounded(exact: Number, written: Number) -> bool:
    return same_number(written, exact, "float", written.places or None)


def _value(m: re.Match) -> tuple[Fraction, int | None]:
    if m["whole"]:
        return int(m["whole"]) + Fraction(int(m["top"]), int(m["bottom"])), None
    written = _SEPARATOR.sub("", m["a"])
    value = Fraction(written)
    if m["b"]:
        return value / Fraction(_SEPARATOR.sub("", m["b"])), None
    power = int(m["pow"] or m["exp"] or 0)
    if abs(power) * len(written) > 300:
        raise OverflowError
    if m["pow"]:
        return (value * Fraction(10) ** power if m["ten"] else value**power), None
    if m["exp"]:
        return value * Fraction(10) ** power, None
    return value, len(written.partition(".")[2])


def same_number(gold: Number, other: Number, answer_type: str | None, precision: int | None) -> bool:
    """Whether `other` answers `gold`: integers exactly, floats to their precision; units may not differ.

    Without a `precision` a decimal counts as rounded to the decimals it is written with, at least two
    (0.33 takes 1/3); anything else, such as a gold 1/3, takes a relative 1e-4.
    """
    if gold.unit and other.unit and gold.unit != other.unit:
        return False
    values = [other.value]
    if (gold.unit == "%") != (other.unit == "%"):  # 50% is 50 and 0.5, but plain 50 is not 0.5
        values.append(other.value / 100 if other.unit == "%" else other.value * 100)
    if gold.value in values:
        return True
    integral = gold.value.denominator == 1 and not gold.places
    if answer_type == "integer" or (answer_type != "float" and integral):
        return False
    if precision is not None and 0 <= precision <= 50:
        tolerance = Fraction(1, 2 * 10**precision) + Fraction(1, 10**9)
    elif gold.places is not None:
        rounding = Fraction(1, 2 * 10 ** max(gold.places, 2))
        tolerance = max(rounding, min(abs(gold.value) / 10**4, Fraction(1, 200)))
    else:
        tolerance = abs(gold.value) / 10**4
    return any(abs(value - gold.value) <= tolerance for value in values)


# ---- 3. kinds ------------------------------------------------------------------------------------

_CHANGED = re.compile(
    r"\b(?:but|wait|actually|however|rather)\b|\b(?:which|that|it)\s(?:is|was)\s(?:\w+\s)?(?:wrong|incorrect)\b"
    r"|\((?:wrong|incorrect|false|not)\b|^(?:yes|true)\W{1,3}(?:no|false)\b|^(?:no|false)\W{1,3}(?:yes|true)\b"
)
_CONDITION = re.compile(
    r"\b(?:if|unless|otherwise|depend(?:s|ing)|except|only when|sometimes|partly|maybe|perhaps)\b"
)
_BOOLEAN = re.compile(
    r"(yes|no|true|false)(?:$|\s?[,.;:!(]|\s-\s|\s(?:because|since|as|it|they|the|there|he|she|this|these)\b)"
)
SYMBOLIC = re.compile(r"[\\^√π=+*(){}\[\]<>≤≥≠]|[\da-z]\s?/\s?\d|\d[a-z]\b|\d!")


def boolean(text: str) -> bool | None:
    """Reads `yes`, `true`, `No, because ...`; None where the text is no such answer."""
    if tidy(text).endswith("?"):
        return None
    text = plain(text)
    m = _BOOLEAN.match(text)
    if m is None or _CHANGED.search(text) or _CONDITION.search(REASON.split(text, maxsplit=1)[0]):
        return None
    return m[1] in ("yes", "true")


def kind(answer: str) -> str:
    """The answer type of a free-form gold: `boolean`, `integer`, `float`, `math` or `text`."""
    answer = tidy(answer)
    if plain(answer) in ("yes", "no", "true", "false"):
        return "boolean"
    if n := number(answer):
        if n.places is None:
            return "math"
        return "float" if n.places else "integer"
    return "math" if SYMBOLIC.search(answer) else "text"
