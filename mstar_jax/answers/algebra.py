"""The worker of symbolic.py: reads pairs of formulas, one line of JSON each, and says whether they are equal.

    python -P mstar_jax/algebra.py 0.8 1073741824      processor seconds of a comparison, bytes of memory
    [["(x)^{2}"], ["(x) \\\\cdot (x)"]]                      -> true
    [["(x)", "<", "3"], ["3", ">", "(x)"]]             -> true
    [["\\\\sqrt{(2"], ["2"]]                              -> null: it gave up

It is a script that imports nothing of the project, so that it can be killed. What it is given is LaTeX that
`symbolic.latex` wrote; latex2sympy2_extended (math-verify's parser) reads that by its grammar and evaluates
no code. A result is True only where sympy proves it.
"""

import json
import re
import resource
import signal
import sys
import types

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
ORPHAN = 20.0  # seconds after which a comparison that hangs ends the process, whoever else still lives
SYMBOL = re.compile(r"(?:[A-Za-z]|alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega)(?:_\{?\w+\}?)?")


class Late(BaseException):
    """The processor time of one comparison is spent; no `except Exception` of sympy catches it."""


def late(signum: int, frame: types.FrameType | None) -> None:
    raise Late


def read(text: str) -> sympy.Expr:
    """The expression; ValueError where it is none, or not a finite one."""
    made = latex2sympy(text, normalization_config=None, conversion_config=CONFIG).doit()
    if not isinstance(made, sympy.Expr) or made.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise ValueError(text)
    if not all(SYMBOL.fullmatch(symbol.name) for symbol in made.free_symbols):
        raise ValueError(f"{text} was read as {made}")
    return made


def zero(made: sympy.Expr) -> bool:
    """Whether it is proved to be zero: a numerical value near zero does not count."""
    return bool(made == 0 or sympy.expand(made) == 0 or sympy.simplify(made) == 0 or made.equals(0) is True)


def compare(first: list[str], second: list[str]) -> bool:
    """Of [expression]s: is their difference zero; of [left, sign, right]s: is it the same relation."""
    if len(first) != len(second):
        return False
    if len(first) == 1:
        return zero(read(first[0]) - read(second[0]))
    sides = []
    for left, sign, right in (first, second):
        difference = read(left) - read(right)
        more = sign in (">", "\\ge")
        sides.append((-difference if more else difference, {">": "<", "\\ge": "\\le"}.get(sign, sign)))
    (one, sign), (other, its_sign) = sides
    if sign != its_sign or zero(one) or zero(other):
        return False
    ratio = sympy.simplify(one / other)
    return bool(ratio.is_number and ratio.is_real and (sign == "=" or ratio.is_positive))


def main(seconds: float, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compare(["((x)+1)^{2}"], ["\\sqrt{(2)}"])  # first uses are slow: before a clock runs
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
