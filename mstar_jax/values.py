r"""Reading answers as values: plain text and exact numbers.

    tidy(r"$\frac{1}{2}$ \text{ cm}.")   -> "1/2 cm"
    plain("The  Red Ball,")               -> "red ball"
    number("about $1,234.50")             -> Number(value=2469/2, unit="$", places=2)

Numbers are exact fractions. A text is a number only as a whole: `25π`, `3:4`, `3 and 5`, `2x+3` are none.
No expression is ever evaluated.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

LINE = 400  # longest answer that is looked at, in characters

# ---- 1. plain text ------------------------------------------------------------------------------------

_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴-⁹]+")
_PLAIN_CHARS = str.maketrans("−‐‑‒–—⁄“”‘’′", "------/\"\"'''", "\u200b\ufeff")
_NUMERIC = re.compile(r"-?[\d.,]+")


def _fraction(m: re.Match) -> str:
    top, bottom = (m[1] or m[2] or "").strip(), (m[3] or m[4] or "").strip()
    numeric = _NUMERIC.fullmatch(top) and _NUMERIC.fullmatch(bottom)
    return f" {top}/{bottom} " if numeric else f"({top})/({bottom})"


_LATEX: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[()\[\]]|\$\$|\\(?:left|right|displaystyle|!|,)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed|operatorname)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[;: ]|~|\\q?quad"), " "),
    (re.compile(r"\^?\{?\\circ\}?|\\degrees?"), "°"),
    (re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))"), _fraction),
    (re.compile(r"\\sqrt\s?\{([^{}]*)\}"), r"√(\1)"),
    (re.compile(r"\\sqrt\s?"), "√"),
    (re.compile(r"\\(?:times)"), "×"),
    (re.compile(r"\\cdot"), "·"),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\approx"), "≈"),
    (re.compile(r"\\angle\s?"), "∠"),
    (re.compile(r"(?<=[\d\s])\{([A-Za-z ]+)\}"), r" \1"),  # 69{degrees}
]


@functools.lru_cache(65536)
def tidy(text: str) -> str:
    r"""Plain text of an answer: NFKC, LaTeX wrappers gone, \frac and \sqrt spelt out, no closing period.

    `$\text{B}$.` -> `B`, `1\frac{1}{2}` -> `1 1/2`, `10⁴` -> `10^4`, `\$13.00` -> `$13.00`.
    """
    text = text[:LINE].replace("\x0crac", r"\frac").replace("\times", r"\times")  # eaten escapes in golds
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
        text = "".join(" " + c if c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" else c for c in text)
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN_CHARS)
    text = text.replace("**", "").replace("__", "")
    if text.count("$") - text.count("\\$") >= 2:  # $...$ is math, a single $ is money
        text = re.sub(r"(?<!\\)\$", "", text)
    text = text.replace("\\$", "$").replace("\\%", "%")
    if "\\" in text or "{" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    text = " ".join(text.split()).strip("\"'`*# ")
    return text[:-1].rstrip("\"'`*# ") if text.endswith((".", "。")) else text


_ARTICLE = re.compile(r"(?:the|an?)\s+(?=\S)")
_ROOT = re.compile(r"(?:√|sqrt)\s?[({](\w+)[)}]")
_PRODUCT = re.compile(r"(?<=[\d)])\s?[*·]\s?(?=[a-zπ√(])")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_COLON = re.compile(r"\s?:\s?")


@functools.lru_cache(65536)
def plain(text: str) -> str:
    """What text answers are compared by: tidy, lower case, no outer punctuation, no leading article."""
    text = tidy(text).casefold().strip(" .,;:?\"'")
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    text = _ROOT.sub(r"√\1", _COLON.sub(":", text))
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


def _formula(text: str) -> str:
    """What formulas are compared by: right-hand side, no spaces, no product signs. Text, not algebra."""
    return _SPACE.sub("", _PRODUCT.sub("", plain(text.rsplit("=", 1)[-1])))


# ---- 2. numbers ---------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number as written: exact value, canonical unit ('' for none), decimals (None for 1/2, 10^4 ...)."""

    value: Fraction
    unit: str
    places: int | None


_N = r"(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<money>[$€£¥]?)\s?(?P<sign2>[-+]?)\s?"
    rf"(?:(?P<whole>\d+)\s(?P<top>\d+)\s?/\s?(?P<bottom>\d+)|(?P<a>{_N})(?:\s?/\s?(?P<b>{_N})"
    r"|(?P<ten>\s?[×x*·]\s?10)?\s?\^\s?[({]?(?P<pow>[-+]?\d{1,3})[)}]?|e(?P<exp>[-+]?\d{1,3})(?!\w))?)",
    re.IGNORECASE,
)
_WORDS = (  # their place is their value
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_WORD = re.compile(
    rf"(?P<sign>minus |negative )?(?P<word>{'|'.join(sorted(_WORDS, key=len, reverse=True))})\b(?!-)"
)
_LEAD = re.compile(
    r"(?:(?:is|equals?|equal to|approximately|approx\.?|about|around|roughly|nearly|exactly|only|just"
    r"|(?:a )?total of|there (?:is|are)|it is)(?![a-z])\s?|[≈=:]\s?)+"
)
_SEVERAL = re.compile(r",\s|;|\b(?:or|and)\b")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNIT_NAMES = """
m meter meters metre metres; cm centimeter centimeters centimetre centimetres; km kilometer kilometers
mm millimeter millimeters; in inch inches; ft foot feet; yd yard yards; mi mile miles; g gram grams
kg kilogram kilograms; mg milligram milligrams; lb lbs pound pounds; oz ounce ounces
l liter liters litre litres; ml milliliter milliliters; s sec secs second seconds
min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months; year years
° deg degree degrees; % percent; $ dollar dollars usd; ¢ cent cents; € euro euros; £; ¥ yuan
n newton newtons; j joule joules; w watt watts; v volt volts; a amp amps; ω ohm ohms; hz; mph; °c c; °f f
pa; kpa; mol; nm; kj; n/m; m/s; km/h
"""  # the first of each is its canonical name
_UNITS = {
    name: names.split()[0] for names in re.split("[;\n]", _UNIT_NAMES.strip()) for name in names.split()
}
_SQUARE = re.compile(r"(?:sq(?:uare|\.)? (?P<a>[a-z]+)|(?P<b>[a-z]+?)(?: squared|\^?\{?2\}?))$")
_CUBE = re.compile(r"(?:cubic (?P<a>[a-z]+)|(?P<b>[a-z]+?)(?: cubed|\^?\{?3\}?))$")
_NOT_UNIT = re.compile(
    r"\d|[\\^√π+*/=<>|\[\]{}]|\b(?:and|or|to|of|than|times|plus|minus|pi|sqrt|root|squared|half|halves|thirds?"
    rf"|quarters?|(?:six|seven|eigh|nin|ten|hundred|thousand)ths?|dozen|factorial|sin|cos|tan|log|ln|over|by|x|y|n|{'|'.join(_WORDS)})\b"
)
_LETTER_UNIT = re.compile(r"[\d)]\s?([A-Za-zπ])$")  # 5m is 5 metres, 5a is algebra
_ASIDE = re.compile(r",?\s(?:because|since|with|which|where)\b")
_CLAUSE = re.compile(r"[,;(]|\b(?:because|since|as|so|which|in total|left|per)\b")


def _unit(tail: str) -> str | None:
    """Canonical unit of the words after a number, '' for none; None where the tail is not a unit."""
    text = _ASIDE.split(tail, maxsplit=1)[0].strip()
    if not text:
        return ""
    for pattern, power in ((_SQUARE, 2), (_CUBE, 3)):
        if (m := pattern.fullmatch(text)) and (m["a"] or m["b"]) in _UNITS:
            return f"{_UNITS[m['a'] or m['b']]}^{power}"
    if text in _UNITS:
        return _UNITS[text]
    glued, first = tail[0] != " ", text[0]
    if first.isalpha() and "/" in text:
        text = text.replace("/", " per ")
    if _NOT_UNIT.search(text) or (len(text) < 3 and first < "\u2e80"):
        return None
    if first in ",;(" or (first > "\u2e80" and first.isalpha()):
        return ""
    if glued and first not in "%°$€£¥¢-" or not (first.isalpha() or first in "%°$€£¥¢-"):
        return None
    words = _CLAUSE.split(text, maxsplit=1)[0].strip(" -")
    head = words.split(" ", 1)[0]
    return _UNITS.get(words) or _UNITS.get(head) or words.rstrip("s")


@functools.lru_cache(65536)
def number(text: str) -> Number | None:
    """Reads a text that *is* one number with at most a lead (`x =`, `about`) and a unit; else None.

    `$1,234.50`, `-3`, `1 1/2`, `2×10^4`, `1.5e3`, `twelve apples`, `50%`, `5 cm^2`; but neither `25π` nor
    `3:4`, `3 and 5`, `7:30`, `2x+3`, `[1, 2]`.
    """
    text = tidy(text)
    if "=" in text and not _SEVERAL.search(text):
        text = text.rsplit("=", 1)[1].strip()
    if (m := _LETTER_UNIT.search(text)) and m[1] not in "mshglNJWVACFLΩ":
        return None
    text = text.lower()
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    if text[:1] in "({" and text[-1:] in ")}" and "," not in text:
        text = text[1:-1].strip()
    places = None
    if m := _WORD.match(text):
        value, money = Fraction(_WORDS.index(m["word"])), ""
        negative = bool(m["sign"])
        places = 0
    elif m := _NUMBER.match(text):
        money, negative = m["money"], (m["sign"] == "-") != (m["sign2"] == "-")
        try:
            value, places = _value(m)
        except (ArithmeticError, ValueError):
            return None
    else:
        return None
    tail = text[m.end() :]
    scale = next((s for s in _SCALES if re.match(rf"\s?{s}s?\b", tail)), None) if tail else None
    if scale:
        tail, value, places = re.sub(rf"^\s?{scale}s?", "", tail), value * _SCALES[scale], None
    unit = _unit(tail)
    return None if unit is None else Number(-value if negative else value, unit or money, places)


def _value(m: re.Match) -> tuple[Fraction, int | None]:
    if m["whole"]:
        return int(m["whole"]) + Fraction(int(m["top"]), int(m["bottom"])), None
    written = m["a"].replace(",", "")
    value = Fraction(written)
    if m["b"]:
        return value / Fraction(m["b"].replace(",", "")), None
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


# ---- 3. comparison ------------------------------------------------------------------------------------

_BOOLEAN = re.compile(
    r"(yes|no|true|false)(?:$|\s?[,.;:!(]|\s(?:because|since|as|it|they|the|there|he|she|this|these)\b)"
)
_OPENING = re.compile(r"[\[({]")
_SYMBOLIC = re.compile(r"[\\^√π=+*(){}\[\]]|\d\s?/\s?\d|\d[a-z]\b")


def boolean(text: str) -> bool | None:
    """Reads `yes`, `true`, `No, because ...`; None where the text is no such answer."""
    m = _BOOLEAN.match(plain(text))
    return m[1] in ("yes", "true") if m else None


def _elements(text: str) -> tuple[str, list[str]]:
    """(opening and closing bracket or '', the parts between top-level commas); no parts if not a list."""
    text = tidy(text).replace("\\{", "{").replace("\\}", "}")
    ends = text[:1] + text[-1:]
    brackets = ends if ends in ("[]", "()", "{}", "[)", "(]") else ""
    inner = text[1:-1] if brackets else text
    if "," not in inner:
        return brackets, [inner.strip()] if brackets == "[]" else []
    spaced, parts, depth, start = ", " in inner, [], 0, 0
    for i, c in enumerate(inner):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and (not spaced or inner[i + 1 : i + 2] == " "):
            parts.append(inner[start:i].strip())
            start = i + 1
    if not brackets and not parts:  # unbalanced: the commas are all inside
        return "", []
    return brackets, [*parts, inner[start:].strip()]


def _same_list(gold: str, other: str, answer_type: str | None, precision: int | None) -> bool:
    brackets, expected = _elements(gold)
    given_brackets, given = _elements(other)
    plain_pair = {brackets, given_brackets} <= {"[]", "()"}
    if len(expected) != len(given) or not (given_brackets in ("", brackets) or plain_pair):
        return False
    if brackets != "{}":
        return all(same(a, b, None, precision) for a, b in zip(expected, given, strict=True))
    for element in expected:  # a set: every element finds its partner
        match = next((g for g in given if same(element, g, None, precision)), None)
        if match is None:
            return False
        given.remove(match)
    return True


def same(gold: str, other: str, answer_type: str | None, precision: int | None) -> bool:
    """Whether `other` answers a free-form `gold`; both are extracted answers. Not symmetric in rounding."""
    if gold == other:
        return True
    if (expected := boolean(gold)) is not None:
        return boolean(other) is expected
    if n := number(gold):
        m = number(other)
        return m is not None and same_number(n, m, answer_type, precision)
    if (
        gold[:1] in "[({\\"
        and len(_OPENING.findall(gold)) <= 20
        and len(_elements(gold)[1]) > (gold[:1] != "[")
    ):
        return _same_list(gold, other, answer_type, precision)
    return plain(gold) == plain(other) or bool(_SYMBOLIC.search(gold)) and _formula(gold) == _formula(other)


def kind(answer: str) -> str:
    """The answer type of a free-form gold: `boolean`, `integer`, `float`, `math` or `text`."""
    answer = tidy(answer)
    if plain(answer) in ("yes", "no", "true", "false"):
        return "boolean"
    if n := number(answer):
        if n.places is None:
            return "math"
        return "float" if n.places else "integer"
    return "math" if _SYMBOLIC.search(answer) else "text"
