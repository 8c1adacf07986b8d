"""Layers that the families share: norms, LongRoPE, the shared-prefix row, the scanned decoder.

Shapes use one alphabet:
  B rows (queries)   T row tokens    P prefix tokens   K branches   R response tokens
  D model width      H query heads   G key/value heads N head width F MLP width   L layers   V vocabulary
Block parameters carry a leading `layers` dimension and are scanned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mstar_jax import sharding
from mstar_jax.models import attention
from mstar_jax.structs import KVCache

ADAPTED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # axes of x that each contracts
ADAPTERS = r"decoder\.blocks\.\w+_[ab]$"  # names of the adapters' parameters


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a Llama-like decoder (Phi-3 adds LongRoPE factors).

    `short_factor` and `long_factor` have head_dim / 2 entries; None means plain RoPE. `rope_sections`, three
    numbers that add up to head_dim / 2, means M-RoPE (Qwen2-VL, arXiv 2409.12191): so many frequencies turn
    with a token's time, height and width. They follow each other, or take turns (`rope_interleaved`, as in
    Qwen3-VL), where time also has those that the other two leave. `qkv_bias` gives the query, key and value
    projections biases (Qwen2 and 2.5). `qk_norm` gives each head of queries and keys an RMSNorm before RoPE,
    with one weight for all heads (Qwen3). The scan over blocks is unrolled by `unroll`: more code, faster on
    a CPU. `lora_rank` r > 0 gives the blocks' projections adapters, x @ W + (x @ a) @ b * lora_alpha / r
    (LoRA, arXiv 2106.09685, scaled as in peft).
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
    rope_sections: tuple[int, ...] | None = None
    rope_interleaved: bool = False
    max_position: int = 4096
    original_max_position: int = 4096
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    unroll: int = 1
    lora_rank: int = 0
    lora_alpha: float = 32.0


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A parameter: its shape, logical axes and initialisation on one line."""
    if std == 0.0 or std == 1.0:  # biases and norm weights
        return nnx.Param(jnp.full(shape, std, jnp.float32), axes=axes)
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * std, axes=axes)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """RMSNorm over `axis`, in float32; the weight is multiplied after the cast to x's dtype, as in Phi-3 and
    Llama."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axis, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with float32 statistics."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight + bias


@jax.custom_vjp
def widen(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] @ weight [D, F] of one dtype, for F > D, with a weight gradient that is faster on a CPU.

    The product that computes the weight's gradient transposes its first operand. In JAX's own rule that is
    the output's gradient, which XLA's CPU compiler then recomputes entry by entry; here it is x.
    """
    return x @ weight


def _widen_forward(x, weight):
    trained = x.value if weight.perturbed else None  # a frozen weight needs no gradient
    return x.value @ weight.value, (trained, weight.value)


def _widen_back(saved, grad):
    x, weight = saved
    rows = tuple(range(grad.ndim - 1))
    return grad @ weight.T, None if x is None else jnp.tensordot(x, grad, (rows, rows))


widen.defvjp(_widen_forward, _widen_back, symbolic_zeros=True)


def rope_tables(config: DecoderConfig, positions: jax.Array, long: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), float32[B, T, N/2], of LongRoPE or M-RoPE.

    Args:
      config: theta, factors and the two context lengths; sections.
      positions: int32[B, T], position within prefix + own branch; with M-RoPE also int32[B, 3, T], time,
        height and width. Those of a text are the same, so [B, T] does for it.
      long: bool[B], whether the row's sequences exceed the original context. If so, the long factors apply to
        the whole sequence (Phi-3's rule). Both sets of factors share one magnitude.
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
    if positions.ndim == 3:
        positions = jnp.moveaxis(positions, 1, 2)[..., turning(config)]
    else:
        positions = positions[..., None]
    angle = positions.astype(jnp.float32) * inverse[:, None, :]
    # written into an array, or XLA's CPU compiler would recompute them in every head of every layer
    tables = jnp.zeros((2, *angle.shape)).at[0].set(jnp.cos(angle)).at[1].set(jnp.sin(angle))
    return tables[0] * magnitude, tables[1] * magnitude


def turning(config: DecoderConfig) -> np.ndarray:
    """int32[N/2]: whether a frequency of M-RoPE turns with time (0), height (1) or width (2)."""
    sections = config.rope_sections or ()
    if not config.rope_interleaved:
        return np.repeat(np.arange(len(sections)), sections)
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary embeddings, half-split (NeoX) layout, to x [B, T, heads, N]."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def row_layout(branch: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions, predictors and attention mask of a shared-prefix row, all derived from `branch`.

        branch      0 0 0  1 1  2 2 2 -1
        positions   0 1 2  3 4  3 4 5  0     a branch continues the prefix
        predictor   - 0 1  2 3  2 5 6  -     the place whose output predicts this token: the one before it,
                                             or the last of the prefix for a branch's first token
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
    """float32[B, T]: the inclusive cumulative sum of x [B, T] within each token's own branch."""
    first = branch != jnp.pad(branch, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]

    def add(left, right):  # not a difference of cumulative sums over the row, which would lose digits
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    return jax.lax.associative_scan(add, (x, first), axis=1)[0]


class Blocks(nnx.Module):
    """The L decoder blocks: pre-norm attention and a gated SiLU MLP, no biases but those of `qkv_bias`.

    With LoRA, each projection [L, inputs, outputs], such as `q`, has adapters `q_a` [L, inputs, r] and `q_b`
    [L, r, outputs]. b starts at 0, so the adapters add nothing at first.
    """

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
        if c.qkv_bias:
            self.q_bias = param(rngs, (n, h, w), ("layers", "heads", "head_dim"), 0.0)
            self.k_bias = param(rngs, (n, g, w), ("layers", "heads", "head_dim"), 0.0)
            self.v_bias = param(rngs, (n, g, w), ("layers", "heads", "head_dim"), 0.0)
        if c.qk_norm:
            self.q_norm = param(rngs, (n, w), ("layers", "head_dim"), 1.0)
            self.k_norm = param(rngs, (n, w), ("layers", "head_dim"), 1.0)
        for name, contracted in ADAPTED.items() if c.lora_rank else ():
            weight = getattr(self, name)
            axes = weight.get_metadata()["axes"]
            last = 1 + contracted  # of the input axes
            shape_a = (*weight.shape[:last], c.lora_rank)
            shape_b = (n, c.lora_rank, *weight.shape[last:])
            std = math.prod(weight.shape[1:last]) ** -0.5
            setattr(self, f"{name}_a", param(rngs, shape_a, (*axes[:last], "rank"), std))
            setattr(self, f"{name}_b", param(rngs, shape_b, ("layers", "rank", *axes[last:]), 0.0))

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        """x through a projection and its adapters; a @ b is never materialised."""
        contracted = ADAPTED[name]
        weight = getattr(self, name)[...]
        out = widen(x, weight) if name in ("gate", "up") else jnp.tensordot(x, weight, contracted)
        if rank := self.config.lora_rank:
            low = jnp.tensordot(x, getattr(self, f"{name}_a")[...], contracted)
            low = low * (self.config.lora_alpha / rank)
            out += jnp.tensordot(low, getattr(self, f"{name}_b")[...], 1)
        return out

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, heads, N] before RoPE."""
        q, k, v = (self._project(x, name) for name in "qkv")
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if self.config.qk_norm:
            eps = self.config.rms_norm_eps
            q, k = rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)
        return q, k, v

    def __call__(self, x, rope, attend):
        """One block; `self` is one layer's slice. x [B, T, D] -> x, and what `attend` returns to be kept."""
        eps = self.config.rms_norm_eps
        h = rms_norm(x, self.input_norm[...], eps)
        q, k, v = self._heads(h)
        out, kept = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + self._project(out, "o")
        h = rms_norm(x, self.post_norm[...], eps)
        x = x + self._project(jax.nn.silu(self._project(h, "gate")) * self._project(h, "up"), "down")
        return x, kept


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def merge(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float, dtype: jnp.dtype) -> jax.Array:
    """W + a @ b * scale for every layer (see `Blocks`), computed in float32 and cast to `dtype`."""
    a, b = sharding.cast((a, b), jnp.float32)
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(a, b)
    return (weight.astype(jnp.float32) + scale * product).astype(dtype)


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
    def hidden(self, x, positions, long, attend, *, remat=None):
        """Runs the blocks and the final norm.

        Args:
          x: [B, T, D] embeddings; or [B, T, (1 + n) * D], followed by what is added after each of the first n
            blocks (DeepStack, arXiv 2406.04334).
          positions: int32[B, T], or int32[B, 3, T] with M-RoPE.
          long: bool[B], see `rope_tables`.
          attend: the attention function, see `attention.row_attention`.
          remat: a `jax.checkpoint` policy, or None to keep all activations.

        Returns:
          hidden [B, T, D], and what `attend` keeps of every block, stacked over L.
        """
        rope = rope_tables(self.config, positions, long)
        levels = x.shape[-1] // self.config.hidden_size - 1
        added = None
        if levels:
            x, *deep = jnp.split(x, 1 + levels, axis=-1)
            added = jnp.stack(deep)

        def block(x, layer):
            blocks, number = layer
            # activations stay sharded by row; the compiler might else shard them along D, as weights are
            x = sharding.constrain(x, ("batch", None, None))
            x, kept = blocks(x, rope, attend)
            if added is not None:
                x = x + jnp.where(number < levels, added[jnp.minimum(number, levels - 1)], 0)
            return sharding.constrain(x, ("batch", None, None)), kept

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        numbers = jnp.arange(self.config.num_layers) if levels else None
        x, kept = jax.lax.scan(block, x, (self.blocks, numbers), unroll=self.config.unroll)
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps), kept

    @jax.named_scope("language")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32[..., V]."""
        head = self.embedding[...].T if self.config.tie_word_embeddings else self.head[...]
        return widen(hidden, head).astype(jnp.float32)


def layers_of(decoder: Decoder) -> Callable[[int], Blocks]:
    """A function from a layer's number to its block, for `decode_hidden`; call it outside of the decoding
    loop.

    XLA for CPU and GPU copies a layer that is sliced from the stacked weights, in every step of a loop. There
    the layers are sliced here, once. XLA for TPU reads them in place, so a copy would only cost memory.
    """

    def block(layer: int) -> Blocks:
        return jax.tree.map(lambda p: p[layer], decoder.blocks)

    if attention.device_kind().startswith("TPU"):
        return block
    return [block(layer) for layer in range(decoder.config.num_layers)].__getitem__


@jax.named_scope("language")
def decode_hidden(
    decoder: Decoder,
    layer: Callable[[int], Blocks],
    x: jax.Array,
    live: jax.Array,
    cache: KVCache,
    chunks: int = 0,
) -> tuple[jax.Array, KVCache]:
    """One decoding step.

    Args:
      decoder: the language model.
      layer: its blocks, see `layers_of`.
      x: [B, M, D], the embedding of the next token of the sample in each place.
      live: bool[B, M], those that have not ended; hidden states of others are not defined.
      cache: the keys and values of the tokens before it.
      chunks: how many chunks of the suffixes are read, 0 for all. Results are wrong for samples that have
        tokens in other chunks.

    Returns:
      hidden [B, M, D] and the cache with this token's keys and values.
    """
    c = decoder.config
    count = len(cache.suffix_k)
    size = jax.tree.leaves(cache.suffix_k[0])[0].shape[3]
    column = cache.clock % size
    columns = jnp.arange(size)
    ago = [(column - columns + at * size) % (count * size) for at in range(chunks or count)]
    seen = [steps <= cache.age[..., None] for steps in ago]  # `ago`: steps since a column was written
    rope = rope_tables(c, cache.start + cache.age, cache.long)
    written = []
    for i in range(c.num_layers):
        prefix = (cache.prefix_k[i], cache.prefix_v[i])
        suffix = [(cache.suffix_k[at][i], cache.suffix_v[at][i]) for at in range(len(seen))]
        attend = attention.branch_attention(prefix, cache.visible, suffix, seen, column, live)
        x = sharding.constrain(x, ("batch", None, None))
        x, kept = layer(i)(x, rope, attend)
        written.append(kept)
    k, v = zip(*written)
    cache = cache._replace(suffix_k=(k, *cache.suffix_k[1:]), suffix_v=(v, *cache.suffix_v[1:]))
    x = rms_norm(x, decoder.norm[...], c.rms_norm_eps)
    return x, cache._replace(age=cache.age + 1, clock=cache.clock + 1)
