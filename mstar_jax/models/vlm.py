"""What all policies share: a decoder whose prompt contains image features.

A family subclasses `VisionLanguageModel` and defines how pixels become a table of features
(`image_features`). The position of each feature in a row is decided on the host (`Batch.image_index`), so HD
layouts, tiles and slices are data, never shapes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mstar_jax import sharding
from mstar_jax.models import attention, layers
from mstar_jax.models.vision import VitConfig
from mstar_jax.structs import Batch, KVCache, ring

# Tokens of a row whose logits are in memory at the same time. A row that is no longer is cut into SHORT ones
# where the vocabulary has MANY tokens: logits that nobody wants cost a small model a fifth of its train step.
PIECE, SHORT, MANY = 512, 64, 10_000
Remat = Callable[..., Any]  # a `jax.checkpoint` policy


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Dimensions that every family has; a family's own config adds to them.

    Attributes:
      decoder, vision: the two transformers.
      num_crops: the most crops of an image, as the family counts them.
    """

    decoder: layers.DecoderConfig
    vision: VitConfig
    num_crops: int

    @property
    def most_crops(self) -> int:
        """The most crops of a prompt with one image: the families add the whole image to `num_crops`."""
        return self.num_crops + 1


class VisionLanguageModel(nnx.Module):
    """A decoder and image features; the module is itself the parameter pytree of a policy."""

    config: PolicyConfig
    decoder: layers.Decoder

    def __init__(self, config: PolicyConfig, rngs: nnx.Rngs):
        raise NotImplementedError

    def merged(self, dtype: DTypeLike | None = None) -> "VisionLanguageModel":
        """The equivalent policy without adapters, which are added into their weights.

        Args:
          dtype: of the parameters; None keeps each weight's own.
        """
        c = self.config.decoder
        if not c.lora_rank:
            return sharding.cast(self, dtype) if dtype else self
        weights = sharding.named(self)

        def take(path, _):
            name = sharding.parameter_name(path)
            weight = weights[name]
            a = weights.get(f"{name}_a")
            if a is None:
                return weight
            scale = c.lora_alpha / c.lora_rank
            return layers.merge(
                weight, a, weights[f"{name}_b"], scale=scale, dtype=jnp.dtype(dtype or weight.dtype)
            )

        plain = dataclasses.replace(self.config, decoder=dataclasses.replace(c, lora_rank=0))
        abstract = jax.eval_shape(lambda: type(self)(plain, nnx.Rngs(0)))
        out = jax.tree_util.tree_map_with_path(take, abstract)
        return sharding.cast(out, dtype) if dtype else out

    def image_features(self, pixels: jax.Array, remat: Remat | None = None) -> jax.Array:
        """Pixels (see `Batch`) -> feature table [B, F, D]; every family defines its own."""
        raise NotImplementedError

    def embed(
        self, tokens: jax.Array, image_index: jax.Array, pixels: jax.Array, remat: Remat | None = None
    ) -> jax.Array:
        """Token embeddings [B, T, D], with image features at the places given by `image_index`; wider where
        the features are, see `layers.Decoder.hidden`."""
        x = self.decoder.embedding[...][tokens]
        if jax.tree.leaves(pixels)[0].shape[1] == 0:  # a text-only batch
            return x
        with jax.named_scope("projector"):  # the tower's own scope, "vision", is inside
            features = self.image_features(sharding.cast(pixels, x.dtype), remat)
        picked = jnp.take_along_axis(features, jnp.maximum(image_index, 0)[..., None], axis=1)
        if picked.shape != x.shape:  # the features of images hold more than a text's embedding
            x = jnp.pad(x, ((0, 0), (0, 0), (0, picked.shape[-1] - x.shape[-1])))
        return jnp.where((image_index >= 0)[..., None], picked, x)

    def __call__(self, batch: Batch, remat: Remat | None = None) -> jax.Array:
        """hidden [B, T, D] that *predicts* each token of the rows (see `layers.row_layout`)."""
        _, predictor, _ = layers.row_layout(batch.branch)
        return jnp.take_along_axis(self.hidden(batch, remat), predictor[..., None], axis=1)

    def hidden(self, batch: Batch, remat: Remat | None = None) -> jax.Array:
        """hidden [B, T, D] *at* each token of the rows, of this token and all that it attends to."""
        positions, _, mask = layers.row_layout(batch.branch)
        x = self.embed(batch.tokens, batch.image_index, batch.pixels, remat)
        long = positions.max(axis=1) + 1 > self.decoder.config.original_max_position
        positions = positions if batch.positions is None else batch.positions
        attend = attention.row_attention(mask, keep=False)
        return self.decoder.hidden(x, positions, long, attend, remat=remat)[0]

    def judged(self, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, jax.Array]:
        """hidden [B, T, D] *at* each token of the rows, and the log probability of each token of a branch in
        nats, float32[B, T], 0 elsewhere."""
        _, predictor, _ = layers.row_layout(batch.branch)
        hidden = self.hidden(batch, remat)
        before = jnp.take_along_axis(hidden, predictor[..., None], axis=1)
        own = batch.branch > 0
        return hidden, jnp.where(own, self.token_logprobs(before, batch.tokens, own)[0], 0.0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V]."""
        return self.decoder.logits(hidden)

    def token_logprobs(
        self,
        hidden: jax.Array,
        tokens: jax.Array,
        wanted: jax.Array,
        temperature: jax.Array | None = None,
        forbidden: Sequence[int] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """Log probabilities of tokens, given the hidden states that predict them.

        Rows are processed in pieces, in the backward pass too, so that the logits [B, T, V] are never all in
        memory. Wanted tokens are moved to the front, and pieces without any are skipped.

        Args:
          hidden: [B, T, D].
          tokens: int32[B, T].
          wanted: bool[B, T]; results elsewhere are meaningless.
          temperature: float32[B], what the logits of a row are divided by; None for 1.
          forbidden: ids without probability, as the sampler has them.

        Returns:
          float32[B, T] log probability in nats, and bool[B, T] whether it is the likeliest token.
        """

        def read(hidden, tokens):
            logits = self.logits(hidden)
            if forbidden:
                logits = jnp.where(np.isin(np.arange(logits.shape[-1]), forbidden), -jnp.inf, logits)
            if temperature is not None:
                logits = logits / temperature[:, None, None]
            target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == tokens

        def nothing(hidden, tokens):
            return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, bool)

        length, many = tokens.shape[1], self.decoder.config.vocab_size >= MANY
        count = -(-length // (SHORT if many and length <= PIECE else PIECE))
        if count <= 1:
            return read(hidden, tokens)
        order = jnp.argsort(~wanted, axis=1, stable=True)
        size = -(-length // count)

        def split(x):  # [B, T, ...] -> [count, B, T / count, ...], wanted tokens first
            x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
            x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

        def piece(part):
            hidden, tokens, number = part
            return jax.lax.cond(number * size < most, read, nothing, hidden, tokens)

        most = wanted.sum(axis=1).max()
        inverse = jnp.argsort(order, axis=1)
        found = jax.lax.map(jax.checkpoint(piece), (split(hidden), split(tokens), jnp.arange(count)))
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length], found)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, inverse, axis=1), found)

    def prefill(
        self,
        batch: Batch,
        branches: int,
        places: int,
        room: int,
        starts: tuple[jax.Array, jax.Array] | None = None,
        dtype: str = "",
    ) -> tuple[jax.Array, KVCache]:
        """Runs the shared part of the rows once: the prompts, and any responses that samples continue.

            branch   0 0 0  1 1 1 1  2 2 2      the row: a prompt and two responses
            sees     x x x  x x - -  - - -      a sample that continues the first two tokens of response 1

        Args:
          batch: the rows.
          branches: K, the number of samples that will be decoded from each row.
          places: M, how many of them will be decoded at a time.
          room: R, the most tokens that a sample may add.
          starts: (parent int32[B, K], kept int32[B, K]): a sample continues the first `kept` tokens of
            response `parent`. None, or 0 and 0, continues the prompt.
          dtype: of the cache, see `attention.stored`.

        Returns:
          hidden [B, K, D] at the token before each sample, and the cache with empty suffixes; its `visible`
          and `start` are of all K samples.
        """
        positions, _, mask = layers.row_layout(batch.branch)
        x = self.embed(batch.tokens, batch.image_index, batch.pixels)
        length = jnp.sum(batch.branch == 0, axis=1, dtype=jnp.int32)
        long = length > self.decoder.config.original_max_position
        attend = attention.row_attention(mask, keep=True)
        positions = positions if batch.positions is None else batch.positions
        hidden, (k, v) = self.decoder.hidden(x, positions, long, attend)
        visible = (batch.branch == 0)[:, None]
        last = jnp.broadcast_to(length[:, None] - 1, (len(x), branches))
        start = last + 1
        if batch.positions is not None:  # an image takes fewer positions than tokens
            greatest = jnp.where(batch.branch == 0, positions.max(axis=1), -1).max(axis=1, keepdims=True)
            start = jnp.broadcast_to(greatest + 1, start.shape)
        if starts is not None:
            parent, kept = starts
            own = (batch.branch[:, None] == parent[..., None]) & (parent > 0)[..., None]
            own &= jnp.arange(x.shape[1]) < (jnp.argmax(own, axis=-1) + kept)[..., None]
            visible = visible | own
            start = start + kept
            last = jnp.where(kept > 0, own.shape[-1] - 1 - jnp.argmax(own[..., ::-1], axis=-1), last)
        before = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
        depth, rows, groups, _, width = k.shape
        count, size = ring(room)

        def by_layer(x):
            return [jax.tree.map(lambda x, i=i: x[i], attention.stored(x, dtype)) for i in range(depth)]

        def transposed(x):  # keys [B, G, P, N] -> [B, G, N, P]; a scale [B, G, P] stays as it is
            return jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3) if x.ndim == 4 else x, x)

        def empty(x):
            axes = ("batch", None, "heads", None, "head_dim")
            return sharding.constrain(jnp.zeros(x.shape, x.dtype), axes[: x.ndim])

        shape = (rows, places, groups, size, width)
        like = jax.eval_shape(lambda: attention.stored(jnp.zeros(shape, x.dtype), dtype))

        def empty_suffix():
            return tuple(tuple(jax.tree.map(empty, like) for _ in range(depth)) for _ in range(count))

        cache = KVCache(
            prefix_k=tuple(map(transposed, by_layer(k))),
            prefix_v=tuple(by_layer(v)),
            visible=visible,
            start=start,
            long=long,
            suffix_k=empty_suffix(),
            suffix_v=empty_suffix(),
            age=jnp.zeros((rows, places), jnp.int32),
            clock=jnp.zeros((), jnp.int32),
        )
        return before, cache

    def decoding(self) -> Callable[..., tuple[jax.Array, KVCache]]:
        """The decoding step for one token of each place; get it outside of the loop (see
        `layers.layers_of`).

        Returns:
          A function of tokens int32[B, M], `live` bool[B, M], the cache and `chunks` (see
          `layers.decode_hidden`). It returns hidden [B, M, D] and the cache with these tokens.
        """
        layer = layers.layers_of(self.decoder)
        embedding = self.decoder.embedding[...]

        def decode(
            tokens: jax.Array, live: jax.Array, cache: KVCache, chunks: int = 0
        ) -> tuple[jax.Array, KVCache]:
            return layers.decode_hidden(self.decoder, layer, embedding[tokens], live, cache, chunks)

        return decode


class RewardModel(nnx.Module):
    """A process reward model: a policy as the trunk, and a head that scores a branch up to each token,

        z_t = v . h_t / sqrt(D) + b + a sum_i<=t max(log p(token_i), -FLOOR).

    The sigmoid of z at a step's last token is the step's score. h_t is the trunk's hidden state there and p
    the trunk's own prediction. The likelihood term is there because the head learns from few labels, and a
    trunk that finds a step unlikely already knows something about it. In a checkpoint the head is
    `score.weight` [1, D], `score.bias` [1] and `score.likelihood` [1].
    """

    FLOOR = 8.0  # nats; the most that a single token can lower the score, however unlikely it is

    def __init__(self, trunk: VisionLanguageModel):
        """A reward model whose scores initially rank responses by their likelihood under the policy."""
        self.trunk = trunk
        # made on the host, where they need no programs
        width = trunk.decoder.config.hidden_size
        self.weight = nnx.Param(jax.device_put(np.zeros(width, np.float32)), axes=("embed",))
        self.bias = nnx.Param(jax.device_put(np.zeros((), np.float32)), axes=())
        self.likelihood = nnx.Param(jax.device_put(np.full((), 0.3, np.float32)), axes=())

    def merged(self, dtype: DTypeLike | None = None) -> "RewardModel":
        """The equivalent model whose trunk has no adapters, see `VisionLanguageModel.merged`."""
        out = RewardModel(self.trunk.merged(dtype))
        for name in ("weight", "bias", "likelihood"):
            setattr(out, name, getattr(self, name))
        return sharding.cast(out, dtype) if dtype else out

    def __call__(self, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, jax.Array]:
        """Scores all branches in one pass.

        Returns:
          The score (a logit) after each token of the rows, and the token's log probability in nats under the
          trunk; both float32[B, T].
        """
        hidden, logprob = self.trunk.judged(batch, remat)
        so_far = layers.branch_sum(jnp.maximum(logprob, -self.FLOOR), batch.branch)
        read = hidden.astype(jnp.float32) @ self.weight[...] * hidden.shape[-1] ** -0.5
        return read + self.bias[...] + self.likelihood[...] * so_far, logprob


class TokenRewardModel(nnx.Module):
    """A process reward model without a head: a policy that was trained to write a token after every step.

    The score of a step is the probability of the token `good` after it: among the tokens `good` and `bad`, or
    in the whole vocabulary where `bad` is None.
    """

    def __init__(self, trunk: VisionLanguageModel, good: int, bad: int | None = None):
        self.trunk, self.good, self.bad = trunk, good, bad

    def merged(self, dtype: DTypeLike | None = None) -> "TokenRewardModel":
        """The equivalent model whose trunk has no adapters, see `VisionLanguageModel.merged`."""
        return TokenRewardModel(self.trunk.merged(dtype), self.good, self.bad)

    def __call__(self, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, jax.Array]:
        """Scores all branches in one pass.

        Returns:
          The log-odds of the good token after each token of the rows that has a label (`batch.labels`), and
          each token's log probability in nats under the trunk; both float32[B, T].
        """
        hidden, logprob = self.trunk.judged(batch, remat)

        def of(token: int) -> jax.Array:
            tokens = jnp.full_like(batch.tokens, token)
            return self.trunk.token_logprobs(hidden, tokens, batch.labels >= 0)[0]

        good = of(self.good)
        if self.bad is not None:
            return good - of(self.bad), logprob
        others = jnp.log(-jnp.expm1(jnp.minimum(good, -(2.0**-24))))  # float32's least distance from 1
        return good - others, logprob
