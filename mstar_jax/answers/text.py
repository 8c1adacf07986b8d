r"""The plain text of an answer, without LaTeX, and the first sentence of a line.

tidy(r"$\frac{1}{2}$ \text{ cm}.")   -> "1/2 cm"
plain("The  Red Ball,")               -> "red ball"
"""

import functools
import re
import unicodedata
from collections.abc import Callable

LINE = 400  # longest answer that is read, in characters

_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴-⁹]+")
_PLAIN_CHARS = str.maketrans("−‐‑‒–—⁄“”‘’∶", "------/\"\"'':", "\u200b\ufeff")
_DEGREE = re.compile(r"º|(?<=\d)˚")
_PRIME = re.compile(r"(?<![\d′])′")  # 5′ are feet or minutes
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
    (re.compile(r"\\[;: ]|~(?=\S)|\\q?quad"), " "),
    (re.compile(r"\^?\{?\\circ\}?|\\(?:text)?degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\sqrt\s?\{([^{}]*)\}"), r"√(\1)"),
    (re.compile(r"\\(?:[dtc]?|nice|s)frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))"), _fraction),
    (re.compile(r"\\sqrt\s?(?!\[)"), "√"),
    (re.compile(r"\\(?:times)"), "×"),
    (re.compile(r"\\cdot"), "·"),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\mu(?![A-Za-z])\s?"), "μ"),
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
    (re.compile(r"(?<![\w)!])!="), "≠"),  # but 5!=120 is a factorial
    (re.compile(r"==+"), "="),
]

_UNEQUAL = re.compile(r"=/=|=\\=|~=|/=")
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
        text = unicodedata.normalize("NFKC", _DEGREE.sub("°", text)).translate(_PLAIN_CHARS)
        text = _PRIME.sub("'", text)
    text = _RECURRING.sub("⋯", text).replace("**", "").replace("__", "")
    if text.count("$") - text.count("\\$") >= 2:  # $...$ is math, a single $ is money
        text = re.sub(r"(?<!\\)\$", "", text)
    text = _UNEQUAL.sub("≠", text.replace("\\$", "$").replace("\\%", "%"))
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
