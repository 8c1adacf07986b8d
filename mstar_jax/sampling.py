"""Rollouts: prefill a query once, decode its K branches against the one shared prefix cache.

Shapes: B queries, K branches, R response tokens, V vocabulary, D model width.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import processes, sharding
from mstar_jax.structs import Batch, Response, Row


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a branch is continued; the temperature is an argument of each call, so it never recompiles.

    Attributes:
      branches: K, responses per query.
      max_new_tokens: length cap R; a branch that meets it is reported as truncated.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
      min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
      stop_strings: a branch ends once its text contains one of these; the text is cut before it.
    """

    branches: int
    max_new_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        if self.branches < 1 or self.max_new_tokens < 1:
            raise ValueError(f"branches and max_new_tokens must be at least 1, got {self}")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.top_k >= 0):
            raise ValueError(f"need 0 < top_p <= 1, 0 <= min_p <= 1 and top_k >= 0, got {self}")
        if any(not stop for stop in self.stop_strings):
            raise ValueError("an empty stop string would end every response at once")


class Generated(NamedTuple):
    """tokens int32[B, K, R], logprobs float32[B, K, R] (0 past the end), length int32[B, K],
    stopped bool[B, K] (a stop id or stop string ended it; otherwise it was truncated)."""

    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array
    stopped: jax.Array


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Sets the logits [..., V] that top-k, top-p and min-p exclude to -inf, in this order."""
    if config.top_k and config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        # a token stays while the mass before it is under top_p, so the likeliest always stays
        keep = jnp.cumsum(probs, axis=-1) - probs < config.top_p
        least = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0.0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, uniform: jax.Array, temperature: jax.Array, config: SamplingConfig):
    """Draws a token per row by inverting the cumulative distribution.

    Args:
      logits: float32[..., V].
      uniform: float32[...] in [0, 1): the one random number that a token costs.
      temperature: float32[...]; 0 is greedy.

    Returns:
      tokens int32[...] and their log probability under the distribution sampled from (for greedy rows:
      under the untempered one).
    """
    greedy = temperature <= 0.0
    logits = filter_logits(logits / jnp.where(greedy, 1.0, temperature)[..., None], config)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    # a parallel cumulative sum is not monotone to the last bit: without the mask a token of no
    # probability (a forbidden one) could be drawn
    mass = jnp.where(probs > 0.0, jnp.cumsum(probs, axis=-1), 0.0)
    drawn = jnp.argmax(mass > uniform[..., None] * mass.max(axis=-1, keepdims=True), axis=-1)
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def stop_table(text_of_token: list[str], stop: str) -> np.ndarray:
    """Automaton that finds `stop` in text made of tokens.

    Args:
      text_of_token: what each id adds to a text.
      stop: the string to find.

    Returns:
      int32[len(stop) + 1, V]: the state after a token; a state is how many characters of `stop` the
      text ends with, the last one means found and is never left.
    """
    fallback = [0] * (len(stop) + 1)  # Knuth-Morris-Pratt
    for i in range(1, len(stop)):
        state = fallback[i]
        while state and stop[i] != stop[state]:
            state = fallback[state]
        fallback[i + 1] = state + (stop[i] == stop[state])
    table = np.zeros((len(stop) + 1, len(text_of_token)), np.int32)
    for start in range(len(stop) + 1):
        for token, text in enumerate(text_of_token):
            state = start
            for character in text:
                if state == len(stop):
                    break
                while state and character != stop[state]:
                    state = fallback[state]
                state += character == stop[state]
            table[start, token] = state
    return table


def token_texts(processor: Any) -> list[str]:
    """What each id adds to a text, as `decode` shows it after another token."""
    anchor = processor.encode_response("a")[:-1]
    before = processor.decode(anchor)
    return [processor.decode([*anchor, token])[len(before) :] for token in range(processor.vocab_size)]


def query_key(query_id: str) -> int:
    """A query's 32-bit key; it depends on the id alone."""
    return zlib.crc32(query_id.encode())


def make_generate(processor: Any, config: SamplingConfig) -> Callable[..., Generated]:
    """Compiles sampling for one set of static settings.

    Returns:
      `generate(model, batch, query_keys uint32[B], key, temperatures float32[K], limits int32[B, K],
      sample_keys uint32[B, K] = 0..K-1, starts = None)`. Branch k samples at temperatures[k] and adds at most
      limits[b, k] tokens to what it starts behind (see `VisionLanguageModel.prefill`). A token is drawn with
      fold_in(key, query, sample, position): it does not depend on the batch, on the slot in it, or on the
      number of devices.
    """
    forbidden = np.zeros(processor.vocab_size, bool)
    forbidden[list(processor.forbidden_ids)] = True
    stop_ids = np.asarray(processor.stop_ids, np.int32)
    texts = token_texts(processor) if config.stop_strings else []
    tables = [stop_table(texts, stop) for stop in config.stop_strings]
    room = config.max_new_tokens

    def generate(
        model, batch: Batch, query_keys, key, temperatures, limits, sample_keys=None, starts=None
    ) -> Generated:
        rows, branches = batch.tokens.shape[0], config.branches
        if sample_keys is None:
            sample_keys = jnp.broadcast_to(jnp.arange(branches), (rows, branches))
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, query_keys), sample_keys)
        temperature = jnp.broadcast_to(temperatures, (rows, branches))
        hidden, cache = model.prefill(batch, branches, room, starts)

        def step(carry):
            index, hidden, cache, out, done, states = carry
            uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, index))))(keys)
            logits = jnp.where(forbidden, -jnp.inf, model.logits(hidden))
            token, logprob = draw(logits, uniform, temperature, config)
            token, logprob = jnp.where(done, 0, token), jnp.where(done, 0.0, logprob)
            states = [jnp.asarray(table)[state, token] for table, state in zip(tables, states)]
            stop = jnp.isin(token, stop_ids)
            for table, state in zip(tables, states):
                stop |= state == table.shape[0] - 1
            out = Generated(
                out.tokens.at[:, :, index].set(token),
                out.logprobs.at[:, :, index].set(logprob),
                out.length + ~done,
                out.stopped | (stop & ~done),
            )
            done = done | stop | (index + 1 >= limits)
            hidden, cache = model.decode(token, cache, index)
            return index + 1, hidden, cache, out, done, states

        def running(carry):
            index, _, _, _, done, _ = carry
            return (index < room) & ~jnp.all(done)

        empty = Generated(
            jnp.zeros((rows, branches, room), jnp.int32),
            jnp.zeros((rows, branches, room), jnp.float32),
            jnp.zeros((rows, branches), jnp.int32),
            jnp.zeros((rows, branches), bool),
        )
        done = limits <= 0
        states = [jnp.zeros((rows, branches), jnp.int32) for _ in tables]
        carry = (jnp.int32(0), hidden, cache, empty, done, states)
        return jax.lax.while_loop(running, step, carry)[3]

    return jax.jit(generate)


def rollouts(
    generate: Callable[..., Generated],
    model: Any,
    batches: Iterable[tuple[tuple[Row, ...], Batch]],
    processor: Any,
    config: SamplingConfig,
    *,
    key: jax.Array,
    temperatures: np.ndarray,
    iteration: int,
    mesh: Any,
) -> Iterator[list[list[Response]]]:
    """Samples K responses for every row: new ones, or the continuations of those that the row holds.

    Args:
      generate: from `make_generate` with the same processor and config.
      model: the policy, laid out for sampling.
      batches: (rows, batch) pairs from `loader.row_batches`: all rows, and this process's share of them as
        arrays; a batch may end in empty rows.
      processor: the family's host side.
      config: the sampling settings.
      key: PRNG key of this seed and iteration.
      temperatures: float32[K], one per sample; 0 is greedy.
      iteration: written into the responses.
      mesh: the device mesh.

    Yields:
      For each batch, in order, the K responses of each of its rows; a continuation's tokens and text are
      those of the whole response, its logprob that of the new tokens.
    """
    temperatures = np.asarray(temperatures, np.float32)
    if temperatures.shape != (config.branches,):
        raise ValueError(
            f"need {config.branches} temperatures, one per branch, got shape {temperatures.shape}"
        )

    def read(rows, generated):
        host = Generated(*processes.fetch(generated))
        return [
            _responses(row, at, host, processor, config, temperatures, iteration)
            for at, row in enumerate(rows)
        ]

    pending = None  # the device works on a batch while the one before it is turned into text
    for rows, batch in batches:
        places = _places(rows, len(batch.tokens), processor, config)
        placed = sharding.put_batch((batch, *places), mesh)
        batch, query_keys, limits, sample_keys, starts = placed
        result = generate(model, batch, query_keys, key, temperatures, limits, sample_keys, starts)
        if pending is not None:
            yield read(*pending)
        pending = rows, result
    if pending is not None:
        yield read(*pending)


def _places(rows: Sequence[Row], size: int, processor: Any, config: SamplingConfig):
    """query keys [B], limits [B, K], sample keys [B, K], and starts (parent, kept) [B, K] or None: the `size`
    rows of each that are this process's share."""
    size *= jax.process_count()
    query_keys, shape = np.zeros(size, np.uint32), (size, config.branches)
    sample_keys = np.broadcast_to(np.arange(config.branches, dtype=np.uint32), shape).copy()
    limits, parent, kept = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for at, row in enumerate(rows):
        query_keys[at], prompt = query_key(row.prompt.query.id), row.prompt.length
        limits[at] = min(processor.length_limit(prompt) - prompt, config.max_new_tokens)
        if row.starts:
            parent[at], kept[at], sample_keys[at] = np.array(row.starts).T
            limits[at] -= kept[at]
    mine = sharding.share(size, processes.here())
    starts = (parent[mine], kept[mine]) if rows[0].starts else None
    return query_keys[mine], limits[mine], sample_keys[mine], starts


def _responses(row, at, host, processor, config, temperatures, iteration) -> list[Response]:
    out = []
    for sample in range(config.branches):
        parent, kept, _ = row.starts[sample] if row.starts else (0, 0, 0)
        before = row.responses[parent - 1][:kept] if kept else ()
        tokens = [*before, *host.tokens[at, sample, : int(host.length[at, sample])].tolist()]
        text = processor.decode(tokens)
        cuts = [cut for cut in (text.find(stop) for stop in config.stop_strings) if cut >= 0]
        out.append(
            Response(
                query_id=row.prompt.query.id,
                sample=sample,
                text=text[: min(cuts)] if cuts else text,
                tokens=tuple(tokens),
                logprob=float(host.logprobs[at, sample, : int(host.length[at, sample])].sum()),
                truncated=not bool(host.stopped[at, sample]),
                iteration=iteration,
                temperature=round(float(temperatures[sample]), 6),
            )
        )
    return out
