"""FLOPs of an operation: matrix products, convolutions, and the libraries and kernels that compute them."""

import json
import math
import re
from collections.abc import Sequence

from mstar_jax.plan.ops import Computation, Op

# Kernels by a part of their name, with the number of matrix products in each. Splash attention's (TPU) count
# what is below the diagonal; decoding's (NVIDIA) are told apart by what a group's queries share.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
DECODING = ("decode_own", "decode_shared")
# cuDNN's attention: its backward pass recomputes the scores
CUDNN = {"fmha": 2, "fmhaBackward": 5}
# custom calls without products
NONE: tuple[str, ...] = (
    "AllocateBuffer",
    "Sharding",
    "SPMD",
    "TopK",
    "topk",
    "cub",
    "x64",
    "Assume",
    "annotate",
    "Move",
)
NONE += ("Pin", "Bitcast", "Bitpacked", "AsyncCollective")


def flops(op: Op, ops: Computation) -> float | None:
    """FLOPs on one device, two per multiply-add; None for a custom call that is not known."""
    if op.code == "custom-call":
        return _called(op, ops)
    if op.code not in ("dot", "convolution") or any(name not in ops for name in op.operands[:2]):
        return 0.0
    left, right = (ops[name].shapes[0].dims for name in op.operands[:2])
    out = op.shapes[0].dims
    if op.code == "dot":
        m = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text)
        return _product(left, out, m[1].split(",") if m else [])
    return _convolution(op.text, left, right, out)


def _product(left: Sequence[int], out: Sequence[int], summed: Sequence[str]) -> float:
    return 2.0 * math.prod(out) * math.prod(left[int(at)] for at in summed if at)


def _called(op: Op, ops: Computation) -> float | None:
    shapes = [ops[name].shapes[0].dims for name in op.operands if name in ops]
    name = re.search(r'op_name="([^"]*)"', op.text)
    known = f"{name[1] if name else ''} {op.text if op.target == 'tpu_custom_call' else ''}"
    if op.target == "tpu_custom_call" and (m := re.search("|".join(SPLASH), known)):
        # blocks of the mask [1, T / size, T / size], q [H, T, N], k [G, T, N]
        blocks, q, k = (shapes[at] for at in (0, 3, 4))
        return SPLASH[m[0]] * 2.0 * math.prod(q) * k[1] * (blocks[-1] + 1) / (2 * blocks[-1])
    if op.target.startswith("__cublas$"):
        m = re.search(r'"lhs_contracting_dimensions":\s*(\[[^\]]*\])', op.text)
        return _product(shapes[0], op.shapes[0].dims, json.loads(m[1])) if m else None
    if op.target.startswith("__cudnn$fmha"):
        m = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*(\[[^\]]*\])', op.text)
        mask = re.search(r'"mask_type":\s*"(\w+)"', op.text)
        if m is None:
            return None
        rows, heads, *square = map(int, json.loads(m[1]))
        width = math.prod(shapes[0]) // (rows * heads * square[0])  # of q [B, T, H, N]
        seen = (square[1] + 1) / (2 * square[1]) if mask and "CAUSAL" in mask[1] else 1.0
        products = CUDNN["fmhaBackward" if op.target.endswith("Backward") else "fmha"]
        return products * 2.0 * rows * heads * math.prod(square) * width * seen
    if m := re.search("|".join(DECODING), known):
        # own: q [B, K, G, H/G, N] meets the K branches' own keys and values [B, K, G, C, N];
        # shared: all of a row's queries meet its keys [B, G, N, P] and values [B, G, P, N]
        queries, rank = (shapes[0][3], 5) if m[0] == "decode_own" else (shapes[0][1] * shapes[0][3], 4)
        return 2.0 * queries * sum(math.prod(dims) for dims in shapes[1:] if len(dims) == rank)
    return 0.0 if not op.target or any(part in op.target for part in NONE) else None


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
        valid *= pairs(*size, *(_each(given, key, at, default) for key, default in _WINDOW))
    features = right[labels[1].index("i")] * out[labels[2].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", text)
    return 2.0 * valid * features * out[labels[2].index("b")] / (int(groups[1]) if groups else 1)


_WINDOW = (("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))


def _each(given: dict[str, str], key: str, at: int, default: str) -> int:
    """The value for a spatial dimension; for padding, the lower one."""
    values = given[key].split("x") if key in given else []
    return int((values[at] if at < len(values) else default).split("_")[0])


def pairs(size: int, kernel: int, out: int, stride: int, pad: int, base: int, dilation: int) -> int:
    """Number of (output place, kernel place) pairs that meet an actual input."""
    long = (size - 1) * base + 1
    total = 0
    for k in range(kernel):
        first = k * dilation - pad
        places = range(first, first + stride * out, stride)
        total += sum(0 <= at < long and at % base == 0 for at in places)
    return total
