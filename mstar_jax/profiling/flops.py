"""FLOPs of a model's computation, and peak rates of devices: for MFU, and for plans.

FLOPs are those of matrix products and convolutions, two per multiply-add, counted from the jaxpr before
compilation. They are split by the named scopes of the models: `vision` (the tower), `projector` (from its
output to the input of the decoder) and `language`.
"""

import collections
import dataclasses
import math
from collections.abc import Callable

import jax
from jax.extend import core

from mstar_jax import sharding

PARTS = ("vision", "language", "projector")  # the scope of the projector contains that of the tower


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device, as published by its vendor.

    Attributes:
      memory: bytes of HBM that programs may use; of a GPU, 90 % (see launch/README.md).
      flops: dense bfloat16 FLOPs per second.
      bandwidth: of the memory, in bytes per second.
      network: bytes per second that it can receive from other devices.
    """

    memory: float
    flops: float
    bandwidth: float
    network: float


CHIPS = {  # by the device kind that JAX reports; cloud.google.com/tpu/docs, and the GPUs' data sheets
    "TPU v4": Chip(32e9, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16.9e9, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95e9, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32e9, 918e12, 1640e9, 448e9),
    "NVIDIA GeForce RTX 3070": Chip(7.5e9, 40.6e12, 448e9, 32e9),
    "NVIDIA GeForce RTX 3090": Chip(22.9e9, 71e12, 936e9, 32e9),
    "NVIDIA A100": Chip(76e9, 312e12, 2039e9, 300e9),
    "NVIDIA H100": Chip(76e9, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(136e9, 989e12, 4800e9, 450e9),
}


def chip_of(kind: str) -> Chip | None:
    """The peak rates of a device kind; None if unknown."""
    found = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(found, key=len)] if found else None


def count(fn: Callable, *args: object) -> dict[str, float]:
    """FLOPs of one call, by part; `other` is what is in no named scope. Arguments may be shapes.

    Loops are multiplied by their length; a loop of unknown length counts once. A kernel counts as the
    products that it replaces, and a conditional as its most expensive branch.
    """
    return _count(_products, fn, *args)


def touched(fn: Callable, *args: object) -> float:
    """Bytes that the matrix products and convolutions of one call read and write, counted as `count` does.
    The scores of attention [..., T, T] are left out: a kernel keeps them on the chip."""
    return sum(_count(_touched, fn, *args).values())


def _count(each: Callable[[core.JaxprEqn], float], fn: Callable, *args: object) -> dict[str, float]:
    out: dict[str, float] = collections.defaultdict(float)
    args = jax.tree.map(_bare, args)
    device = jax.sharding.AbstractDevice(sharding.COUNTED, None, "cpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=device)):
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    _walk(jaxpr, "", 1, out, each)
    return dict(out)


def _bare(x: object) -> object:
    """A shape without the devices that it is laid out for: those of the count are others."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct | jax.Array) else x


def _walk(
    jaxpr: core.Jaxpr,
    scope: str,
    times: int,
    out: dict[str, float],
    each: Callable[[core.JaxprEqn], float],
) -> None:
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        if flops := each(eqn):
            part = next((name for name in PARTS if name in here), "other")
            out[part] += times * flops
        often = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        branches = eqn.params.get("branches", ())
        if branches:
            tried = []
            for branch in branches:
                found: dict[str, float] = collections.defaultdict(float)
                _walk(branch.jaxpr, here, often, found, each)
                tried.append(found)
            for part, flops in max(tried, key=lambda found: sum(found.values())).items():
                out[part] += flops
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    _walk(inner.jaxpr, here, often, out, each)
                elif isinstance(inner, core.Jaxpr):
                    _walk(inner, here, often, out, each)


def _products(eqn: core.JaxprEqn) -> float:
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0.0
    left, right, *_ = (value.aval.shape for value in eqn.invars)  # type: ignore[attr-defined]
    out = eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        (summed, _), _ = numbers
        return 2.0 * math.prod(out) * math.prod(left[at] for at in summed)
    return 2.0 * math.prod(out) * (math.prod(right) // right[numbers.rhs_spec[0]])


def _touched(eqn: core.JaxprEqn) -> float:
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0.0
    arrays = [value.aval for value in (*eqn.invars, *eqn.outvars)]
    return float(
        sum(
            math.prod(x.shape) * x.dtype.itemsize  # type: ignore[attr-defined]
            for x in arrays
            if len(x.shape) < 4 or x.shape[-1] != x.shape[-2]  # type: ignore[attr-defined]
        )
    )
