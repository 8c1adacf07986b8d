"""The worker of symbolic.py: reads pairs of formulas, one line of JSON each, and says whether they are equal.

    python -P mstar_jax/answers/worker.py 0.8 1073741824     processor seconds a comparison, bytes of memory
    [[["symbol", "x"], "", null], [["sqrt", ["number", 4, 1]], "", null]]     -> false
    [[["symbol", "x"], "<", ["number", 3, 1]], [["number", 3, 1], ">", ["symbol", "x"]]]     -> true
    [[["tan", 1], "", null], ...]                                             -> null: it gave up

It is a script that imports nothing of the project, so that it starts fast and can be killed. A formula is
[left, sign, right] as in formulas.py; sympy never sees the text that a model wrote, only the expressions that
`build` makes from these trees. The answer is true only where sympy proves it.
"""

import json
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import TypeAlias

import sympy

ORPHAN = 20.0  # seconds after which a comparison that hangs ends the process, even if its parent is gone
POWER = 1000  # largest exponent that is built
BITS = 1 << 16  # length of the largest power of two numbers that is built

Tree: TypeAlias = list["str | int | Tree"]
OPERATIONS: dict[str, Callable[..., sympy.Expr]] = {
    "e": lambda: sympy.E,
    "pi": lambda: sympy.pi,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": lambda a, b: power(a, b),
    "negative": lambda a: -a,
    "factorial": sympy.factorial,
    "abs": sympy.Abs,
    "sqrt": sympy.sqrt,
    "ln": sympy.log,
    "log": lambda a, base=10: sympy.log(a, base),
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: getattr(sympy, name) for name in ("sinh", "cosh", "tanh")},
}


class Late(BaseException):
    """The processor time of one comparison is spent; no `except Exception` of sympy catches it."""


def late(signum: int, frame: types.FrameType | None) -> None:
    raise Late


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """base^exponent. ValueError where its value would be a number too long to work with."""
    if exponent.is_Rational and abs(exponent) > POWER:
        raise ValueError(f"exponent {exponent}")
    if base.is_Rational and exponent.is_Rational:
        bits = max(abs(int(base.p)), int(base.q)).bit_length()
        if bits * abs(exponent) > BITS:
            raise ValueError(f"a power of {bits} bits to the {exponent}")
    return base**exponent


def build(tree: Tree) -> sympy.Expr:
    """The expression. KeyError, TypeError or ValueError where there is none, or not a finite one."""
    name, *parts = tree
    if name == "number" and all(isinstance(part, int) for part in parts):
        return sympy.Rational(*parts)
    if name == "symbol" and all(isinstance(part, str) for part in parts):
        return sympy.Symbol(*parts)
    made = OPERATIONS[str(name)](*(build(part) for part in parts if isinstance(part, list)))
    if made.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise ValueError(f"{tree} is not finite")
    return made


def zero(made: sympy.Expr) -> bool:
    """Whether it is proved to be zero: a numerical value near zero does not count."""
    return bool(made == 0 or sympy.expand(made) == 0 or sympy.simplify(made) == 0 or made.equals(0) is True)


def compare(first: list, second: list) -> bool:
    """Whether two expressions differ by zero, or two relations are the same one."""
    left, sign, right = first
    other_left, other_sign, other_right = second
    if not sign or not other_sign:
        return sign == other_sign and zero(build(left) - build(other_left))
    difference, sign = normal(left, sign, right)
    other, other_sign = normal(other_left, other_sign, other_right)
    if sign != other_sign or zero(difference) or zero(other):
        return False
    ratio = sympy.simplify(difference / other)
    return bool(ratio.is_number and ratio.is_real and (sign == "=" or ratio.is_positive))


def normal(left: Tree, sign: str, right: Tree) -> tuple[sympy.Expr, str]:
    """(difference of the sides, `=`, `<` or `<=`) of a relation: how the difference compares with 0."""
    difference = build(left) - build(right)
    return (-difference, sign.replace(">", "<")) if sign[0] == ">" else (difference, sign)


def main(seconds: float, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    x, two = ["symbol", "x"], ["number", 2, 1]
    compare([["^", ["+", x, two], two], "", None], [["sqrt", two], "", None])  # first uses are slow
    for line in sys.stdin:
        answer = None
        signal.setitimer(signal.ITIMER_REAL, ORPHAN)
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = compare(*json.loads(line))
        except (Late, Exception):
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
