"""What a model's computation costs and what the machine could do: for MFU, and for plans.

FLOPs are those of matrix products and convolutions, two a multiply-add, counted from the traced function
before any compiler has seen it. They fall apart by the names that the models give their parts: `vision` (the
tower), `projector` (from its output to the decoder's input) and `language`.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from mstar_jax import sharding

PARTS = ("vision", "language", "projector")  # the projector's scope holds the tower's


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do; vendors' figures.

    Attributes:
      memory: bytes of HBM that programs may use.
      flops: dense bfloat16 a second.
      bandwidth: of the memory, bytes a second.
      network: bytes a second that it can receive from the others.
    """

    memory: float
    flops: float
    bandwidth: float
    network: float


CHIPS = {  # by the device kind that JAX reports; cloud.google.com/tpu/docs, and the GPUs' data sheets
    "TPU v4": Chip(32e9, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16e9, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95e9, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32e9, 918e12, 1640e9, 448e9),
    "NVIDIA A100": Chip(80e9, 312e12, 2039e9, 300e9),
    "NVIDIA H100": Chip(80e9, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4800e9, 450e9),
}


def chip_of(kind: str) -> Chip | None:
    """The figures of a device kind, None where they are not known."""
    found = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(found, key=len)] if found else None


def count(fn: Callable[..., Any], *args: Any) -> dict[str, float]:
    """FLOPs of one call, by part; `other` for what has no name. Arguments may be shapes.

    Loops count as often as they run; one that depends on what it computes counts once. A kernel counts as the
    products that it stands for. Of a choice the most expensive way counts.
    """
    out: dict[str, float] = collections.defaultdict(float)
    device = jax.sharding.AbstractDevice(sharding.COUNTED, None, "cpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=device)):
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    _walk(jaxpr, "", 1, out)
    return dict(out)


def _walk(jaxpr: Any, scope: str, times: int, out: dict[str, float]) -> None:
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        if flops := _products(eqn):
            part = next((name for name in PARTS if name in here), "other")
            out[part] += times * flops
        often = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        branches = eqn.params.get("branches", ())  # of a choice, the most expensive
        if branches:
            tried = []
            for branch in branches:
                found: dict[str, float] = collections.defaultdict(float)
                _walk(branch.jaxpr, here, often, found)
                tried.append(found)
            for part, flops in max(tried, key=lambda found: sum(found.values())).items():
                out[part] += flops
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    _walk(inner.jaxpr, here, often, out)
                elif isinstance(inner, core.Jaxpr):
                    _walk(inner, here, often, out)


def _products(eqn: Any) -> float:
    if eqn.primitive.name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[at] for at in summed)
    if eqn.primitive.name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        each = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * each
    return 0.0
