r"""Formulas as a model writes them, by a grammar that leaves nothing open.

    latex("5*sqrt(3)")       -> (r"5 \cdot \sqrt{(3)}",)
    latex(r"\frac12x")       -> (r"\frac{1}{2} \cdot (x)",)
    latex("y = 2x + 1")      -> ("(y)", "=", r"2 \cdot (x) + 1")
    latex("2 3")             -> None

The result is for a LaTeX parser that reads what is left open in its own way (math-verify's reads `2 3` as 5,
`3:4` as 3/4, `1/2x` as 1/(2x), `A` as `a`): every operand is in brackets, every product has its sign. What
the grammar does not know is no formula, and neither are towers of powers and large factorials.
"""

import functools
import re

LENGTH = 200  # longest formula that is read, in characters
POWER, FACTORIAL, TOKENS, DEPTH = 99, 20, 60, 12  # largest exponent and factorial, most tokens and brackets

_FUNCTIONS: tuple[str, ...]
_FUNCTIONS = ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS += ("ln", "log", "exp")
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega")
_SPELLINGS = {  # of one sign
    "*": ("*", "\\cdot", "\\times", "·", "×", "∗"),
    "/": ("/", "\\div", "÷"),
    "^": ("^", "**"),
    "\\le": ("≤", "\\le", "\\leq", "<="),
    "\\ge": ("≥", "\\ge", "\\geq", ">="),
    "<": ("<", "\\lt"),
    ">": (">", "\\gt"),
    "\\pi": ("π", "\\pi", "pi"),
    "\\infty": ("∞", "\\infty"),
    "\\sqrt": ("√", "\\sqrt", "sqrt"),
    "\\frac": ("\\frac", "\\dfrac", "\\tfrac"),
    **{name: (sign, f"\\{name}") for name, sign in zip(_GREEK, "αβγδθλμρσφω")},
    **{name: (name, f"\\{name}") for name in _FUNCTIONS},
    **{sign: (sign,) for sign in "+-_=(){}!|"},
}
_SIGNS = {spelling: sign for sign, spellings in _SPELLINGS.items() for spelling in spellings}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<sign>"
    + "|".join(
        re.escape(s) + ("(?![A-Za-z])" if s[0] == "\\" and s[-1].isalpha() else "")
        for s in sorted(_SIGNS, key=len, reverse=True)
    )
    + r")|(?P<letter>[A-Za-z]))"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_RELATIONS = ("=", "<", ">", "\\le", "\\ge")
_STARTS = ("\\pi", "\\infty", "\\sqrt", "\\frac", "(", "{", *_GREEK, *_FUNCTIONS)  # of a factor


class _Unreadable(Exception):
    """The text is no formula of this grammar."""


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    """(kind, text, preceded by a space) of each token."""
    tokens: list[tuple[str, str, bool]] = []
    at, text = 0, text.strip()
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None or len(tokens) >= TOKENS:
            raise _Unreadable(text)
        kind = str(m.lastgroup)
        tokens.append((kind, _SIGNS[m[kind]] if kind == "sign" else m[kind], text[at].isspace()))
        at = m.end()
    return tokens


class _Reader:
    """Recursive descent over the tokens; every method returns LaTeX with each operand in brackets."""

    def __init__(self, text: str):
        self.tokens, self.at, self.depth = _tokens(text), 0, 0

    def next(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.next()
        if not token or (wanted and token not in wanted):
            raise _Unreadable(token)
        self.at += 1
        return token

    def relation(self) -> list[str]:
        """[left, sign, right], or [expression]."""
        parts = [self.sum()]
        if self.next() in _RELATIONS:
            parts += [self.take(), self.sum()]
        if self.at < len(self.tokens):
            raise _Unreadable(self.next())
        return parts

    def sum(self) -> str:
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        made = "-" + self.product() if self.next() == "-" and self.take() else self.product()
        while self.next() in ("+", "-"):
            made = f"{made} {self.take()} {self.product()}"
        self.depth -= 1
        return made

    def product(self) -> str:
        if self.next() == "+":
            self.take()
        made, slashed = self.factor(), False
        while True:
            before = self.at
            if self.next() == "*":
                self.take()
                made = f"{made} \\cdot {self.signed()}"
            elif self.next() == "/":
                if slashed:
                    raise _Unreadable("1/2/2003 is a date")
                self.take()
                made, slashed = rf"\frac{{{made}}}{{{self.signed()}}}", True
            elif self.kind() == "letter" or self.next() in _STARTS:
                last, (_, token, spaced) = self.tokens[before - 1], self.tokens[before]
                if slashed and not spaced:
                    raise _Unreadable("1/2x may be 1/(2x)")
                if last[1].isalpha() and token.isalpha() and last[1].isupper() and token.isupper():
                    raise _Unreadable("AB is the name of a segment")
                made = f"{made} \\cdot {self.factor()}"
            else:
                return made

    def signed(self) -> str:
        return f"(-{self.factor()})" if self.next() == "-" and self.take() else self.factor()

    def factor(self) -> str:
        """A power or factorial. Towers are refused, and so is what only a computer could write down."""
        begin = self.at
        base = self.atom()
        if self.next() == "!":
            self.take()
            if self.at - begin != 2 or (base.isdigit() and int(base) > FACTORIAL):
                raise _Unreadable("a large factorial")
            return f"({base}!)"
        if self.next() != "^":
            return base
        if self.tokens[self.at][2] and base.isdigit() and self.tokens[begin - 1][1] == "/":
            raise _Unreadable("2/3 ^2 was a fraction squared")
        self.take()
        if "^" in base and base.count("^") > 2:
            raise _Unreadable("a power of powers")
        if self.next() in ("{", "("):
            exponent = self.group()
        else:
            minus = "-" if self.next() == "-" and self.take() else ""
            exponent = minus + self.atom()
        if "^" in exponent or "!" in exponent or self.next() in ("^", "!"):
            raise _Unreadable("a tower of powers")
        if any(int(digits) > POWER for digits in re.findall(r"\d+", exponent)):
            raise _Unreadable("a large exponent")
        return f"({base})^{{{exponent}}}"

    def group(self) -> str:
        close = {"(": ")", "{": "}"}[self.take("(", "{")]
        made = self.sum()
        self.take(close)
        return f"({made})"

    def atom(self) -> str:
        kind, token = self.kind(), self.next()
        if token in ("(", "{"):
            return self.group()
        if token == "|":
            self.take()
            made = self.sum()
            self.take("|")
            return f"|{made}|"
        self.take()
        if kind == "number":
            whole, _, decimals = token.partition(".")
            return (
                rf"\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}" if decimals else str(int(whole))
            )
        if kind == "letter" or token in _GREEK:
            name = token if kind == "letter" else f"\\{token}"
            return f"({name}_{{{self.index()}}})" if self.next() == "_" else f"({name})"
        if token in ("\\pi", "\\infty"):
            return token
        if token == "\\sqrt":
            return self.root()
        if token == "\\frac":
            return rf"\frac{{{self.argument()}}}{{{self.argument()}}}"
        if token in _FUNCTIONS:
            return self.function(token)
        raise _Unreadable(token)

    def index(self) -> str:
        self.take("_")
        braced = self.next() == "{" and bool(self.take())
        if self.kind() not in ("number", "letter") or len(self.next()) > 2:
            raise _Unreadable("an index")
        name = self.take()
        if braced:
            self.take("}")
        return name

    def argument(self) -> str:
        """`{...}` or one digit or letter: \\frac12 is 1/2."""
        if self.next() == "{":
            return self.group()
        if self.kind() == "number" and len(self.next()) > 1 and self.next().isdigit():
            _, digits, _ = self.tokens[self.at]
            self.tokens[self.at : self.at + 1] = [("number", d, False) for d in digits]
        return self.atom()

    def root(self) -> str:
        if self.next() in ("(", "{"):
            return rf"\sqrt{{{self.group()}}}"
        if self.kind() not in ("number", "letter"):
            raise _Unreadable("√ of something open")
        return rf"\sqrt{{{self.atom()}}}"

    def function(self, name: str) -> str:
        power = ""
        if name == "log" and self.next() == "_":
            name = f"log_{{{self.index()}}}"
        elif self.next() == "^":
            self.take()
            power = self.group() if self.next() in ("(", "{") else self.take()
            if power.strip("()") not in ("2", "3", "4"):  # sin^{-1} may be two things
                raise _Unreadable("an inverse or a power")
        if self.next() in ("(", "{"):
            argument = self.group()
        else:  # \sin 2x: numbers, letters and π up to the next sign
            argument = self.factor()
            while self.kind() == "letter" or self.next() == "\\pi":
                argument = f"{argument} \\cdot {self.factor()}"
        if name == "exp":
            return rf"(e)^{{{argument}}}"
        made = rf"\{name}({argument})"
        return f"({made})^{{{power.strip('()')}}}" if power else made


@functools.lru_cache(8192)
def latex(text: str) -> tuple[str, ...] | None:
    r"""The formula as unambiguous LaTeX: (expression,) or (left, sign, right); None where it is none.

    Reads tidied text, LaTeX or plain: `5*sqrt(3)`, `5√3`, `5\sqrt{3}`; `1 1/2` is one and a half.
    """
    if len(text) > LENGTH:
        return None
    text = text.replace("−", "-").replace("\\left", "").replace("\\right", "").replace("\\,", " ")
    text = re.sub(r"(?<![\d.])(\d{1,3}) (\d{1,3})\s?/\s?(\d{1,3})(?![\d.])", r"(\1+\2/\3) ", text)
    if any(len(word) > 3 and word not in _SIGNS for word in _WORD.findall(text)):
        return None
    try:
        return tuple(_Reader(text).relation())
    except (_Unreadable, RecursionError, ValueError):
        return None
