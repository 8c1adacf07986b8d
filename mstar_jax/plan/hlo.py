"""The cost of a compiled program on one device, read from its HLO text with loops multiplied out.

XLA's own cost analysis counts the body of a loop only once, and the blocks of these models run in a loop.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from mstar_jax.plan import products, traffic
from mstar_jax.plan.ops import Computation, Op, Program, parse, sizes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: size of the result on one device; for a reduce-scatter, of the operand.
      group: number of devices that take part together.
      times: how often it runs.
    """

    kind: str
    bytes: int
    group: int
    times: int


@dataclasses.dataclass(frozen=True)
class Work:
    """One run of a program, on one device.

    Attributes:
      flops: of matrix products and convolutions, two per multiply-add. Fused attention counts only what the
        causal mask keeps.
      bytes: read from and written to the device's memory by operations that were not fused. What a cache
        may hold between two of them still counts.
      collectives: in the order of the text.
      unknown: names of custom calls whose FLOPs are not known and not counted.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    unknown: tuple[str, ...] = ()

    def moved(self) -> dict[str, int]:
        """Bytes that a device receives, by kind of collective."""
        out: dict[str, int] = collections.defaultdict(int)
        for c in self.collectives:
            share = (c.group - 1) / max(c.group, 1)
            ways = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(c.kind, share)
            out[c.kind] += round(c.bytes * ways * c.times)
        return dict(out)


def work(text: str, steps: int = 1) -> Work:
    """The work of a program, from the text of `compiled.as_text()`.

    Args:
      text: of the whole program.
      steps: iterations of a loop that ends when what it computes says so, such as decoding.

    Raises:
      ValueError: the text has no entry computation.
    """
    entry, program = parse(text)
    if not entry:
        raise ValueError("this is not HLO text: it has no ENTRY computation")
    flops = bytes_ = 0.0
    collectives: dict[str, Collective] = {}  # an asynchronous one appears several times in the text
    unknown: dict[str, None] = {}
    for computation, times, fused in _runs(entry, program, steps):
        ops = program[computation]
        for op in ops.values():
            own = products.flops(op, ops)
            if own is None:
                unknown[op.target] = None
            flops += times * (own or 0.0)
            kind = op.code.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", op.text)
                key = f"{kind} {channel[1]}" if channel else f"{computation} {op.name}"
                collectives.setdefault(key, Collective(kind, _payload(op, ops), _group(op.text), times))
            if not fused:
                bytes_ += times * traffic.moved(op, ops, program)
    return Work(flops, bytes_, tuple(c for c in collectives.values() if c.times), tuple(unknown))


def step_of(text: str) -> tuple[Work, Work]:
    """The work of one iteration of a program's open-ended loop, and that outside of the loop."""
    once, both = work(text, 0), work(text, 1)
    inside = tuple(c for c in both.collectives if c not in once.collectives)
    return Work(both.flops - once.flops, both.bytes - once.bytes, inside, both.unknown), once


def _runs(entry: str, program: Program, steps: int) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether it is part of a fused operation), the entry first."""
    todo = [(entry, 1, False)]
    while todo:
        name, times, fused = todo.pop()
        if name not in program:
            continue
        yield name, times, fused
        for op in program[name].values():
            apart = op.code in ("while", "conditional", "call") or op.code.startswith("async")
            often = times * _trips(op, program, steps)
            todo += [(called, often, fused or not apart) for called in op.calls]


def _trips(op: Op, computations: Program, steps: int) -> int:
    """The number of iterations of a loop; `steps` if it depends on what the loop computes."""
    if op.code != "while":
        return 1
    if m := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', op.text):
        return int(m[1])
    m = re.search(r"condition=%?([\w.\-]+)", op.text)
    inner = computations.get(m[1], {}) if m else {}
    # the condition of a counted loop only asks whether the counter, starting at 0, is below a constant
    asked = [o for o in inner.values() if o.code not in ("parameter", "get-tuple-element", "constant")]
    if len(asked) == 1 and asked[0].code == "compare" and "direction=LT" in asked[0].text:
        counter, bound = (inner.get(name) for name in asked[0].operands)
        if bound and counter and bound.code == "constant" and bound.operands[0].isdecimal():
            return -(-int(bound.operands[0]) // _step(op, counter, computations))
    return steps


def _step(op: Op, counter: Op, computations: Program) -> int:
    """What the body of a loop adds to the counter of its condition; 1 if the text does not show it."""
    place = re.search(r"index=(\d+)", counter.text)
    body = re.search(r"body=%?([\w.\-]+)", op.text)
    inner = computations.get(body[1], {}) if body else {}
    results = [o for o in inner.values() if o.code == "tuple"][-1:]  # the last is the body's own
    if not place or not results:
        return 1
    added = inner.get(results[0].operands[int(place[1])])
    names = added.operands if added and added.code == "add" else []
    steps = [inner[n].operands[0] for n in names if n in inner and inner[n].code == "constant"]
    return int(steps[0]) if steps and steps[0].isdecimal() and int(steps[0]) else 1


def _group(text: str) -> int:
    if m := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(m[2])
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", m[2]))
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(m[1].split(","))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    return 2 if pairs else 1


def _payload(op: Op, ops: Computation) -> int:
    operands = [shape for name in op.operands if name in ops for shape in ops[name].shapes]
    if op.code.startswith("reduce-scatter"):
        return sizes(operands)
    if op.code == "all-gather-start":  # the result is (operands, results)
        return max(sizes(op.shapes) - sizes(operands), 0)
    if op.code in ("all-reduce-start", "all-reduce", "all-to-all", "all-gather"):
        return sizes(op.shapes)
    return sizes(operands)
