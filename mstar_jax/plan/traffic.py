"""Bytes that an operation reads from and writes to the device's memory.

A fusion reads of an operand what its result needs: of a stack of weights from which it slices one layer, that
layer. So the elements that are needed are followed from the result back to the operands:

    fusion(stack [32, D, F], layer, x)  =  dot(x, bitcast(dynamic-slice(stack, layer)))
    needed:  D * F     1      all                    D * F      <-  1 * D * F

A buffer that a fusion updates in place is not read, and only the update is written.
"""

from collections.abc import Sequence

from mstar_jax.plan.ops import Computation, Op, Program, Shape, held

# These move nothing: they name or group values, or what they call is counted.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "domain", "iota"}
FREE |= {"async-start", "async-update", "async-done"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written into the first
PICKS = ("slice", "dynamic-slice", "gather")
WHOLE = ("dot", "convolution", "custom-call", "sort", "reduce", "reduce-window", "fft")


def moved(op: Op, ops: Computation, program: Program) -> float:
    """Bytes that an operation that is not part of a fusion reads and writes."""
    if op.code in FREE or op.code.endswith("-done") or op.target == "AllocateBuffer":
        return 0.0
    operands = [ops[name].shapes if name in ops else [] for name in op.operands]
    if op.code in UPDATES:  # the compiler has made sure that the first operand may be overwritten
        update = held(operands[UPDATES[op.code]])
        return update + sum(map(held, operands[1:]))
    if op.code in ("slice-start", "dynamic-slice-start"):  # (the operand, what is taken of it, ...)
        taken = op.shapes[sum(map(len, operands))]
        return held([taken]) + held([taken._replace(memory=operands[0][0].memory)])
    if op.code.endswith("-start"):
        read, whole = sum(map(held, operands)), held(op.shapes)
        return whole if len(op.shapes) > sum(map(len, operands)) else read + whole  # often it names both
    needed = _needed(op, _count(op.shapes), ops, program, in_place=True)
    total = 0.0
    for need, shapes in zip(needed, operands):
        total += min(need, _count(shapes)) * _each(shapes)
    return total + _written(op, ops, program, [shape.memory for shape in op.shapes])


def _count(shapes: Sequence[Shape]) -> float:
    return float(sum(shape.size for shape in shapes))


def _each(shapes: Sequence[Shape]) -> float:
    """Mean bytes of an element."""
    count = _count(shapes)
    return held(shapes) / count if count else 0.0


def _written(op: Op, ops: Computation, program: Program, memories: Sequence[int]) -> float:
    """Bytes of the results, of which the outermost operation says in which memory they are."""
    if op.code in ("bitcast", "tuple") and all(name in ops for name in op.operands):
        total = 0.0
        for name in op.operands:
            count = len(ops[name].shapes)
            total += _written(ops[name], ops, program, memories[:count])
            memories = memories[count:]
        return total
    if op.code == "fusion" and (inner := _inner(op, program)):
        return _written(next(o for o in inner.values() if o.root), inner, program, memories)
    shapes = ops[op.operands[UPDATES[op.code]]].shapes if _updates_in_place(op, ops) else op.shapes
    if op.target.startswith("__cu") and len(shapes) > 1 and shapes[-1].kind in ("s8", "u8"):
        shapes = shapes[:-1]  # the rest is room that the library works in
    return float(held(shape._replace(memory=memory) for shape, memory in zip(shapes, memories)))


def _inner(op: Op, program: Program) -> Computation:
    inner = program.get(op.calls[0], {}) if op.calls else {}
    return inner if any(o.root for o in inner.values()) else {}


def _updates_in_place(op: Op, ops: Computation) -> bool:
    """Whether a fused operation updates a value from outside; one that is made inside is written whole."""
    if op.code not in UPDATES or len(op.operands) <= UPDATES[op.code]:
        return False
    into = ops.get(op.operands[0])
    while into is not None and into.code == "bitcast":
        into = ops.get(into.operands[0])
    return into is not None and into.code == "parameter" and op.operands[UPDATES[op.code]] in ops


def _needed(op: Op, wanted: float, ops: Computation, program: Program, in_place: bool) -> list[float]:
    """Elements of each operand that are needed for `wanted` elements of the result; may be more than it has.

    Args:
      op: the operation.
      wanted: elements of its result.
      ops, program: its computation, and all of them.
      in_place: whether the result is what the outermost operation writes.
    """
    counts = [_count(ops[name].shapes) if name in ops else 0.0 for name in op.operands]
    if op.code == "fusion" and (inner := _inner(op, program)):
        found = _of_computation(inner, wanted, program, in_place)
        return [found.get(at, counts[at]) for at in range(len(counts))]
    if op.code in UPDATES and counts:
        rest = [min(wanted, count) for count in counts[1:]]
        return [0.0 if in_place and _updates_in_place(op, ops) else wanted, *rest]
    if op.code in PICKS and counts:
        return [wanted, *counts[1:]]
    if op.code in WHOLE:
        return counts
    return [wanted] * len(counts)


def _of_computation(ops: Computation, wanted: float, program: Program, in_place: bool) -> dict[int, float]:
    """Elements that a fusion needs of its operands, by number."""
    needs = dict.fromkeys(ops, 0.0)
    outermost = {name for name, op in ops.items() if op.root}
    found = {}
    for name, op in reversed(ops.items()):  # users come after what they use
        if op.root:
            needs[name] = wanted
        needs[name] = min(needs[name], _count(op.shapes))
        outer = name in outermost
        if outer and op.code in ("bitcast", "tuple"):
            outermost |= set(op.operands)
        if op.code == "parameter":
            found[int(op.operands[0])] = needs[name]
            continue
        each = _needed(op, needs[name], ops, program, in_place and outer)
        if op.code == "tuple":
            each = [_count(ops[other].shapes) for other in op.operands]
        for other, need in zip(op.operands, each):
            if other in needs:
                needs[other] += need
    return found
