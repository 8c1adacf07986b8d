"""Vision towers. Shapes: B images, S pixels a side, M patches a side, D width, H heads, N head width."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mstar_jax.models.layers import layer_norm, param


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Dimensions of a CLIP vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


class ClipBlocks(nnx.Module):
    """Pre-norm transformer blocks with biases and quick-GELU, stacked over `layers`."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        n, d, f, h = config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads
        w, out = d // h, (2 * n) ** -0.5
        heads = ("layers", "embed", "heads", "head_dim")
        self.config = config
        self.norm1 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.norm1_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.q = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.k = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.v = param(rngs, (n, d, h, w), heads, d**-0.5)
        self.q_bias = param(rngs, (n, h, w), ("layers", "heads", "head_dim"), 0.0)
        self.k_bias = param(rngs, (n, h, w), ("layers", "heads", "head_dim"), 0.0)
        self.v_bias = param(rngs, (n, h, w), ("layers", "heads", "head_dim"), 0.0)
        self.o = param(rngs, (n, h, w, d), ("layers", "heads", "head_dim", "embed"), d**-0.5 * out)
        self.o_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.norm2 = param(rngs, (n, d), ("layers", "embed"), 1.0)
        self.norm2_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)
        self.up = param(rngs, (n, d, f), ("layers", "embed", "mlp"), d**-0.5)
        self.up_bias = param(rngs, (n, f), ("layers", "mlp"), 0.0)
        self.down = param(rngs, (n, f, d), ("layers", "mlp", "embed"), f**-0.5 * out)
        self.down_bias = param(rngs, (n, d), ("layers", "embed"), 0.0)

    def __call__(self, x):
        """One block (self is sliced by the scan): x [B, T, D]."""
        eps = self.config.layer_norm_eps
        h = layer_norm(x, self.norm1[...], self.norm1_bias[...], eps)
        q = jnp.einsum("btd,dhn->bthn", h, self.q[...]) + self.q_bias[...]
        k = jnp.einsum("btd,dhn->bthn", h, self.k[...]) + self.k_bias[...]
        v = jnp.einsum("btd,dhn->bthn", h, self.v[...]) + self.v_bias[...]
        scores = jnp.einsum(
            "bthn,bshn->bhts", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhts,bshn->bthn", weights, v)
        x = x + jnp.einsum("bthn,hnd->btd", out, self.o[...]) + self.o_bias[...]
        h = layer_norm(x, self.norm2[...], self.norm2_bias[...], eps)
        h = h @ self.up[...] + self.up_bias[...]
        h = h * jax.nn.sigmoid(1.702 * h)  # quick-GELU
        return x + h @ self.down[...] + self.down_bias[...]


class ClipTower(nnx.Module):
    """CLIP's vision transformer, read at its second-last layer.

    The last block and `post_norm` are part of the checkpoint and of no use here: Phi-3.5-vision takes
    `hidden_states[-2]`, without a norm.
    """

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        d, inputs = config.hidden_size, 3 * config.patch_size**2
        self.config = config
        self.patch = param(rngs, (inputs, d), ("patch", "embed"), inputs**-0.5)
        self.class_embedding = param(rngs, (d,), ("embed",), 0.02)
        self.position = param(rngs, (config.side**2 + 1, d), ("positions", "embed"), 0.5)
        self.pre_norm = param(rngs, (d,), ("embed",), 1.0)
        self.pre_norm_bias = param(rngs, (d,), ("embed",), 0.0)
        self.blocks = ClipBlocks(config, rngs)
        self.post_norm = param(rngs, (d,), ("embed",), 1.0)
        self.post_norm_bias = param(rngs, (d,), ("embed",), 0.0)

    def __call__(self, pixels: jax.Array, remat=None) -> jax.Array:
        """pixels [B, S, S, 3], normalised -> features [B, M*M, D], row-major, without the class token."""
        c, size = self.config, self.config.patch_size
        x = pixels.reshape(-1, c.side, size, c.side, size, 3).transpose(
            0, 1, 3, 5, 2, 4
        )  # (c, py, px) as in OIHW
        x = x.reshape(-1, c.side**2, 3 * size**2) @ self.patch[...]
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position[...]
        x = layer_norm(x, self.pre_norm[...], self.pre_norm_bias[...], c.layer_norm_eps)

        def block(x, blocks):
            return blocks(x), None

        if remat is not None:
            block = jax.checkpoint(block, policy=remat, prevent_cse=False)
        used = jax.tree.map(lambda leaf: leaf[: c.num_layers - 1], self.blocks)
        x, _ = jax.lax.scan(block, x, used)
        return x[:, 1:]


def merge_2x2(features: jax.Array) -> jax.Array:
    """[B, M*M, D] -> [B, (M/2)*(M/2), 4D]; channels of a merged token in the order (dy, dx, c)."""
    side = int(features.shape[1] ** 0.5)
    x = features.reshape(-1, side // 2, 2, side // 2, 2, features.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(features.shape[0], -1, 4 * features.shape[-1])
