"""Attention of decoding on NVIDIA's GPUs: a new token per branch, over its own suffix and the prefix.

Two Pallas kernels for Triton. Each reads its keys and values once and writes, in float32, the weighted sum of
values with its greatest score and its sum of weights; the two are then normalised together:

    own      a program per row, branch and group; columns that a branch does not see are not read, and nothing
             of a branch that has ended
    shared   a program per row, group, span of columns and block of branches, for the queries of these at once

Tiles are powers of two: what is past the end of an array is masked. The alphabet is that of models/layers.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX has announced that it will go; the einsums of models/attention.py stay
    triton = None  # type: ignore[assignment]

from mstar_jax.structs import Cached, Int8

COLUMNS = 64  # that a program reads at once: of keys [N, P] in bfloat16 these are whole lines of 128 bytes
PROGRAMS = 512  # about as many as an H100 (132 multiprocessors) holds at once; fewer leave it idle
SPAN = 4 * COLUMNS  # of columns, at least: a span's results in float32 are to be less than its keys
QUERIES, WIDTH = 128, 128  # the most that registers hold
NEVER = -1e30  # a score that weighs nothing
State = tuple[jax.Array, jax.Array, jax.Array]  # weighted sum of values, greatest score, sum of weights
Index = tuple[pl.Slice | slice, pl.Slice | slice]
Ref = Any  # of Pallas; its types are private


def takes(kind: str, q: jax.Array, cached: Sequence[object]) -> bool:
    """Whether a kind of device has a kernel for q [B, K, G, H/G, N] and a cache's keys and values."""
    heads, width = q.shape[-2:]
    dtypes = {
        x.dtype for x in jax.tree.leaves(cached, is_leaf=lambda x: isinstance(x, Int8)) if hasattr(x, "dtype")
    }
    known = q.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) and dtypes <= {q.dtype}
    return triton is not None and kind.startswith("NVIDIA") and known and heads <= QUERIES and width <= WIDTH


def attend(
    q: jax.Array,
    suffix: Sequence[tuple[Cached, Cached]],
    own_visible: Sequence[jax.Array],
    prefix: tuple[Cached, Cached],
    visible: jax.Array,
    live: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Attention over both (see `attention.branch_attention`). `interpret` runs the kernels without a GPU.

    Args:
      q: [B, K, G, H/G, N], scaled.
      suffix: chunks of keys and values [B, K, G, C, N], the new token's among them.
      own_visible: of each chunk bool[B, K, C].
      prefix: keys [B, G, N, P] and values [B, G, P, N].
      visible: bool[B, K or 1, P].
      live: bool[B, K]; results of other branches mean nothing.

    Returns:
      float32[B, K, G, H/G, N].
    """
    out, top, total = own(q, suffix, own_visible, live, interpret)
    others, tops, totals = shared(q, prefix, visible, interpret)  # [S, ...]
    most = jnp.maximum(top, tops.max(0))
    part, parts = jnp.exp(top - most), jnp.exp(tops - most)
    return (out * part + (others * parts).sum(0)) / (total * part + (totals * parts).sum(0))


def _tile(size: int) -> int:
    return max(16, pl.next_power_of_2(size))  # a product's sides are 16 or more


def _queries(branches: int, heads: int) -> tuple[int, int]:
    """The sides of a tile with the queries of a row's branches, or of a block of them."""
    heads = pl.next_power_of_2(heads)
    return min(max(pl.next_power_of_2(branches), 16 // heads), QUERIES // heads), heads


def _load(ref: Ref, mask: jax.Array) -> jax.Array:
    return triton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _tensors(
    cached: Ref | Int8, at: Index, columns: pl.Slice, mask: jax.Array, seen: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | float]:
    """A tile of keys or values, and the scale of its columns or 1."""
    if not isinstance(cached, Int8):
        return _load(cached.at[at], mask).astype(dtype), 1.0
    return _load(cached.values.at[at], mask).astype(dtype), _load(cached.scale.at[columns], seen)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision)


def _renewed(state: State, scores: jax.Array, mix: Callable[[jax.Array], jax.Array]) -> State:
    """The online softmax (arXiv 1805.02867): out [..., N], top and total [..., 1] with further scores."""
    out, top, total = state
    most = jnp.maximum(top, scores.max(-1, keepdims=True))
    fade, weights = jnp.exp(top - most), jnp.exp(scores - most)
    return out * fade + mix(weights), most, total * fade + weights.sum(-1, keepdims=True)


def _start(rows: tuple[int, ...], width: int) -> State:
    once = (*rows, 1)
    return (
        jnp.zeros((*rows, width), jnp.float32),
        jnp.full(once, NEVER, jnp.float32),
        jnp.zeros(once, jnp.float32),
    )


def _finish(refs: Sequence[Ref], state: State, inside: Sequence[int]) -> None:
    """Writes out, top and total of a tile to arrays of which `inside` is there, [..., N]."""
    for ref, x, size in zip(refs, state, (inside[-1], 1, 1)):
        triton.store(ref, x.reshape(ref.shape), mask=_within(ref.shape, (*inside[:-1], size)))


def _within(tile: Sequence[int], inside: Sequence[int]) -> jax.Array:
    """bool[*tile]; what of a tile is there."""
    masks = []
    for axis, size in enumerate(inside):
        mask = jnp.arange(tile[axis]) < size
        masks.append(jax.lax.broadcast_in_dim(mask, tile, (axis,)))
    return functools.reduce(jnp.logical_and, masks)


def _own_kernel(q, suffix, own_visible, live, *refs, heads, width, sizes):
    """q [H/G, N], for one head [N]; of every chunk keys and values [C, N] and seen int8[C]; live int8[1]."""
    live = triton.load(live) != 0
    inside = jnp.arange(q.shape[-1]) < width
    there = (heads, width)[-len(q.shape) :]
    query = _load(q, _within(q.shape, there))
    if heads == 1:
        query = query.astype(jnp.float32)
    dtype, state = query.dtype, _start(q.shape[:-1], q.shape[-1])
    for (k, v), visible, size in zip(suffix, own_visible, sizes):
        block = min(COLUMNS, _tile(size))

        def visit(i, state, k=k, v=v, visible=visible, size=size, block=block):
            columns = pl.ds(i * block, block)
            seen = _load(visible.at[columns], (i * block + jnp.arange(block) < size) & live) != 0
            mask = seen[:, None] & inside[None]
            key, scale_k = _tensors(k, (columns, slice(None)), columns, mask, seen, dtype)
            value, scale_v = _tensors(v, (columns, slice(None)), columns, mask, seen, dtype)
            if heads == 1:  # a product would be one row of 16
                scores = (key * query[None]).sum(1) * scale_k
                return _renewed(
                    state, jnp.where(seen, scores, NEVER), lambda w: ((w * scale_v)[:, None] * value).sum(0)
                )
            scores = jnp.where(seen[None], _dot(query, key.T) * scale_k, NEVER)
            return _renewed(state, scores, lambda w: _dot((w * scale_v).astype(dtype), value))

        state = jax.lax.fori_loop(0, pl.cdiv(size, block), visit, state)
    _finish(refs, state, there)


def own(
    q: jax.Array,
    suffix: Sequence[tuple[Cached, Cached]],
    own_visible: Sequence[jax.Array],
    live: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the branches' own suffixes (see `attend`): mixed values float32[B, K, G, H/G, N], greatest score and
    sum of weights float32[B, K, G, H/G, 1]."""
    rows, branches, groups, heads, width = q.shape
    tile = pl.next_power_of_2(max(16, width))
    sizes = [seen.shape[2] for seen in own_visible]
    lengths = [-(-size // min(COLUMNS, _tile(size))) * min(COLUMNS, _tile(size)) for size in sizes]

    def spec(*block):
        return pl.BlockSpec((None, None, None, *block), lambda b, k, g: (b, k, g, *[0] * len(block)))

    def cached(x, length):
        return Int8(spec(length, tile), spec(length)) if isinstance(x, Int8) else spec(length, tile)

    head = None if heads == 1 else _tile(heads)
    shapes = [jax.ShapeDtypeStruct((*q.shape[:-1], size), jnp.float32) for size in (width, 1, 1)]
    return pl.pallas_call(
        functools.partial(_own_kernel, heads=heads, width=width, sizes=sizes),
        grid=(rows, branches, groups),
        in_specs=[
            spec(head, tile),
            [tuple(cached(x, length) for x in chunk) for chunk, length in zip(suffix, lengths)],
            [pl.BlockSpec((None, None, length), lambda b, k, g: (b, k, 0)) for length in lengths],
            pl.BlockSpec((None, 1), lambda b, k, g: (b, k)),
        ],
        out_specs=[spec(head, tile), spec(head, 1), spec(head, 1)],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_own",
    )(q, list(map(tuple, suffix)), [seen.astype(jnp.int8) for seen in own_visible], live.astype(jnp.int8))


def _shared_kernel(q, k, v, visible, *refs, inside, length, span):
    """q [K, H/G, N] of a block of branches; keys [N, P], values [P, N] and seen int8[1 or K, P] of a span."""
    branches, heads, width = q.shape
    queries = branches * heads
    inside = inside[0] - pl.program_id(3) * branches, *inside[1:]
    query = _load(q, _within(q.shape, inside)).reshape(queries, width)
    first, there = pl.program_id(2) * span, jnp.arange(width) < inside[-1]

    def visit(i, state):
        columns = pl.ds(i * COLUMNS, COLUMNS)
        real = first + i * COLUMNS + jnp.arange(COLUMNS) < length
        mask = there[:, None] & real[None]
        key, scale_k = _tensors(k, (slice(None), columns), columns, mask, real, q.dtype)
        mask = real[:, None] & there[None]
        value, scale_v = _tensors(v, (columns, slice(None)), columns, mask, real, q.dtype)
        mask = jnp.broadcast_to(real[None], (visible.shape[0], COLUMNS))
        if len(mask) > 1:
            mask &= (jnp.arange(branches) < inside[0])[:, None]
        seen = _load(visible.at[:, columns], mask)
        if len(mask) > 1:
            seen = jnp.broadcast_to(seen[:, None], (branches, heads, COLUMNS)).reshape(queries, COLUMNS)
        scores = jnp.where(seen != 0, _dot(query, key) * scale_k, NEVER)
        return _renewed(state, scores, lambda w: _dot((w * scale_v).astype(q.dtype), value))

    _finish(refs, jax.lax.fori_loop(0, span // COLUMNS, visit, _start((queries,), width)), inside)


def shared(
    q: jax.Array, prefix: tuple[Cached, Cached], visible: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the prefix (see `attend`), by spans of columns: as `own`, with [S, ...] in front."""
    rows, branches, groups, heads, width = q.shape
    (across, each), tile, length = _queries(branches, heads), _tile(width), visible.shape[-1]
    blocks = pl.cdiv(length, COLUMNS)
    span = COLUMNS * pl.cdiv(blocks, min(blocks, pl.cdiv(PROGRAMS, rows * groups)))
    span = max(span, SPAN)
    spans = pl.cdiv(length, span)

    def cached(x, values, at):
        values = pl.BlockSpec((None, None, *values), lambda b, g, s, k: (b, g, *at(s)))
        scale = pl.BlockSpec((None, None, span), lambda b, g, s, k: (b, g, s))
        return Int8(values, scale) if isinstance(x, Int8) else values

    def out(size):
        block = (None, None, across, None, each, size)
        return pl.BlockSpec(block, lambda b, g, s, k: (s, b, k, g, 0, 0))

    each_sees = visible.shape[1] > 1
    seen = (None, across if each_sees else 1, span)
    params = triton.CompilerParams(
        num_warps=4 if across * each < 64 else 8,
        num_stages=1 if q.dtype == jnp.float32 else 2,  # else float32 would not fit shared memory
    )
    return pl.pallas_call(
        functools.partial(_shared_kernel, inside=(branches, heads, width), length=length, span=span),
        grid=(rows, groups, spans, pl.cdiv(branches, across)),
        in_specs=[
            pl.BlockSpec((None, across, None, each, tile), lambda b, g, s, k: (b, k, g, 0, 0)),
            cached(prefix[0], (tile, span), lambda s: (0, s)),
            cached(prefix[1], (span, tile), lambda s: (s, 0)),
            pl.BlockSpec(seen, lambda b, g, s, k: (b, k * each_sees, s)),
        ],
        out_specs=[out(tile), out(1), out(1)],
        out_shape=[jax.ShapeDtypeStruct((spans, *q.shape[:-1], size), jnp.float32) for size in (width, 1, 1)],
        compiler_params=params,
        interpret=interpret,
        name="decode_shared",
    )(q, *prefix, visible.astype(jnp.int8))
