r"""Parses the formulas that a model writes, with a grammar that accepts only what has one reading.

    parse("5*sqrt(3)")       -> Formula(("*", 5, ("sqrt", 3)))       numbers are written short here
    parse(r"\frac12x")       -> Formula(("*", ("/", 1, 2), ("symbol", "x")))
    parse("y = 2x + 1")      -> Formula(("symbol", "y"), "=", ("+", ("*", 2, ("symbol", "x")), 1))
    parse("2 3")             -> None

A tree is a nested tuple: the name of an operation, then its arguments. Its leaves are ("number", numerator,
denominator), ("symbol", name), ("e",), ("pi",) and ("infinity",). worker.py builds sympy expressions from
such trees. Ambiguous text (`2 3`, `1/2x`, `AB`), towers of powers and large factorials have no tree.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple, TypeAlias

LENGTH = 200  # longest formula that is parsed, in characters
POWER = 99  # largest number in an exponent
FACTORIAL = 20  # largest number whose factorial is accepted
BITS = 4096  # length of the largest power that `arithmetic` works out
TOKENS = 60  # most tokens of a formula
DEPTH = 12  # most brackets inside one another

Tree: TypeAlias = tuple["str | int | Tree", ...]


class Formula(NamedTuple):
    """An expression, or a relation between two.

    Attributes:
      left: the expression, or the left side.
      sign: `=`, `<`, `>`, `<=` or `>=`; '' for an expression.
      right: the right side; None for an expression.
    """

    left: Tree
    sign: str = ""
    right: Tree | None = None


FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc"),
    *("ln", "log", "exp"),
)
_GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega")
_SPELLINGS = {  # of one sign
    "*": ("*", "\\cdot", "\\times", "·", "×", "∗"),
    "/": ("/", "\\div", "÷"),
    "^": ("^", "**"),
    "<=": ("≤", "\\le", "\\leq", "<="),
    ">=": ("≥", "\\ge", "\\geq", ">="),
    "<": ("<", "\\lt"),
    ">": (">", "\\gt"),
    "pi": ("π", "\\pi", "pi"),
    "infinity": ("∞", "\\infty"),
    "sqrt": ("√", "\\sqrt", "sqrt"),
    "frac": ("\\frac", "\\dfrac", "\\tfrac"),
    **{name: (sign, f"\\{name}") for name, sign in zip(_GREEK, "αβγδθλμρσφω")},
    **{name: (name, f"\\{name}") for name in FUNCTIONS},
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
_RELATIONS = ("=", "<", ">", "<=", ">=")
_FACTOR_STARTS = ("pi", "infinity", "sqrt", "frac", "(", "{", *_GREEK, *FUNCTIONS)


class _Unreadable(Exception):
    """The text is not a formula of this grammar."""


def nodes(tree: Tree) -> Iterator[Tree]:
    """A tree and all trees inside it."""
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from nodes(part)


def arithmetic(text: str) -> Fraction | None:
    """The value of a text that is arithmetic: 12 of `3·4`, to 15 digits that of `4π`; else None."""
    made = parse(text)
    try:
        return None if made is None or made.sign else _evaluated(made.left)
    except (ArithmeticError, ValueError):
        return None


def _evaluated(tree: Tree) -> Fraction:
    """Its value. ValueError or ArithmeticError where it has none, or a long one."""
    name, *parts = tree
    if name == "number":
        return Fraction(*(part for part in parts if isinstance(part, int)))
    if name == "pi":
        return Fraction(math.pi)
    values = [_evaluated(part) for part in parts if isinstance(part, tuple)]
    if name == "sqrt":
        top, bottom = math.isqrt(values[0].numerator), math.isqrt(values[0].denominator)
        exact = Fraction(top, bottom)
        return exact if exact**2 == values[0] else Fraction(math.sqrt(values[0]))
    if name == "factorial":
        return Fraction(math.factorial(int(values[0])))
    if name == "^":
        base, exponent = values
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if exponent.denominator != 1 or bits * abs(exponent) > BITS:
            raise ValueError(f"{base} to the {exponent}")
        return base ** int(exponent)
    if name not in _ARITHMETIC:
        raise ValueError(name)
    return _ARITHMETIC[str(name)](*values)


_ARITHMETIC: dict[str, Callable[..., Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negative": operator.neg,
    "abs": abs,
}


def _number(text: str) -> Tree:
    value = Fraction(text)
    return ("number", value.numerator, value.denominator)


class _Token(NamedTuple):
    kind: str  # "number", "sign" or "letter"
    text: str  # a sign in the spelling of its key in _SPELLINGS
    spaced: bool  # whether a space comes before it


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    text = text.strip()
    at = 0
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None or len(tokens) >= TOKENS:
            raise _Unreadable(text)
        kind = str(m.lastgroup)
        tokens.append(_Token(kind, _SIGNS[m[kind]] if kind == "sign" else m[kind], text[at].isspace()))
        at = m.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens; each method returns the tree of what it consumed."""

    def __init__(self, text: str):
        self.tokens = _tokens(text)
        self.at = 0
        self.depth = 0

    def next(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.next()
        if not token or (wanted and token not in wanted):
            raise _Unreadable(token)
        self.at += 1
        return token

    def formula(self) -> Formula:
        left = self.sum()
        if self.next() in _RELATIONS:
            made = Formula(left, self.take(), self.sum())
        else:
            made = Formula(left)
        if self.at < len(self.tokens):
            raise _Unreadable(self.next())
        return made

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > DEPTH:
            raise _Unreadable("nested too deeply")
        made = ("negative", self.product()) if self.next() == "-" and self.take() else self.product()
        while self.next() in ("+", "-"):
            made = (self.take(), made, self.product())
        self.depth -= 1
        return made

    def product(self) -> Tree:
        if self.next() == "+":
            self.take()
        made = self.factor()
        slashed = False
        while True:
            if self.next() == "*":
                self.take()
                made = ("*", made, self.signed())
            elif self.next() == "/":
                if slashed:
                    raise _Unreadable("1/2/2003 is a date")
                self.take()
                made = ("/", made, self.signed())
                slashed = True
            elif self.kind() == "letter" or self.next() in _FACTOR_STARTS:
                last = self.tokens[self.at - 1].text
                token = self.tokens[self.at]
                if slashed and not token.spaced:
                    raise _Unreadable("1/2x may be 1/(2x)")
                if last.isalpha() and token.text.isalpha() and last.isupper() and token.text.isupper():
                    raise _Unreadable("AB is the name of a segment")
                made = ("*", made, self.factor())
            else:
                return made

    def signed(self) -> Tree:
        return ("negative", self.factor()) if self.next() == "-" and self.take() else self.factor()

    def factor(self) -> Tree:
        """A power or a factorial; towers of powers, large exponents and large factorials are refused."""
        begin = self.at
        base = self.atom()
        whole = self.tokens[begin].text.isdigit() and self.at == begin + 1
        if self.next() == "!":
            self.take()
            if base[0] != "symbol" and not (whole and int(self.tokens[begin].text) <= FACTORIAL):
                raise _Unreadable("a large factorial, or one of an expression")
            return ("factorial", base)
        if self.next() != "^":
            return base
        if whole and self.tokens[self.at].spaced and begin and self.tokens[begin - 1].text == "/":
            raise _Unreadable("2/3 ^2 was a fraction squared")
        self.take()
        if sum(node[0] == "^" for node in nodes(base)) > 2:
            raise _Unreadable("a power of powers")
        exponent = self.group() if self.next() in ("{", "(") else self.signed_atom()
        if any(node[0] in ("^", "factorial") for node in nodes(exponent)) or self.next() in ("^", "!"):
            raise _Unreadable("a tower of powers")
        parts = [part for node in nodes(exponent) for part in node[1:]]
        if any(isinstance(part, int) and part > POWER for part in parts):
            raise _Unreadable("a large exponent")
        return ("^", base, exponent)

    def signed_atom(self) -> Tree:
        return ("negative", self.atom()) if self.next() == "-" and self.take() else self.atom()

    def group(self) -> Tree:
        close = {"(": ")", "{": "}"}[self.take("(", "{")]
        made = self.sum()
        self.take(close)
        return made

    def atom(self) -> Tree:
        kind = self.kind()
        token = self.next()
        if token in ("(", "{"):
            return self.group()
        self.take()
        if token == "|":
            made = self.sum()
            self.take("|")
            return ("abs", made)
        if kind == "number":
            return _number(token)
        if kind == "letter" or token in _GREEK:
            if self.next() == "_":
                return ("symbol", f"{token}_{self.index()}")
            return ("e",) if token == "e" else ("symbol", token)
        if token in ("pi", "infinity"):
            return (token,)
        if token == "sqrt":
            return ("sqrt", self.radicand())
        if token == "frac":
            return ("/", self.argument(), self.argument())
        if token in FUNCTIONS:
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

    def argument(self) -> Tree:
        """`{...}`, or one digit or letter: \\frac12 is 1/2."""
        if self.next() == "{":
            return self.group()
        if self.kind() == "number" and len(self.next()) > 1 and self.next().isdigit():
            digits = self.tokens[self.at].text
            self.tokens[self.at : self.at + 1] = [_Token("number", digit, False) for digit in digits]
        return self.atom()

    def radicand(self) -> Tree:
        if self.next() in ("(", "{"):
            return self.group()
        if self.kind() not in ("number", "letter"):
            raise _Unreadable("where the root ends is open")
        return self.atom()

    def function(self, name: str) -> Tree:
        base: Tree = ()
        power: Tree = ()
        if name == "log" and self.next() == "_":
            index = self.index()
            base = _number(index) if index[0] in "0123456789." else ("symbol", index)
        elif self.next() == "^":
            self.take()
            power = self.group() if self.next() in ("(", "{") else self.atom()
            if power not in (_number("2"), _number("3"), _number("4")):
                raise _Unreadable("sin^{-1} may be the inverse or a power")
        if self.next() in ("(", "{"):
            argument = self.group()
        else:  # \sin 2x: numbers, letters and π up to the next sign
            argument = self.factor()
            while self.kind() == "letter" or self.next() == "pi":
                argument = ("*", argument, self.factor())
        if name == "exp":
            made: Tree = ("^", ("e",), argument)
        else:
            made = (name, argument, base) if base else (name, argument)
        return ("^", made, power) if power else made


@functools.lru_cache(8192)
def parse(text: str) -> Formula | None:
    r"""The formula that a text is, None where it is none or has several readings.

    Reads tidied text, LaTeX or plain: `5*sqrt(3)`, `5√3`, `5\sqrt{3}`; `1 1/2` is one and a half.
    """
    if len(text) > LENGTH:
        return None
    text = text.replace("−", "-").replace("\\left", "").replace("\\right", "").replace("\\,", " ")
    text = re.sub(r"(?<![\d.])(\d{1,3}) (\d{1,3})\s?/\s?(\d{1,3})(?![\d.])", r"(\1+\2/\3) ", text)
    if any(len(word) > 3 and word not in _SIGNS for word in _WORD.findall(text)):
        return None
    try:
        return _Parser(text).formula()
    except (_Unreadable, RecursionError, ValueError):
        return None
