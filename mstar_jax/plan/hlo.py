"""The cost of a compiled program on one device, read from its HLO text with loops multiplied out.

XLA's own cost analysis counts the body of a loop only once, and the blocks of these models run in a loop.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}
BITS |= {f"{kind}{size}": size for kind in "su" for size in (2, 4, 8, 16, 32, 64)}
BITS |= {"opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move no data: they name or group values, or their work is counted in what they call.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "domain", "iota"}

Shape = tuple[str, tuple[int, ...]]  # element type, dimensions


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
      bytes: read and written by operations that were not fused: an estimate of the memory traffic.
      collectives: in the order of the text.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]

    def moved(self) -> dict[str, int]:
        """Bytes that a device receives, by kind of collective."""
        out: dict[str, int] = collections.defaultdict(int)
        for c in self.collectives:
            share = (c.group - 1) / max(c.group, 1)
            ways = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(c.kind, share)
            out[c.kind] += round(c.bytes * ways * c.times)
        return dict(out)


@dataclasses.dataclass
class _Op:
    name: str
    shapes: list[Shape]  # of the result; several for a tuple
    code: str
    operands: list[str]
    text: str  # attributes

    def calls(self) -> list[str]:
        found = re.findall(
            r"(?:calls|body|condition|to_apply|called_computations)=\{?%?([\w.\-]+)", self.text
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        return found + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")


def _shapes(text: str) -> list[Shape]:
    return [(kind, tuple(map(int, dims.split(","))) if dims else ()) for kind, dims in _SHAPE.findall(text)]


def _bytes(shapes: Sequence[Shape]) -> int:
    return sum(-(-BITS.get(kind, 8) * math.prod(dims) // 8) for kind, dims in shapes)


def _operands_and_attributes(rest: str) -> tuple[str, str]:
    """(operands, attributes) from the text after the opening bracket."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return rest[:at], rest[at + 1 :]
    return rest, ""


def parse(text: str) -> tuple[str, dict[str, dict[str, _Op]]]:
    """(name of the entry computation, the operations of every computation by name)."""
    entry = ""
    current = ""
    found: dict[str, dict[str, _Op]] = {}
    last = None
    for line in text.splitlines():
        if m := _COMPUTATION.match(line):
            current = m[2]
            last = None
            entry = current if m[1] else entry
            found[current] = {}
        elif current and (m := _OP.match(line)):
            operands, attributes = _operands_and_attributes(m[4])
            names = re.findall(r"%([\w.\-]+)", operands)
            if m[3] in ("parameter", "constant"):  # what is in brackets is a number, a value
                names = [operands]
            found[current][m[1]] = last = _Op(m[1], _shapes(m[2]), m[3], names, attributes)
        elif last and last.code == "custom-call":  # the attributes of a kernel may span several lines
            last.text += line
    return entry, found


def work(text: str) -> Work:
    """The work of a program, from the text of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    entry, computations = parse(text)
    if not entry:
        raise ValueError("this is not HLO text: it has no ENTRY computation")
    flops = bytes_ = 0.0
    collectives: dict[str, Collective] = {}  # an asynchronous one appears several times in the text
    for computation, times, inside in _runs(entry, computations):
        ops = computations[computation]
        for op in ops.values():
            flops += times * _flops(op, ops)
            kind = op.code.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", op.text)
                key = f"{kind} {channel[1]}" if channel else f"{computation} {op.name}"
                collectives.setdefault(key, Collective(kind, _payload(op, ops), _group(op.text), times))
            if not inside and op.code not in FREE and not op.code.endswith("-done"):
                bytes_ += times * _bytes_moved(op, ops, computations)
    return Work(flops, bytes_, tuple(collectives.values()))


def _runs(entry: str, computations: dict[str, dict[str, _Op]]) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether it is part of a fused operation), the entry first."""
    todo = [(entry, 1, False)]
    while todo:
        name, times, inside = todo.pop()
        if name not in computations:
            continue
        yield name, times, inside
        for op in computations[name].values():
            apart = op.code in ("while", "conditional", "call") or op.code.startswith("async")
            for called in op.calls():
                todo.append((called, times * _trips(op, computations), inside or not apart))


def _trips(op: _Op, computations: dict[str, dict[str, _Op]]) -> int:
    """The number of iterations of a loop; 1 if it depends on what the loop computes."""
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
    return 1


def _step(op: _Op, counter: _Op, computations: dict[str, dict[str, _Op]]) -> int:
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


# The kernels of splash attention (see models/attention.py) and the number of matrix products in each.
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _flops(op: _Op, ops: dict[str, _Op]) -> float:
    if '"tpu_custom_call"' in op.text and (m := re.search("|".join(KERNELS), op.text)):
        # blocks of the mask [1, T / size, T / size], q [H, T, N], k [G, T, N]
        blocks, q, k = (ops[op.operands[at]].shapes[0][1] for at in (0, 3, 4))
        return KERNELS[m[0]] * 2.0 * math.prod(q) * k[1] * (blocks[-1] + 1) / (2 * blocks[-1])
    if op.code not in ("dot", "convolution") or any(name not in ops for name in op.operands[:2]):
        return 0.0
    left, right = (ops[name].shapes[0][1] for name in op.operands[:2])
    out = op.shapes[0][1]
    if op.code == "dot":
        m = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)
        summed = [left[int(at)] for at in m[1].split(",") if at] if m else []
        return 2.0 * math.prod(out) * math.prod(summed)
    return _convolution(op.text, left, right, out)


def _convolution(text: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    """FLOPs on actual inputs, not on padding: TPU programs write batched products as convolutions."""
    m = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if not m:
        return 0.0
    labels = m[1], m[2], m[3]
    window = re.search(r"window=\{([^}]*)\}", text)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    places = sorted(set(labels[2]) - set("bf"))
    valid = 1
    for at, place in enumerate(places):
        size = left[labels[0].index(place)], right[labels[1].index(place)], out[labels[2].index(place)]
        valid *= _pairs(*size, *(_each(given, key, at, default) for key, default in _WINDOW))
    features = right[labels[1].index("i")] * out[labels[2].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", text)
    return 2.0 * valid * features * out[labels[2].index("b")] / (int(groups[1]) if groups else 1)


_WINDOW = (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))


def _each(given: dict[str, str], key: str, at: int, default: str) -> int:
    """The value for a spatial dimension; for padding, the lower one."""
    values = given[key].split("x") if key in given else []
    return int((values[at] if at < len(values) else default).split("_")[0])


def _pairs(size: int, kernel: int, out: int, stride: int, pad: int, base: int, dilation: int) -> int:
    """Number of (output place, kernel place) pairs that meet an actual input."""
    long = (size - 1) * base + 1
    total = 0
    for k in range(kernel):
        first = k * dilation - pad
        places = range(first, first + stride * out, stride)
        total += sum(0 <= at < long and at % base == 0 for at in places)
    return total


def _group(text: str) -> int:
    if m := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(m[2])
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", m[2]))
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(m[1].split(","))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    return 2 if pairs else 1


def _payload(op: _Op, ops: dict[str, _Op]) -> int:
    operands = [shape for name in op.operands if name in ops for shape in ops[name].shapes]
    if op.code.startswith("reduce-scatter"):
        return _bytes(operands)
    if op.code == "all-gather-start":  # the result is (operands, results)
        return max(_bytes(op.shapes) - _bytes(operands), 0)
    if op.code in ("all-reduce-start", "all-reduce", "all-to-all", "all-gather"):
        return _bytes(op.shapes)
    return _bytes(operands)


def _bytes_moved(op: _Op, ops: dict[str, _Op], computations: dict[str, dict[str, _Op]]) -> float:
    """Bytes of operands and result; for slices and updates only the part that is read or written."""
    if op.code in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _bytes(op.shapes)
    if op.code == "dynamic-update-slice" and len(op.operands) > 1 and op.operands[1] in ops:
        return 2.0 * _bytes(ops[op.operands[1]].shapes)
    inner = computations.get(next(iter(op.calls()), ""), {}) if op.code == "fusion" else {}
    parameters = {int(o.operands[0]): o.name for o in inner.values() if o.code == "parameter"}
    total = float(_bytes_written(op, inner))
    for at, name in enumerate(op.operands):
        if name in ops:
            total += _bytes_read(parameters[at], inner) if at in parameters else _bytes(ops[name].shapes)
    return total


def _bytes_read(name: str, inner: dict[str, _Op]) -> float:
    """Bytes that a fusion reads of a parameter."""
    users = [op for op in inner.values() if name in op.operands and op.code != "parameter"]
    if users and all(op.code in ("dynamic-slice", "slice") and op.operands[0] == name for op in users):
        return float(sum(_bytes(op.shapes) for op in users))
    if users and all(op.code == "bitcast" for op in users):  # a view
        return min(float(_bytes(inner[name].shapes)), sum(_bytes_read(op.name, inner) for op in users))
    if users and all(op.code == "dynamic-update-slice" and op.operands[0] == name for op in users):
        return 0.0
    return float(_bytes(inner[name].shapes))


def _bytes_written(op: _Op, inner: dict[str, _Op]) -> int:
    updates = [o for o in inner.values() if o.code == "dynamic-update-slice"]
    if updates and any(o.shapes == op.shapes for o in updates):  # in place
        return sum(_bytes(inner[o.operands[1]].shapes) for o in updates if o.operands[1] in inner)
    return _bytes(op.shapes)
