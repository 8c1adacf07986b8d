"""Layers that the families share: norms, LongRoPE, the shared-prefix row, the scanned decoder.

Shapes are said with one alphabet:
  B rows (queries)   T row tokens    P prefix tokens   K branches   R response tokens
  D model width      H query heads   G key/value heads N head width F MLP width   L layers   V vocabulary
Block parameters carry a leading `layers` dimension and are scanned.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mstar_jax import sharding
from mstar_jax.models import attention
from mstar_jax.structs import Int8, KVCache, ring


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a Llama-like decoder (Phi-3 adds LongRoPE factors).

    `short_factor`/`long_factor` have head_dim / 2 entries; None means plain RoPE. `unroll` blocks are
    compiled side by side in the scan: more code, faster on a CPU.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    max_position: int = 4096
    original_max_position: int = 4096
    tie_word_embeddings: bool = False
    unroll: int = 1


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A parameter with its shape, its logical axes and its initialisation, on one line."""
    if std == 0.0 or std == 1.0:  # biases and norm weights
        return nnx.Param(jnp.full(shape, std, jnp.float32), axes=axes)
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * std, axes=axes)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises in float32 and multiplies by the weight after the cast back, as Phi-3 and Llama do."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with its statistics in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight + bias


def rope_tables(config: DecoderConfig, positions: jax.Array, long: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), float32[B, T, N/2], of LongRoPE.

    Args:
      config: theta, factors and the two context lengths.
      positions: int32[B, T] position within prefix + own branch.
      long: bool[B]; whether the row's sequences are longer than the original context: then the long
        factors hold for all of the sequence (Phi-3's rule). Both sets share one magnitude factor.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) * 2.0 / config.head_dim)
    magnitude = 1.0
    if config.short_factor is not None:
        short = jnp.asarray(config.short_factor, jnp.float32)
        factor = jnp.where(long[:, None], jnp.asarray(config.long_factor, jnp.float32), short)
        inverse = 1.0 / (factor * frequency)
        scale = config.max_position / config.original_max_position
        if scale > 1.0:
            magnitude = math.sqrt(1.0 + math.log(scale) / math.log(config.original_max_position))
    else:
        inverse = jnp.broadcast_to(1.0 / frequency, (positions.shape[0], half))
    angle = positions[..., None].astype(jnp.float32) * inverse[:, None, :]
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary embeddings, half-split (NeoX) layout, to x [B, T, heads, N]."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def row_layout(branch: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derives everything about a shared-prefix row from `branch` alone.

        branch      0 0 0  1 1  2 2 2 -1
        positions   0 1 2  3 4  3 4 5  0     a branch continues the prefix
        predictor   - 0 1  2 3  2 5 6  -     whose output predicts this token: the token before it, and
                                             for a branch's first token the last one of the prefix
        mask[5]     1 1 1  0 0  1 0 0  0     j sees i iff i <= j and (branch_i = branch_j or branch_i = 0)

    Args:
      branch: int32[B, T]; prefix first, every branch contiguous, padding anywhere after the prefix.

    Returns:
      positions int32[B, T], predictor int32[B, T], mask bool[B, T (j), T (i)].
    """
    index = jnp.arange(branch.shape[1], dtype=jnp.int32)[None, :]
    before = jnp.pad(branch, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
    start = jax.lax.cummax(jnp.where(branch != before, index, 0), axis=1)
    prefix = jnp.sum(branch == 0, axis=1, dtype=jnp.int32, keepdims=True)
    positions = jnp.where(branch < 0, 0, index - start + jnp.where(branch > 0, prefix, 0))
    predictor = jnp.maximum(jnp.where(branch == before, index - 1, prefix - 1), 0)
    mine = branch[:, :, None] == branch[:, None, :]
    shared = (branch == 0)[:, None, :]
    mask = (index[:, :, None] >= index[:, None, :]) & (mine | shared)
    return positions, predictor, mask


def branch_sum(x: jax.Array, branch: jax.Array) -> jax.Array:
    """float32[B, T]: for each token the sum of x over its own branch up to it, itself included."""
    first = branch != jnp.pad(branch, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]

    def add(left, right):  # not a difference of sums over the row: other branches must not cost digits
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    return jax.lax.associative_scan(add, (x, first), axis=1)[0]


def _heads_first(q: jax.Array, groups: int) -> jax.Array:
    """Scaled queries [B, T, H, N] -> [B, G, H/G, T, N]."""
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[-1]) * (q.shape[-1] ** -0.5)
    return q.transpose(0, 2, 3, 1, 4)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled float32 scores of q [B, T, H, N] on k [B, G, S, N] -> [B, G, H/G, T, S]."""
    return jnp.einsum("bgqtn,bgsn->bgqts", _heads_first(q, k.shape[1]), k, preferred_element_type=jnp.float32)


def _values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Mixes v [B, G, S, N] by weights [B, G, H/G, T, S] -> [B, T, H, N]."""
    out = jnp.einsum("bgqts,bgsn->bgqtn", weights.astype(v.dtype), v)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def row_attention(mask: jax.Array, keep: bool) -> Callable[..., Any]:
    """Attention within whole rows, fused where the machine has it (see `attention.fused`).

    Args:
      mask: bool[B, T, T], as `row_layout` gives it.
      keep: also hand out every layer's keys and values (prefill).
    """

    def attend(q, k, v, state, layer):
        out = attention.fused(q, k, v, mask)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if out is None:
            scores = jnp.where(mask[:, None, None], _scores(q, k), -jnp.inf)
            out = _values(jax.nn.softmax(scores, axis=-1), v)
        return out, state, (k, v) if keep else None

    return attend


def stored(x: jax.Array, dtype: str) -> Any:
    """Keys or values [..., N] as a cache holds them: `int8` gives `Int8`, an empty dtype leaves them."""
    if dtype != "int8":
        return x.astype(dtype or x.dtype)
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return Int8(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def _read(cached: Any, dtype: Any) -> tuple[jax.Array, Any]:
    """Values of a dtype, and their scale or 1."""
    if isinstance(cached, Int8):
        return cached.values.astype(dtype), cached.scale
    return cached.astype(dtype), None


def branch_attention(
    visible: jax.Array, own_visible: jax.Array, column: jax.Array, chunks: list[jax.Array], dtype: str
) -> Callable[..., Any]:
    """Attention of one new token per branch: over the shared prefix, and over the branch's own suffix.

    The two parts are scored apart and normalised together, so the prefix is read once for its K
    branches. In `attend`, the T axis of q, k and v is the K branches.

    Args:
      visible: bool[B, K or 1, P], the columns of the shared part that a branch sees.
      own_visible: bool[B, S], the columns of its suffix that a branch sees, the new token's among them: of
        the chunks that are read.
      column: int32[]; where the new tokens stand.
      chunks: int32[] each, the first columns of the chunks of the suffix that are read.
      dtype: of the cache, see `stored`.
    """

    def attend(q, k, v, state, layer):
        number, prefix_k, prefix_v = layer
        branches, groups, width = k.shape[1:]

        def put(suffix, new):  # [L, B, K, G, R, N] and [B, K, G, N]; scales have no N
            at = (number, 0, 0, 0, column, 0)[: suffix.ndim]
            return jax.lax.dynamic_update_slice(suffix, jnp.expand_dims(new, (0, 4)), at)

        def own(suffix, first):
            def cut(x):
                size = (1, *x.shape[1:4], own_visible.shape[1] // len(chunks), *x.shape[5:])
                return jax.lax.dynamic_slice(x, (number, 0, 0, 0, first, 0)[: x.ndim], size)[0]

            return _read(jax.tree.map(cut, suffix), q.dtype)

        state = jax.tree.map(put, state, (stored(k, dtype), stored(v, dtype)))
        (prefix_k, scale_k), (prefix_v, scale_v) = _read(prefix_k, q.dtype), _read(prefix_v, q.dtype)

        def scaled(x, scale):  # [B, G, H/G, K, P] by [B, G, P]
            return x if scale is None else x * scale[:, :, None, None]

        def own_scaled(x, scale):  # [B, K, G, H/G, R] by [B, K, G, R]
            return x if scale is None else x * scale[:, :, :, None]

        shared = scaled(_scores(q, prefix_k), scale_k)
        shared = jnp.where(visible[:, None, None], shared, -jnp.inf)
        grouped = q.reshape(-1, branches, groups, q.shape[2] // groups, width) * (width**-0.5)
        parts = []
        for first in chunks:
            own_k, scale = own(state[0], first)
            part = jnp.einsum("bkgqn,bkgrn->bkgqr", grouped, own_k, preferred_element_type=jnp.float32)
            parts.append(own_scaled(part, scale))
        suffix = jnp.where(own_visible[:, None, None, None], jnp.concatenate(parts, -1), -jnp.inf)
        suffix = suffix.transpose(0, 2, 3, 1, 4)
        top = jnp.maximum(shared.max(-1, keepdims=True), suffix.max(-1, keepdims=True))
        shared, suffix = jnp.exp(shared - top), jnp.exp(suffix - top)
        total = shared.sum(-1, keepdims=True) + suffix.sum(-1, keepdims=True)
        out = _values(scaled(shared / total, scale_v), prefix_v)
        parts = jnp.split((suffix / total).transpose(0, 3, 1, 2, 4), len(chunks), axis=-1)
        for first, part in zip(chunks, parts):
            own_v, scale = own(state[1], first)
            part = own_scaled(part, scale).astype(own_v.dtype)
            out += jnp.einsum("bkgqr,bkgrn->bkgqn", part, own_v).reshape(q.shape)
        return out, state, None

    return attend


class Blocks(nnx.Module):
    """The L decoder blocks: pre-norm attention and a gated SiLU MLP, no biases."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        n, d, f = c.num_layers, c.hidden_size, c.intermediate_size
        h, g, w = c.num_heads, c.num_kv_heads, c.head_dim
        std, out = d**-0.5, (2 * n) ** -0.5
        self.config = config
        self.input_norm = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.q = param(rngs, (n, d, h, w), ("layers", "embed", "heads", "head_dim"), std)
        self.k = param(rngs, (n, d, g, w), ("layers", "embed", "heads", "head_dim"), std)
        self.v = param(rngs, (n, d, g, w), ("layers", "embed", "heads", "head_dim"), std)
        self.o = param(rngs, (n, h, w, d), ("layers", "heads", "head_dim", "embed"), (h * w) ** -0.5 * out)
        self.post_norm = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.gate = param(rngs, (n, d, f), ("layers", "embed", "mlp"), std)
        self.up = param(rngs, (n, d, f), ("layers", "embed", "mlp"), std)
        self.down = param(rngs, (n, f, d), ("layers", "mlp", "embed"), f**-0.5 * out)

    def __call__(self, x, rope, attend, state, layer):
        """One block (self is sliced by the scan): x [B, T, D] -> x, attention state, what it keeps."""
        eps = self.config.rms_norm_eps
        h = rms_norm(x, self.input_norm[...], eps)
        q = rotate(jnp.einsum("btd,dhn->bthn", h, self.q[...]), rope)
        k = rotate(jnp.einsum("btd,dgn->btgn", h, self.k[...]), rope)
        v = jnp.einsum("btd,dgn->btgn", h, self.v[...])
        out, state, kept = attend(q, k, v, state, layer)
        x = x + jnp.einsum("bthn,hnd->btd", out, self.o[...])
        h = rms_norm(x, self.post_norm[...], eps)
        x = x + (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]
        return x, state, kept


class Decoder(nnx.Module):
    """Token embedding, scanned blocks, final norm and output head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        std = c.hidden_size**-0.5
        self.config = config
        self.embedding = param(rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), std)
        self.blocks = Blocks(config, rngs)
        self.norm = param(rngs, (c.hidden_size,), ("embed",), 1.0)
        if not c.tie_word_embeddings:
            self.head = param(rngs, (c.hidden_size, c.vocab_size), ("embed", "vocab"), std)

    @jax.named_scope("language")
    def hidden(self, x, positions, long, attend, *, state=None, layers=None, remat=None):
        """Runs the blocks and the final norm.

        Args:
          x: [B, T, D] embeddings.
          positions: int32[B, T].
          long: bool[B], see `rope_tables`.
          attend: attention function, `row_attention(...)` or `branch_attention(...)`.
          state: attention state carried from block to block.
          layers: arrays with a leading L, handed to attention block by block.
          remat: a `jax.checkpoint` policy, or None to keep all activations.

        Returns:
          hidden [B, T, D], the final state, and what every block kept, stacked over L.
        """
        rope = rope_tables(self.config, positions, long)

        def block(carry, inputs):
            x, state = carry
            blocks, layer = inputs
            # rows stay where they are and weights come to them; else they may be cut along D, as weights are
            x = sharding.constrain(x, ("batch", None, None))
            x, state, kept = blocks(x, rope, attend, state, layer)
            return (sharding.constrain(x, ("batch", None, None)), state), kept

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        unroll = self.config.unroll if state is None else 1  # a carried cache is updated in place
        (x, state), kept = jax.lax.scan(block, (x, state), (self.blocks, layers), unroll=unroll)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), state, kept

    @jax.named_scope("language")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] of hidden [..., D]."""
        head = self.embedding[...].T if self.config.tie_word_embeddings else self.head[...]
        return (hidden @ head).astype(jnp.float32)


def decode_hidden(
    decoder: Decoder, x: jax.Array, cache: KVCache, chunks: int = 0
) -> tuple[jax.Array, KVCache]:
    """One decoding step.

    Args:
      decoder: the language model.
      x: [B, K, D], the embeddings of the branches' next token.
      cache: the keys and values before it.
      chunks: how many chunks of the suffixes are read (see `structs.ring`), the last ones that were written;
        0 reads all. Rows whose tokens go further back come out wrong.

    Returns:
      hidden [B, K, D] and the cache with this token's keys and values.
    """
    suffix = cache.suffix_k
    room = suffix.values.shape[4] if isinstance(suffix, Int8) else suffix.shape[4]
    layers = (jnp.arange(decoder.config.num_layers), cache.prefix_k, cache.prefix_v)
    size = ring(room)[1] if chunks else room
    last, count = cache.clock % room // size, room // size
    firsts = [(last - at) % count * size for at in range(chunks or 1)]
    columns = jnp.concatenate([first + jnp.arange(size) for first in firsts])
    ago = (cache.clock - columns) % room  # steps since a column was written
    dtype = "int8" if isinstance(suffix, Int8) else suffix.dtype.name
    hidden, (suffix_k, suffix_v), _ = decoder.hidden(
        x,
        cache.start + cache.age[:, None],
        cache.long,
        branch_attention(cache.visible, ago <= cache.age[:, None], cache.clock % room, firsts, dtype),
        state=(cache.suffix_k, cache.suffix_v),
        layers=layers,
    )
    new = {"suffix_k": suffix_k, "suffix_v": suffix_v, "age": cache.age + 1, "clock": cache.clock + 1}
    return hidden, cache._replace(**new)
