"""Rollouts: prefill a query once, decode its K branches against the one shared prefix cache.

    slots      | row 7 | row 2  | row 9 | row 4  |     B rows are decoded side by side
    free                   x                x          all K branches of rows 2 and 4 have ended
    entering   | row 7 | row 10 | row 9 | row 11 |     rows that waited are prefilled and take their slots

so that one long response does not keep the device from the queries that wait. Shapes: B slots, E entering
rows, K branches, R response tokens, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mstar_jax import sharding
from mstar_jax.inference.draw import SamplingConfig, draw, stop_table, token_texts
from mstar_jax.structs import Batch, KVCache, Model, Processor, ScoringModel, ring

M = TypeVar("M", Model, ScoringModel)


class Generated(NamedTuple):
    """tokens int32[B, K, R], logprobs float32[B, K, R], length int32[B, K], stopped bool[B, K] (a stop id or
    stop string ended it; otherwise it was truncated)."""

    tokens: jax.Array | np.ndarray
    logprobs: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    stopped: jax.Array | np.ndarray


class Slots(NamedTuple):
    """B rows on the device, each somewhere in its responses.

    Attributes:
      hidden: [B, K, D] that predicts the branches' next token.
      cache: the keys and values.
      keys: uint32[B, K, ...], the data of the samples' PRNG keys.
      limits: int32[B, K]; tokens that a branch may add.
      done: bool[B, K]; the branch has ended. A row whose branches all have ended is free.
      states: int32[B, K] of every stop string's automaton.
      out: what the branches hold; a row's tokens lie in the same columns as in the cache.
    """

    hidden: jax.Array
    cache: KVCache
    keys: jax.Array
    limits: jax.Array
    done: jax.Array
    states: tuple[jax.Array, ...]
    out: Generated


class Sampler:
    """Sampling compiled for one set of static settings.

    A token is drawn with fold_in(key, query, sample, position): it does not depend on the slot, on what the
    other slots hold, or on the number of devices.

    Attributes:
      config: the settings.
      slots: B.
      blank: `(model, batch, starts) -> Slots`, all free, for rows of the shapes of `batch`.
      enter: `(model, slots, batch of E rows, query_keys uint32[E], key, limits int32[E, K], sample_keys
        uint32[E, K], starts or None, source int32[B]) -> Slots`. Prefills the rows (see
        `VisionLanguageModel.prefill` for starts). Where source is not -1 a slot takes the row of this number,
        counted within the part of the batch that lies on the slot's device. The slots given are donated.
      advance: `(model, slots, temperatures float32[K], free int32[], chunks) -> Slots`. Decodes until so many
        slots of each part of the batch are free, or the first chunk of the cache is full (see
        `KVCache.rotated`), or the rows need more than the given number of chunks (see `chunks`). Branch k
        samples at temperatures[k]. The slots are donated.
    """

    def __init__(self, processor: Processor, config: SamplingConfig, slots: int, shards: int = 1):
        """Compiles nothing yet.

        Args:
          processor: the family's host side.
          config: the settings.
          slots: B.
          shards: in how many parts the mesh cuts a batch, see `sharding.batch_shards`.
        """
        self.config, self.slots, self.shards = config, slots, shards
        self._forbidden = np.zeros(processor.vocab_size, bool)
        self._forbidden[list(processor.forbidden_ids)] = True
        self._stop_ids = np.asarray(processor.stop_ids, np.int32)
        texts = token_texts(processor) if config.stop_strings else []
        self._tables = [stop_table(texts, stop) for stop in config.stop_strings]
        self.blank = jax.jit(self._blank)
        self.enter = jax.jit(self._enter, donate_argnums=1)
        self.advance = jax.jit(self._advance, donate_argnums=1, static_argnames="chunks")

    def _prefilled(self, model, batch, keys, limits, starts) -> Slots:
        c, shape = self.config, limits.shape
        hidden, cache = model.prefill(batch, c.branches, c.max_new_tokens, starts, c.cache)
        zero, room = jnp.zeros(shape, jnp.int32), (*shape, c.max_new_tokens)
        out = Generated(jnp.zeros(room, jnp.int32), jnp.zeros(room), zero, jnp.zeros(shape, bool))
        limits = jnp.minimum(limits, c.max_new_tokens)
        return Slots(hidden, cache, keys, limits, limits <= 0, tuple(zero for _ in self._tables), out)

    def _blank(self, model, batch, starts) -> Slots:
        shape = len(batch.tokens), self.config.branches
        keys = jax.random.key_data(jax.vmap(jax.vmap(jax.random.key))(jnp.zeros(shape, jnp.uint32)))
        limits = jnp.zeros(shape, jnp.int32)
        like = jax.eval_shape(self._prefilled, model, batch, keys, limits, starts)

        def empty(x, axes):
            return sharding.constrain(jnp.zeros((self.slots, *x.shape[1:]), x.dtype), axes)

        slots = self._by_axes(empty, like)
        done = jnp.ones_like(slots.done)
        return slots._replace(done=done, cache=slots.cache._replace(clock=jnp.zeros((), jnp.int32)))

    def layout(self, slots: Slots, mesh: Mesh) -> Slots:
        """The sharding of every array of the slots."""

        def one(x, axes):
            return NamedSharding(mesh, sharding.spec(axes, sharding.SAMPLE, x.shape, mesh))

        found = self._by_axes(one, slots)
        clock: Any = NamedSharding(mesh, PartitionSpec())
        return found._replace(cache=found.cache._replace(clock=clock))

    @staticmethod
    def _by_axes(fn: Callable[..., Any], *slots: Slots) -> Slots:
        """Maps over all that has a row for each slot: fn(arrays..., logical axes)."""
        heads = {"prefix_k": 1, "prefix_v": 1, "suffix_k": 2, "suffix_v": 2}

        def over(tree, field=""):
            def one(*x):
                axes = ["batch", *[None] * (x[0].ndim - 1)]
                if field in heads:
                    axes[heads[field]] = "heads"
                return fn(*x, tuple(axes))

            return jax.tree.map(one, *tree)

        caches = [s.cache for s in slots]
        fields = [name for name in KVCache._fields if name != "clock"]
        cache = {name: over([getattr(c, name) for c in caches], name) for name in fields}
        others = {name: over([getattr(s, name) for s in slots]) for name in Slots._fields if name != "cache"}
        return Slots(**others, cache=KVCache(**cache, clock=caches[0].clock))

    def _enter(
        self, model, slots, batch: Batch, query_keys, key, limits, sample_keys, starts, source
    ) -> Slots:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, query_keys), sample_keys)
        new = self._prefilled(model, batch, jax.random.key_data(keys), limits, starts)
        source = source.reshape(self.shards, -1)

        def place(old, new, axes):  # every slot takes its row from its own part of the batch
            parts = new.reshape(self.shards, -1, *new.shape[1:])
            picked = jax.vmap(lambda x, row: jnp.take(x, row, axis=0, mode="clip"))(parts, source)
            stay = (source < 0).reshape(-1, *(1,) * (old.ndim - 1))
            return sharding.constrain(jnp.where(stay, old, picked.reshape(old.shape)), axes)

        # a new row sees nothing of the suffixes and of what the slot's last row said
        kept = {name: getattr(slots.cache, name) for name in ("suffix_k", "suffix_v", "clock")}
        placed = self._by_axes(place, slots, new._replace(cache=new.cache._replace(**kept)))
        return placed._replace(cache=placed.cache._replace(**kept))

    def chunks(self, ages: np.ndarray, clock: int) -> int:
        """The fewest chunks of the suffixes that rows of these ages need in the next step; 0 for all."""
        count, size = ring(self.config.max_new_tokens)
        missing = int(ages.max(initial=0)) - clock % size
        needed = 1 + max(-(-missing // size), 0)
        return needed if needed < count else 0

    def _advance(self, model, slots: Slots, temperatures, free, chunks: int = 0) -> Slots:
        c = self.config
        temperature, decode = jnp.broadcast_to(temperatures, slots.done.shape), model.decoding()

        def uniform(key, position):
            return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))

        def step(slots: Slots) -> Slots:
            hidden, cache, keys, limits, done, states, out = slots
            column = cache.clock % c.max_new_tokens
            drawn = jax.vmap(jax.vmap(uniform, (0, None)))(keys, cache.age)
            logits = jnp.where(self._forbidden, -jnp.inf, model.logits(hidden))
            token, logprob = draw(logits, drawn, temperature, c)
            states = tuple(jnp.asarray(t)[state, token] for t, state in zip(self._tables, states))
            stop = jnp.isin(token, self._stop_ids)
            for table, state in zip(self._tables, states):
                stop |= state == table.shape[0] - 1

            def put(old, new):  # what has ended stays as it is, wherever the ring stands now
                before = jax.lax.dynamic_index_in_dim(old, column, 2, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(old, jnp.where(done, before, new), column, 2)

            tokens, logprobs = put(out.tokens, token), put(out.logprobs, logprob)
            out = Generated(tokens, logprobs, out.length + ~done, out.stopped | (stop & ~done))
            ended = done | stop | (cache.age[:, None] + 1 >= limits)
            hidden, cache = decode(jnp.where(done, 0, token), cache, chunks)
            return Slots(hidden, cache, keys, limits, ended, states, out)

        count, size = ring(c.max_new_tokens)
        full = (slots.cache.clock // size + 1) * size if count > 1 else jnp.iinfo(jnp.int32).max

        def waiting(slots: Slots):
            clock, ended = slots.cache.clock, jnp.all(slots.done, axis=1)
            go_on = (ended.reshape(self.shards, -1).sum(axis=1).min() < free) & (clock < full)
            if not chunks:
                return go_on
            oldest = jnp.where(ended, 0, slots.cache.age).max()
            return go_on & (oldest <= clock % size + (chunks - 1) * size)

        return jax.lax.while_loop(waiting, step, slots)


def for_sampling(params: M, mesh: Mesh, dtype: DTypeLike) -> M:
    """The plain model's weights in the SAMPLE layout and dtype; one transfer, no second master copy."""
    lower = params.merged(dtype)
    return jax.device_put(lower, sharding.shardings(lower, sharding.SAMPLE, mesh))
