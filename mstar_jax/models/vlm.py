"""What every policy has in common: a decoder whose prompt holds image features.

A family subclasses `VisionLanguageModel` and says how pixels become a table of features
(`image_features`); where a feature stands in a row was decided on the host (`Batch.image_index`), so
HD layouts, tiles and slices are data and never shapes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mstar_jax import sharding
from mstar_jax.models import attention, layers
from mstar_jax.structs import Batch, KVCache, ring

PIECE = 512  # tokens of a row whose logits are there together


class VisionLanguageModel(nnx.Module):
    """Decoder plus image features; the parameter pytree of a policy is this module itself."""

    config: Any
    decoder: layers.Decoder

    def merged(self, dtype: Any = None) -> "VisionLanguageModel":
        """The plain policy that is equal to this one: adapters are added into their weights.

        Args:
          dtype: of the parameters; None for each weight's own.
        """
        c, weights = self.config.decoder, sharding.named(self)
        if not c.lora_rank:
            return sharding.cast(self, dtype) if dtype else self

        def take(path, _):
            name = sharding.parameter_name(path)
            weight, a, b = (weights.get(name + end) for end in ("", "_a", "_b"))
            if a is None:
                return weight
            how = {"scale": c.lora_alpha / c.lora_rank, "dtype": jnp.dtype(dtype or weight.dtype)}
            return layers.merge(weight, a, b, **how)

        plain = dataclasses.replace(self.config, decoder=dataclasses.replace(c, lora_rank=0))
        build: Any = type(self)
        abstract = jax.eval_shape(lambda: build(plain, nnx.Rngs(0)))
        out = jax.tree_util.tree_map_with_path(take, abstract)
        return sharding.cast(out, dtype) if dtype else out

    def image_features(self, pixels: jax.Array, remat=None) -> jax.Array:
        """Pixels (see `Batch`) -> feature table [B, F, D]; every family defines its own."""
        raise NotImplementedError

    def embed(self, tokens, image_index, pixels, remat=None) -> jax.Array:
        """Token embeddings [B, T, D] with image features in the places that `image_index` names."""
        x = self.decoder.embedding[...][tokens]
        if jax.tree.leaves(pixels)[0].shape[1] == 0:  # a text-only batch
            return x
        with jax.named_scope("projector"):  # and, within, the tower's "vision"
            features = self.image_features(sharding.cast(pixels, x.dtype), remat)
        picked = jnp.take_along_axis(features, jnp.maximum(image_index, 0)[..., None], axis=1)
        return jnp.where((image_index >= 0)[..., None], picked, x)

    def __call__(self, batch: Batch, remat=None) -> jax.Array:
        """hidden [B, T, D] that *predicts* each token of the rows (see `layers.row_layout`)."""
        _, predictor, _ = layers.row_layout(batch.branch)
        return jnp.take_along_axis(self.hidden(batch, remat), predictor[..., None], axis=1)

    def hidden(self, batch: Batch, remat=None) -> jax.Array:
        """hidden [B, T, D] at each token of the rows: it knows this token and what stands before it."""
        positions, _, mask = layers.row_layout(batch.branch)
        x = self.embed(batch.tokens, batch.image_index, batch.pixels, remat)
        long = positions.max(axis=1) + 1 > self.decoder.config.original_max_position
        attend = attention.row_attention(mask, keep=False)
        return self.decoder.hidden(x, positions, long, attend, remat=remat)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V]."""
        return self.decoder.logits(hidden)

    def token_logprobs(
        self, hidden: jax.Array, tokens: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """How likely tokens are to the hidden states that predict them.

        Long rows go piece by piece, in the backward pass too: logits [B, T, V] are never all in memory. The
        tokens that are wanted come first, and pieces without one are passed over.

        Args:
          hidden: [B, T, D].
          tokens: int32[B, T].
          wanted: bool[B, T]; what stands elsewhere in the results has no meaning.

        Returns:
          Log probability (nats) float32[B, T], and whether it is the likeliest token bool[B, T].
        """

        def read(hidden, tokens):
            logits = self.logits(hidden)
            target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == tokens

        def nothing(hidden, tokens):
            return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, bool)

        length = tokens.shape[1]
        count = -(-length // PIECE)
        if count <= 1:
            return read(hidden, tokens)
        order = jnp.argsort(~wanted, axis=1, stable=True)
        size = -(-length // count)

        def cut(x):  # [B, T, ...] -> [count, B, T / count, ...], the wanted ones first
            x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
            x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

        def piece(part):
            hidden, tokens, number = part
            return jax.lax.cond(number * size < most, read, nothing, hidden, tokens)

        most, back = wanted.sum(axis=1).max(), jnp.argsort(order, axis=1)
        found = jax.lax.map(jax.checkpoint(piece), (cut(hidden), cut(tokens), jnp.arange(count)))
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length], found)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, back, axis=1), found)

    def prefill(
        self,
        batch: Batch,
        branches: int,
        room: int,
        starts: tuple[jax.Array, jax.Array] | None = None,
        dtype: str = "",
    ) -> tuple[jax.Array, KVCache]:
        """Runs the shared part of the rows once: the prompts, and responses that are to be continued.

            branch   0 0 0  1 1 1 1  2 2 2      the row: a prompt and two responses
            sees     x x x  x x - -  - - -      a sample that starts behind two tokens of response 1

        Args:
          batch: the rows.
          branches: K, how many samples will be decoded from each row.
          room: R, how many tokens a sample may add.
          starts: (parent int32[B, K], kept int32[B, K]): a sample goes on behind the first `kept` tokens of
            response `parent`; None, and 0 and 0, behind the prompt.
          dtype: of the cache, see `attention.stored`.

        Returns:
          hidden [B, K, D] at the token before each sample, and the cache with empty suffixes.
        """
        positions, _, mask = layers.row_layout(batch.branch)
        x = self.embed(batch.tokens, batch.image_index, batch.pixels)
        length = jnp.sum(batch.branch == 0, axis=1, dtype=jnp.int32)
        long = length > self.decoder.config.original_max_position
        attend = attention.row_attention(mask, keep=True)
        hidden, (k, v) = self.decoder.hidden(x, positions, long, attend)
        visible, last = (
            (batch.branch == 0)[:, None],
            jnp.broadcast_to(length[:, None] - 1, (len(x), branches)),
        )
        start = last + 1
        if starts is not None:
            parent, kept = starts
            own = (batch.branch[:, None] == parent[..., None]) & (parent > 0)[..., None]
            own &= jnp.arange(x.shape[1]) < (jnp.argmax(own, axis=-1) + kept)[..., None]
            visible, start = visible | own, start + kept
            last = jnp.where(kept > 0, own.shape[-1] - 1 - jnp.argmax(own[..., ::-1], axis=-1), last)
        before = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
        layers_, rows, groups, _, width = k.shape
        count, size = ring(room)

        def apart(x):  # the layers
            return [jax.tree.map(lambda x, i=i: x[i], attention.stored(x, dtype)) for i in range(layers_)]

        def turned(x):  # values [B, G, P, N] -> [B, G, N, P]; a scale stays
            return jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3) if x.ndim == 4 else x, x)

        def empty(x):
            axes = ("batch", None, "heads", None, "head_dim")
            return sharding.constrain(jnp.zeros(x.shape, x.dtype), axes[: x.ndim])

        shape = (rows, branches, groups, size, width)
        like = jax.eval_shape(lambda: attention.stored(jnp.zeros(shape, x.dtype), dtype))
        prefix = tuple(map(turned, apart(k))), tuple(apart(v))
        suffix = [
            tuple(tuple(jax.tree.map(empty, like) for _ in range(layers_)) for _ in range(count))
            for _ in "kv"
        ]
        age, clock = jnp.zeros(len(x), jnp.int32), jnp.zeros((), jnp.int32)
        return before, KVCache(prefix[0], prefix[1], visible, start, long, suffix[0], suffix[1], age, clock)

    def decoding(self) -> Callable[..., tuple[jax.Array, KVCache]]:
        """The decoding step, for loops that ask for it outside of them (see `layers.layers_of`): one token
        per branch, tokens int32[B, K], cache, chunks (see `layers.decode_hidden`) -> hidden [B, K, D] and
        the cache."""
        layer, embedding = layers.layers_of(self.decoder), self.decoder.embedding[...]

        def decode(tokens: jax.Array, cache: KVCache, chunks: int = 0) -> tuple[jax.Array, KVCache]:
            return layers.decode_hidden(self.decoder, layer, embedding[tokens], cache, chunks)

        return decode


class RewardModel(nnx.Module):
    """A process reward model: a policy as the trunk, and a score of what a branch holds up to each token,

        z_t = v . h_t / sqrt(D) + b + a sum_i<=t max(log p(token_i), -FLOOR)

    whose sigmoid at a step's last token is the step's score. h_t is the trunk's hidden state there and p the
    trunk's own prediction: a small head has to learn from few labels what a wrong step looks like, and a
    trunk that would not have written a step knows already. In a checkpoint the head is `score.weight` [1, D],
    `score.bias` [1] and `score.likelihood` [1].
    """

    FLOOR = 8.0  # nats: what one token can cost; several unlikely tokens are no worse than one impossible

    def __init__(self, trunk: VisionLanguageModel):
        """Starts from a policy: scores order responses as its likelihood does."""
        self.trunk = trunk
        self.weight = nnx.Param(jnp.zeros(trunk.decoder.config.hidden_size, jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((), jnp.float32), axes=())
        self.likelihood = nnx.Param(jnp.full((), 0.3, jnp.float32), axes=())

    def merged(self, dtype: Any = None) -> "RewardModel":
        """The same on the trunk's plain policy, see `VisionLanguageModel.merged`."""
        out = RewardModel(self.trunk.merged(dtype))
        for name in ("weight", "bias", "likelihood"):
            getattr(out, name)[...] = getattr(self, name)[...]
        return sharding.cast(out, dtype) if dtype else out

    def __call__(self, batch: Batch, remat=None) -> tuple[jax.Array, jax.Array]:
        """The score (a logit) after each token of the rows, and the token's log probability under the trunk;
        both float32[B, T], all branches in one pass."""
        _, predictor, _ = layers.row_layout(batch.branch)
        hidden = self.trunk.hidden(batch, remat)
        before = jnp.take_along_axis(hidden, predictor[..., None], axis=1)
        own = batch.branch > 0
        logprob = jnp.where(own, self.trunk.token_logprobs(before, batch.tokens, own)[0], 0.0)
        so_far = layers.branch_sum(jnp.maximum(logprob, -self.FLOOR), batch.branch)
        read = hidden.astype(jnp.float32) @ self.weight[...] * hidden.shape[-1] ** -0.5
        return read + self.bias[...] + self.likelihood[...] * so_far, logprob
