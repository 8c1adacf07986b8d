"""Runs programs on the local devices, with random weights and tokens, for their actual times."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import sharding
from mstar_jax.plan.programs import Program
from mstar_jax.plan.whole import Speed

REPEATS = 3


def filled(tree: Any, key: int = 0) -> Any:
    """Arrays in the place of shapes: small random numbers, and zeros for integers."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    for at, array in zip(places, _maker(tuple(leaves[at] for at in places))(key)):
        leaves[at] = array
    return jax.tree.unflatten(treedef, leaves)


@functools.cache
def _maker(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[[int], list[jax.Array]]:
    """One program for all arrays: to compile one for each would take longer than to run it."""

    def one(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return key
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    def make(key: int) -> list[jax.Array]:
        return [one(x, jax.random.key(key)) for x in shapes]

    return jax.jit(make, out_shardings=[x.sharding for x in shapes])


def speeds(programs: Sequence[Program], mesh: jax.sharding.Mesh) -> list[Speed]:
    """Seconds of the programs of a kind: of a call, of decoding of a step; compilation does not count."""
    prefill = programs[0]
    seconds = (_step(prefill, each, mesh) if "decoding" in each.title else _call(each) for each in programs)
    return [Speed(each, 0.0) for each in seconds]


def _call(program: Program) -> float:
    found = []
    for _ in range(REPEATS + 1):
        args = jax.block_until_ready(filled(program.args))  # anew: some are donated
        start = time.perf_counter()
        jax.block_until_ready(program.call(*args))
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def _step(prefill: Program, decode: Program, mesh: jax.sharding.Mesh) -> float:
    """Seconds of a step of decoding, from filled slots until the first chunk of the cache is full."""
    shards = sharding.batch_shards(mesh)
    free = np.int32(decode.rows // shards)
    model, slots, key, entry = filled(prefill.args)
    rows = np.arange(decode.rows, dtype=np.int32) % free % (prefill.rows // shards)
    limits = np.full(entry.limits.shape, slots.out.tokens.shape[-1], np.int32)
    entry = entry._replace(
        source=jax.device_put(rows, entry.source.sharding),
        limits=jax.device_put(limits, entry.limits.sharding),
    )
    temperatures = np.ones(decode.args[2].shape, np.float32)
    found = []
    for _ in range(REPEATS + 1):
        slots = prefill.call(model, slots, key, entry)
        slots = slots._replace(cache=slots.cache._replace(clock=jnp.zeros_like(slots.cache.clock)))
        jax.block_until_ready(slots)
        start = time.perf_counter()
        slots = jax.block_until_ready(decode.call(model, slots, temperatures, free))
        found.append((time.perf_counter() - start) / max(int(slots.cache.clock), 1))
    return statistics.median(found[1:])
