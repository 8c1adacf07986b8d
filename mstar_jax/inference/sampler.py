"""Rollouts: prefill a query once, decode its K branches against one shared prefix cache.

    slots      | row 7 | row 2  | row 9 | row 4  |     B rows are decoded in parallel
    free                   x                x          all K branches of rows 2 and 4 have ended
    entering   | row 7 | row 10 | row 9 | row 11 |     waiting rows are prefilled and take the free slots

A long response therefore does not delay the queries that wait. Shapes: B slots, E entering rows, K branches,
R response tokens, D model width.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mstar_jax import sharding
from mstar_jax.inference.draw import SamplingConfig, draw, stop_table, token_texts
from mstar_jax.structs import Batch, KVCache, Model, Processor, ScoringModel, ring

M = TypeVar("M", Model, ScoringModel)
Array = jax.Array | np.ndarray  # on the device, or on the host


class Generated(NamedTuple):
    """Sampled tokens.

    Attributes:
      tokens: int32[B, K, R].
      logprobs: float32[B, K, R], in nats.
      length: int32[B, K].
      stopped: bool[B, K], whether a stop id or stop string ended the branch; otherwise it was truncated.
    """

    tokens: Array
    logprobs: Array
    length: Array
    stopped: Array


class Slots(NamedTuple):
    """B rows on the device, each at its own point of decoding.

    Attributes:
      hidden: [B, K, D], predicts each branch's next token.
      cache: the keys and values.
      keys: uint32[B, K, ...], data of the samples' PRNG keys.
      limits: int32[B, K], the most tokens that a branch may add.
      done: bool[B, K], whether the branch has ended. A slot is free once all its branches have ended.
      states: int32[B, K] for each stop string, the state of its automaton.
      out: the tokens so far, in the same columns as in the cache.
    """

    hidden: jax.Array
    cache: KVCache
    keys: jax.Array
    limits: jax.Array
    done: jax.Array
    states: tuple[jax.Array, ...]
    out: Generated


class Entry(NamedTuple):
    """E rows that enter the slots.

    Attributes:
      batch: the rows.
      query_keys: uint32[E], folded into the samples' keys.
      limits: int32[E, K], the most tokens that a branch may add.
      sample_keys: uint32[E, K], folded into the samples' keys.
      starts: where samples start, see `VisionLanguageModel.prefill`; None for the end of the prompt.
      source: int32[B], the row that a slot takes, counted within the batch shard on the slot's device; -1
        keeps the slot as it is.
    """

    batch: Batch
    query_keys: Array
    limits: Array
    sample_keys: Array
    starts: tuple[Array, Array] | None
    source: Array


class Sampler:
    """Sampling, compiled for one set of static settings.

    A token is drawn with fold_in(key, query, sample, position). It does not depend on the slot, on the other
    slots, or on the number of devices.

    Attributes:
      config: the settings.
      slots: B.
      blank: `(model, batch, starts) -> Slots`: free slots for rows of the shapes of `batch`.
      enter: `(model, slots, key, entry) -> Slots`: prefills the rows of an `Entry` and puts them into slots.
        The given slots are donated.
      advance: `(model, slots, temperatures float32[K], free int32[], chunks) -> Slots`: decodes until `free`
        slots of each batch shard are free, the first chunk of the cache is full (see `KVCache`), or the rows
        need more than `chunks` chunks. Branch k samples at temperatures[k]. The given slots are donated.
    """

    def __init__(self, processor: Processor, config: SamplingConfig, slots: int, shards: int = 1):
        """Compiles nothing yet.

        Args:
          processor: the policy's processor.
          config: the settings.
          slots: B.
          shards: the number of shards of a batch, see `sharding.batch_shards`.
        """
        self.config = config
        self.slots = slots
        self.shards = shards
        self._forbidden = np.zeros(processor.vocab_size, bool)
        self._forbidden[list(processor.forbidden_ids)] = True
        self._stop_ids = np.asarray(processor.stop_ids, np.int32)
        texts = token_texts(processor) if config.stop_strings else []
        self._tables = [stop_table(texts, stop) for stop in config.stop_strings]
        self.blank = jax.jit(self._blank)
        self.enter = jax.jit(self._enter, donate_argnums=1)
        self.advance = jax.jit(self._advance, donate_argnums=1, static_argnames="chunks")

    def _prefilled(self, model, batch, keys, limits, starts) -> Slots:
        c = self.config
        hidden, cache = model.prefill(batch, c.branches, c.max_new_tokens, starts, c.cache)
        zero = jnp.zeros(limits.shape, jnp.int32)
        room = (*limits.shape, c.max_new_tokens)
        limits = jnp.minimum(limits, c.max_new_tokens)
        return Slots(
            hidden=hidden,
            cache=cache,
            keys=keys,
            limits=limits,
            done=limits <= 0,
            states=tuple(zero for _ in self._tables),
            out=Generated(
                tokens=jnp.zeros(room, jnp.int32),
                logprobs=jnp.zeros(room),
                length=zero,
                stopped=jnp.zeros(limits.shape, bool),
            ),
        )

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
        clock = NamedSharding(mesh, PartitionSpec())
        return found._replace(cache=found.cache._replace(clock=clock))  # type: ignore[arg-type]

    @staticmethod
    def _by_axes(fn: Callable[..., object], *slots: Slots) -> Slots:
        """Maps fn(arrays..., logical axes) over all arrays that have a row for each slot."""
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

    def _enter(self, model, slots: Slots, key: jax.Array, entry: Entry) -> Slots:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, entry.query_keys), entry.sample_keys)
        new = self._prefilled(model, entry.batch, jax.random.key_data(keys), entry.limits, entry.starts)
        source = jnp.reshape(entry.source, (self.shards, -1))

        def place(old, new, axes):  # every slot takes its row from its own shard of the batch
            parts = new.reshape(self.shards, -1, *new.shape[1:])
            picked = jax.vmap(lambda x, row: jnp.take(x, row, axis=0, mode="clip"))(parts, source)
            stay = (source < 0).reshape(-1, *(1,) * (old.ndim - 1))
            return sharding.constrain(jnp.where(stay, old, picked.reshape(old.shape)), axes)

        # a new row's age is 0, so it does not see the suffixes of the slot's previous row
        kept = {name: getattr(slots.cache, name) for name in ("suffix_k", "suffix_v", "clock")}
        placed = self._by_axes(place, slots, new._replace(cache=new.cache._replace(**kept)))
        return placed._replace(cache=placed.cache._replace(**kept))

    def chunks(self, ages: np.ndarray, clock: int) -> int:
        """The fewest chunks of the suffixes that rows of these ages need in the next step; 0 means
        all."""
        count, size = ring(self.config.max_new_tokens)
        missing = int(ages.max(initial=0)) - clock % size
        needed = 1 + max(-(-missing // size), 0)
        return needed if needed < count else 0

    def _advance(self, model, slots: Slots, temperatures, free, chunks: int = 0) -> Slots:
        c = self.config
        temperature = jnp.broadcast_to(temperatures, slots.done.shape)
        decode = model.decoding()

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

            def put(old, new):  # branches that have ended keep their tokens
                before = jax.lax.dynamic_index_in_dim(old, column, 2, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(old, jnp.where(done, before, new), column, 2)

            out = Generated(
                tokens=put(out.tokens, token),
                logprobs=put(out.logprobs, logprob),
                length=out.length + ~done,
                stopped=out.stopped | (stop & ~done),
            )
            ended = done | stop | (cache.age[:, None] + 1 >= limits)
            hidden, cache = decode(jnp.where(done, 0, token), ~ended, cache, chunks)
            return Slots(hidden, cache, keys, limits, ended, states, out)

        count, size = ring(c.max_new_tokens)
        full = (slots.cache.clock // size + 1) * size if count > 1 else jnp.iinfo(jnp.int32).max

        def waiting(slots: Slots):
            clock = slots.cache.clock
            ended = jnp.all(slots.done, axis=1)
            unfinished = (ended.reshape(self.shards, -1).sum(axis=1).min() < free) & (clock < full)
            if not chunks:
                return unfinished
            oldest = jnp.where(ended, 0, slots.cache.age).max()
            return unfinished & (oldest <= clock % size + (chunks - 1) * size)

        return jax.lax.while_loop(waiting, step, slots)


def for_sampling(params: M, mesh: Mesh, dtype: DTypeLike) -> M:
    """The model without adapters, in the SAMPLE layout and `dtype`: one transfer, no second float32 copy."""
    lower = params.merged(dtype)
    return jax.device_put(lower, sharding.shardings(lower, sharding.SAMPLE, mesh))
