"""The vision transformer of all families: CLIP, InternViT and SigLIP are variants of one config.

Shapes: B images, S pixels a side, M patches a side, T patches, D width, H heads, N head width.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mstar_jax import sharding
from mstar_jax.models.attention import unmasked
from mstar_jax.models.layers import layer_norm, param, rms_norm

gelu = functools.partial(jax.nn.gelu, approximate=False)
tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
QUERIES = 1024  # of `segmented`, whose scores are in memory at the same time


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x); a config with `jax.nn.silu` itself could not be pickled."""
    return jax.nn.silu(x)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Dimensions and variant of a vision transformer; the defaults are CLIP's as Phi-3.5-vision reads it.

    Attributes:
      select_layer: the block whose output is used: -1 for the last one, -2 for the one before it.
      patch_bias, class_token, pre_norm, layer_scale: whether the model has these parameters.
      post_norm: whether there is a final norm; it is applied only when the last block is used.
      qkv_bias: whether queries, keys and values have biases.
      qk_norm: whether queries and keys have an RMSNorm, each over all heads together.
      rms_norm: whether the blocks' norms are RMSNorms, without biases, instead of LayerNorms.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    activation: Callable[[jax.Array], jax.Array] = quick_gelu
    select_layer: int = -2
    patch_bias: bool = False
    class_token: bool = True
    pre_norm: bool = True
    post_norm: bool = True
    layer_scale: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    rms_norm: bool = False

    @property
    def side(self) -> int:
        """Patches along one side of a square image."""
        return self.image_size // self.patch_size


class VitBlocks(nnx.Module):
    """Pre-norm transformer blocks, stacked over `layers`."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        n, d, f, h = config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads
        w, out = d // h, (2 * n) ** -0.5
        heads, each = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim")
        self.config = config
        self.norm1 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.q = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.k = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.v = param(rngs, (n, d, h, w), heads, d**-0.5)
        if config.qkv_bias:
            self.q_bias = param(rngs, (n, h, w), each, 0.0)
            self.k_bias = param(rngs, (n, h, w), each, 0.0)
            self.v_bias = param(rngs, (n, h, w), each, 0.0)
        if config.qk_norm:
            self.q_norm = param(rngs, (n, h, w), each, 1.0)
            self.k_norm = param(rngs, (n, h, w), each, 1.0)
        self.o = param(rngs, (n, h, w, d), ("layers", "heads", "head_dim", "embed"), d**-0.5 * out)
        self.o_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.norm2 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        if not config.rms_norm:
            self.norm1_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
            self.norm2_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.up = param(rngs, (n, d, f), ("layers", "embed", "mlp"), d**-0.5)
        self.up_bias = param(rngs, (n, f), ("layers", "mlp"), 0.0)
        self.down = param(rngs, (n, f, d), ("layers", "mlp", "embed"), f**-0.5 * out)
        self.down_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        if config.layer_scale:
            self.scale1 = param(rngs, (n, d), ("layers", "embed"), 1.0)
            self.scale2 = param(rngs, (n, d), ("layers", "embed"), 1.0)

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        weight, eps = getattr(self, name)[...], self.config.layer_norm_eps
        if self.config.rms_norm:
            return rms_norm(x, weight, eps)
        return layer_norm(x, weight, getattr(self, f"{name}_bias")[...], eps)

    def _heads(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values [B, T, H, N]."""
        c, out = self.config, []
        for name in "qkv":
            one = jnp.einsum("btd,dhn->bthn", x, getattr(self, name)[...])
            if c.qkv_bias:
                one = one + getattr(self, f"{name}_bias")[...]
            if c.qk_norm and name != "v":
                one = rms_norm(one, getattr(self, f"{name}_norm")[...], c.layer_norm_eps, axis=(-2, -1))
            out.append(one)
        return out

    def __call__(self, x, mask, attend=None):
        """One block; `self` is one layer's slice. x [B, T, D], mask bool[B, T] over the keys or None;
        `attend` is called in place of `attention`."""
        c = self.config
        q, k, v = self._heads(self._norm(x, "norm1"))
        h = jnp.einsum("bthn,hnd->btd", (attend or attention)(q, k, v, mask), self.o[...]) + self.o_bias[...]
        x = x + (h * self.scale1[...] if c.layer_scale else h)
        h = self._norm(x, "norm2")
        h = c.activation(h @ self.up[...] + self.up_bias[...]) @ self.down[...] + self.down_bias[...]
        return x + (h * self.scale2[...] if c.layer_scale else h)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Bidirectional attention with a float32 softmax.

    `jax.nn.dot_product_attention` computes the same, but takes 5-15% more time on a CPU.

    Args:
      q: [B, T, H, N].
      k, v: [B, S, H, N].
      mask: bool[B, S], the keys that are attended to, or bool[B, T, S], those of each query; None for all.

    Returns:
      [B, T, H, N]. Where a mask excludes every key, as for an image that is only padding of a batch, the
      values are finite and meaningless.
    """
    if mask is None and q.shape == k.shape and (out := unmasked(q, k, v)) is not None:
        return out
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * (q.shape[-1] ** -0.5), k, v))
    scores = jnp.einsum("bhtn,bhsn->bhts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bhsn->bhtn", weights, v).transpose(0, 2, 1, 3)


def segmented(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    """Bidirectional attention within the segments of rows, a piece of the queries at a time: the scores of
    all [B, H, T, T] would be large.

    Args:
      q, k, v: [B, T, H, N].
      segment: int32[B, T], the number of each token's segment.

    Returns:
      [B, T, H, N].
    """
    length = q.shape[1]
    count = -(-length // QUERIES)
    size = -(-length // count)

    def split(x):  # [B, T, ...] -> [count, B, T / count, ...]
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    def piece(part):
        queries, own = part
        return attention(queries, k, v, own[:, :, None] == segment[:, None])

    if count == 1:
        return piece((q, segment))
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(piece), (split(q), split(segment))), 0, 1)
    return out.reshape(len(q), -1, *q.shape[2:])[:, :length]


class Vit(nnx.Module):
    """Patch embedding, blocks, and a final norm (see `VitConfig.post_norm`)."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        d, inputs = config.hidden_size, 3 * config.patch_size**2
        self.config = config
        self.patch = param(rngs, (inputs, d), ("patch", "embed"), inputs**-0.5)
        if config.patch_bias:
            self.patch_bias = param(rngs, (d,), ("embed",), 0.0)
        if config.class_token:
            self.class_embedding = param(rngs, (d,), ("embed",), 0.02)
        self.position = param(rngs, (config.side**2 + config.class_token, d), ("positions", "embed"), 0.5)
        self.blocks = VitBlocks(config, rngs)
        if config.pre_norm:
            self.pre_norm = param(rngs, (d,), ("embed",), 1.0)
            self.pre_norm_bias = param(rngs, (d,), ("embed",), 0.0)
        if config.post_norm:
            self.post_norm = param(rngs, (d,), ("embed",), 1.0)
            self.post_norm_bias = param(rngs, (d,), ("embed",), 0.0)

    @jax.named_scope("vision")
    def __call__(self, patches: jax.Array, remat=None, *, positions=None, mask=None) -> jax.Array:
        """Features of every patch, without the class token.

        Args:
          patches: [B, T, 3 * patch_size**2], normalised, channels outermost (see `patchify`).
          remat: a `jax.checkpoint` policy, or None.
          positions: int32[B, T], row of the position table for each patch; None for patches in order.
          mask: bool[B, T], the patches that are attended to; None for all.

        Returns:
          [B, T, D].
        """
        c = self.config
        x = patches @ self.patch[...]
        if c.patch_bias:
            x = x + self.patch_bias[...]
        if c.class_token:
            first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + (self.position[...] if positions is None else self.position[...][positions])
        if c.pre_norm:
            x = layer_norm(x, self.pre_norm[...], self.pre_norm_bias[...], c.layer_norm_eps)

        def block(x, blocks):
            x = sharding.constrain(x, ("batch", None, None))  # see layers.Decoder.hidden
            return sharding.constrain(blocks(x, mask), ("batch", None, None)), None

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        used = jax.tree.map(lambda leaf: leaf[: c.num_layers + 1 + c.select_layer], self.blocks)
        x, _ = jax.lax.scan(block, x, used)
        if c.post_norm and c.select_layer == -1:
            x = layer_norm(x, self.post_norm[...], self.post_norm_bias[...], c.layer_norm_eps)
        return x[:, 1:] if c.class_token else x


def normalised(
    pixels: jax.Array, there: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Pixels as a tower reads them: (x / 255 - mean) / std, in float32 and then rounded to `dtype`.

    Args:
      pixels: uint8[..., 3], or such values in float32. One mean and std stand for all channels where patches
        have them elsewhere than in the last dimension.
      there: bool, of as many dimensions as `pixels`; what is not there, padding, becomes 0.
      mean, std: of each channel, in units of 255.
      dtype: of the tower's parameters.
    """
    # By a constant, or by one number for many pixels, a compiler multiplies with the rounded reciprocal and
    # may join that with the subtraction. A divisor for every pixel keeps the divisions: numpy's very bits.
    x = pixels.astype(jnp.float32)
    zero = x - x
    x = x / (255.0 + zero) - jnp.asarray(mean, jnp.float32)
    return jnp.where(there, x / (jnp.asarray(std, jnp.float32) + zero), 0.0).astype(dtype)


def patchify(pixels: jax.Array, size: int) -> jax.Array:
    """[B, S, S, 3] -> [B, M*M, 3 * size**2]: row-major patches of (channel, y, x), as OIHW weights expect."""
    side = pixels.shape[1] // size
    x = pixels.reshape(-1, side, size, side, size, 3).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(-1, side**2, 3 * size**2)


def merge(features: jax.Array, size: int) -> jax.Array:
    """Squares of size x size patches become one token, as in a pixel shuffle: [B, M*M, D] ->
    [B, (M/size)**2, size**2 * D]; the channels of a merged token are in the order (dy, dx, c)."""
    side, width = int(features.shape[1] ** 0.5), features.shape[-1]
    x = features.reshape(-1, side // size, size, side // size, size, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(features.shape[0], -1, size**2 * width)
