"""The operations of a compiled program, read from its HLO text."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}
BITS |= {f"{kind}{size}": size for kind in "su" for size in (2, 4, 8, 16, 32, 64)}
BITS |= {"opaque": 0}


class Shape(NamedTuple):
    """An array's element type and dimensions, and the number of its memory: 0 is the device's, others are a
    TPU's small one close to its cores and the host's."""

    kind: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, without padding."""
        return -(-BITS.get(self.kind, 8) * self.size // 8)


@dataclasses.dataclass
class Op:
    """An operation.

    Attributes:
      name: unique in its computation.
      shapes: of the result; several for a tuple.
      code: what it does, e.g. `dot`.
      operands: names; of a parameter its number, of a constant its value.
      text: the attributes.
      root: whether it is the computation's result.
    """

    name: str
    shapes: list[Shape]
    code: str
    operands: list[str]
    text: str
    root: bool = False

    @functools.cached_property
    def calls(self) -> list[str]:
        """Names of the computations that it runs."""
        text = self.text.partition("backend_config=")[0]  # a kernel's code may hold anything
        found = re.findall(
            r"(?:calls|body|condition|to_apply|called_computations|true_computation|false_computation)"
            r"=\{?%?([\w.\-]+)",
            text,
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", text)
        return found + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call, what is called; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text) if self.code == "custom-call" else None
        return found[1] if found else ""


Computation = dict[str, Op]
Program = dict[str, Computation]

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_OP = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_MEMORY = re.compile(r"S\((\d+)\)")


def sizes(shapes: Iterable[Shape]) -> int:
    """Bytes in all memories."""
    return sum(shape.bytes for shape in shapes)


def held(shapes: Iterable[Shape]) -> int:
    """Bytes in the device's memory."""
    return sizes(shape for shape in shapes if not shape.memory)


def _shapes(text: str) -> list[Shape]:
    def one(kind: str, dims: str, layout: str) -> Shape:
        memory = _MEMORY.search(layout)
        numbers = tuple(map(int, dims.split(","))) if dims else ()
        return Shape(kind, numbers, int(memory[1]) if memory else 0)

    return [one(*found) for found in _SHAPE.findall(text)]


def _operands_and_attributes(rest: str) -> tuple[str, str]:
    """(operands, attributes) from the text after the opening bracket."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return rest[:at], rest[at + 1 :]
    return rest, ""


def parse(text: str) -> tuple[str, Program]:
    """(name of the entry computation, the operations of every computation by name)."""
    entry = ""
    current = ""
    found: Program = {}
    last = None
    for line in text.splitlines():
        if m := _COMPUTATION.match(line):
            current = m[2]
            last = None
            entry = current if m[1] else entry
            found[current] = {}
        elif current and (m := _OP.match(line)):
            operands, attributes = _operands_and_attributes(m[5])
            names = re.findall(r"%([\w.\-]+)", operands)
            if m[4] in ("parameter", "constant"):  # what is in brackets is a number, a value
                names = [operands]
            found[current][m[2]] = last = Op(m[2], _shapes(m[3]), m[4], names, attributes, bool(m[1]))
        elif last and last.code == "custom-call":  # the attributes of a kernel may span several lines
            last.text += line
    return entry, found
