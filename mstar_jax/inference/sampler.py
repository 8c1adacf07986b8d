"""Rollouts: prefill a query once, decode its K samples against one shared prefix cache.

    slots      | row 7 | row 2  | row 9 | row 4  |     B rows are decoded in parallel
    free                   x                x          all K samples of rows 2 and 4 have ended
    entering   | row 7 | row 10 | row 9 | row 11 |     waiting rows are prefilled and take the free slots

A row decodes M of its samples at a time; when one ends, the next one starts in its place.

    place 0    | sample 0     | sample 3  |            M = 3, K = 5: the row ends with its last sample
    place 1    | sample 1                     |
    place 2    | sample 2  | sample 4       |

A long response therefore delays neither the samples nor the queries that wait. Shapes: B slots, E entering
rows, K samples, M places, R response tokens, D model width.
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
      stopped: bool[B, K], whether a stop id or stop string ended the sample; otherwise it was truncated.
    """

    tokens: Array
    logprobs: Array
    length: Array
    stopped: Array


class Slots(NamedTuple):
    """B rows on the device, each at its own point of decoding.

    Attributes:
      hidden: [B, M, D], predicts the next token of the sample in each place.
      cache: the keys and values.
      sample: int32[B, M], which one is in each place.
      first: [B, K, D], predicts each sample's first token.
      visible, start: of all samples, bool[B, K or 1, P] and int32[B, K]; see `KVCache`.
      keys: uint32[B, K, ...], data of the samples' PRNG keys.
      limits: int32[B, K], the most tokens that a sample may add.
      queue: int32[B, K], the row's samples in the order in which they start.
      started: int32[B], how many have.
      done: bool[B, M], whether the sample in a place has ended and none is left that could follow. A slot is
        free once this is so of all its places.
      states: int32[B, M] for each stop string, the state of its automaton.
      out: the tokens so far.
    """

    hidden: jax.Array
    cache: KVCache
    sample: jax.Array
    first: jax.Array
    visible: jax.Array
    start: jax.Array
    keys: jax.Array
    limits: jax.Array
    queue: jax.Array
    started: jax.Array
    done: jax.Array
    states: tuple[jax.Array, ...]
    out: Generated


class Entry(NamedTuple):
    """E rows that enter the slots.

    Attributes:
      batch: the rows.
      query_keys: uint32[E], folded into the samples' keys.
      limits: int32[E, K], the most tokens that a sample may add.
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

    A token is drawn with fold_in(key, query, sample, position). It does not depend on the slot or the place,
    on others, or on the number of devices.

    Attributes:
      config: the settings.
      slots: B.
      blank: `(model, batch, starts) -> Slots`: free slots for rows of the shapes of `batch`.
      enter: `(model, slots, key, entry) -> Slots`: prefills the rows of an `Entry` and puts them into slots.
        The given slots are donated.
      advance: `(model, slots, temperatures float32[K], free int32[], chunks) -> Slots`: decodes until `free`
        slots of each batch shard are free, the first chunk of the cache is full (see `KVCache`), or samples
        need more than `chunks` chunks. Sample k is drawn at temperatures[k]. The given slots are donated.
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
        first, cache = model.prefill(batch, c.branches, c.places, c.max_new_tokens, starts, c.cache)
        room = (*limits.shape, c.max_new_tokens)
        limits = jnp.minimum(limits, c.max_new_tokens)
        queue = jnp.broadcast_to(jnp.arange(c.branches, dtype=jnp.int32), limits.shape)
        if c.places < c.branches:  # those that may be longest first; those that may add nothing come last
            queue = jnp.argsort(-limits, axis=1, stable=True).astype(jnp.int32)
        sample = queue[:, : c.places]
        return Slots(
            hidden=_of_places(first, sample),
            cache=cache._replace(
                visible=_of_places(cache.visible, sample), start=_of_places(cache.start, sample)
            ),
            sample=sample,
            first=first,
            visible=cache.visible,
            start=cache.start,
            keys=keys,
            limits=limits,
            queue=queue,
            started=jnp.full(len(limits), c.places, jnp.int32),
            done=_of_places(limits, sample) <= 0,
            states=tuple(jnp.zeros_like(sample) for _ in self._tables),
            out=Generated(
                tokens=jnp.zeros(room, jnp.int32),
                logprobs=jnp.zeros(room),
                length=jnp.zeros(limits.shape, jnp.int32),
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

        # a new sample's age is 0, so it does not see the suffixes of the place's previous one
        kept = {name: getattr(slots.cache, name) for name in ("suffix_k", "suffix_v", "clock")}
        placed = self._by_axes(place, slots, new._replace(cache=new.cache._replace(**kept)))
        return placed._replace(cache=placed.cache._replace(**kept))

    def chunks(self, ages: np.ndarray, clock: int) -> int:
        """The fewest chunks of the suffixes that samples of these ages need in the next step; 0 means
        all."""
        count, size = ring(self.config.max_new_tokens)
        missing = int(ages.max(initial=0)) - int(clock) % size  # to jit, NumPy's 1 is not 1
        needed = 1 + max(-(-missing // size), 0)
        return needed if needed < count else 0

    def _advance(self, model, slots: Slots, temperatures, free, chunks: int = 0) -> Slots:
        c = self.config
        temperatures = jnp.broadcast_to(temperatures, slots.limits.shape)
        decode = model.decoding()

        def uniform(key, position):
            return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), position))

        def step(slots: Slots) -> Slots:
            cache, sample, done = slots.cache, slots.sample, slots.done
            drawn = jax.vmap(jax.vmap(uniform))(_of_places(slots.keys, sample), cache.age)
            logits = jnp.where(self._forbidden, -jnp.inf, model.logits(slots.hidden))
            token, logprob = draw(logits, drawn, _of_places(temperatures, sample), c)
            states = tuple(jnp.asarray(t)[state, token] for t, state in zip(self._tables, slots.states))
            stop = jnp.isin(token, self._stop_ids)
            for table, state in zip(self._tables, states):
                stop |= state == table.shape[0] - 1
            out = _written(slots.out, sample, ~done, token, logprob, stop)
            ended = done | stop | (cache.age + 1 >= _of_places(slots.limits, sample))
            hidden, cache = decode(jnp.where(done, 0, token), ~ended, cache, chunks)
            slots = slots._replace(hidden=hidden, cache=cache, done=ended, states=states, out=out)
            return slots if c.places == c.branches else _followed(slots)

        count, size = ring(c.max_new_tokens)
        full = (slots.cache.clock // size + 1) * size if count > 1 else jnp.iinfo(jnp.int32).max

        def waiting(slots: Slots):
            clock = slots.cache.clock
            ended = jnp.all(slots.done, axis=1)
            unfinished = (ended.reshape(self.shards, -1).sum(axis=1).min() < free) & (clock < full)
            if not chunks:
                return unfinished
            oldest = jnp.where(slots.done, 0, slots.cache.age).max()
            return unfinished & (oldest <= clock % size + (chunks - 1) * size)

        return jax.lax.while_loop(waiting, step, slots)


def _of_places(x: jax.Array, sample: jax.Array) -> jax.Array:
    """[B, M or 1, ...] of the samples in the places, from [B, K or 1, ...] of all samples."""
    if x.shape[1] in (1, sample.shape[1]):  # the same of all samples; or each of them has its own place
        return x
    return jax.vmap(lambda x, sample: x[sample])(x, sample)


def _written(
    out: Generated, sample: jax.Array, live: jax.Array, token: jax.Array, logprob: jax.Array, stop: jax.Array
) -> Generated:
    """`out` with a token of each live place, [B, M] each. No scatter: what is added to is small."""
    if token.shape != out.length.shape:  # [B, M] -> [B, K]
        here = (sample[:, None] == jnp.arange(out.length.shape[1])[:, None]) & live[:, None]
        live, stop = here.any(axis=2), (here & stop[:, None]).any(axis=2)
        token, logprob = (jnp.where(here, x[:, None], 0).sum(axis=2) for x in (token, logprob))
    new = live[..., None] & (jnp.arange(out.tokens.shape[2]) == out.length[..., None])
    return Generated(
        tokens=jnp.where(new, token[..., None], out.tokens),
        logprobs=jnp.where(new, logprob[..., None], out.logprobs),
        length=out.length + live,
        stopped=out.stopped | (stop & live),
    )


def _followed(slots: Slots) -> Slots:
    """Where a sample has ended, the row's next one starts; of those that may add nothing, none is live."""
    at = slots.started[:, None] + jnp.cumsum(slots.done, axis=1) - 1  # in the queue, one for each such place
    there = slots.done & (at < slots.queue.shape[1])
    following = jnp.take_along_axis(slots.queue, at, axis=1, mode="clip")
    sample = jnp.where(there, following, slots.sample)
    cache = slots.cache._replace(
        visible=_of_places(slots.visible, sample),
        start=_of_places(slots.start, sample),
        age=jnp.where(there, 0, slots.cache.age),
    )
    return slots._replace(
        hidden=jnp.where(there[..., None], _of_places(slots.first, sample), slots.hidden),
        cache=cache,
        sample=sample,
        started=slots.started + there.sum(axis=1),
        done=slots.done & ~(there & (_of_places(slots.limits, sample) > 0)),
        states=tuple(jnp.where(there, 0, state) for state in slots.states),
    )


def for_sampling(params: M, mesh: Mesh, dtype: DTypeLike) -> M:
    """The model without adapters, in the SAMPLE layout and `dtype`: one transfer, no second float32 copy."""
    lower = params.merged(dtype)
    return jax.device_put(lower, sharding.shardings(lower, sharding.SAMPLE, mesh))
