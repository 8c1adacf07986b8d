"""The host's side of sampling: which row enters which slot, and the responses that result.

Shapes: B slots, E entering rows, K branches.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mstar_jax import processes, sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.inference.sampler import Entry, Generated, Sampler
from mstar_jax.structs import Batch, Model, Processor, Response, Row, float32, int32, ring


def query_key(query_id: str) -> int:
    """A query's 32-bit key; it depends on the id alone."""
    return zlib.crc32(query_id.encode())


def rollouts(
    sampler: Sampler,
    model: Model,
    shards: Iterable[Sequence[Row]],
    batches: Iterator[tuple[tuple[Row, ...], Batch]],
    processor: Processor,
    *,
    key: jax.Array,
    temperatures: np.ndarray,
    iteration: int,
    mesh: Mesh,
    each: Callable[[int, int, int], None] = lambda rows, steps, tokens: None,
    logprobs: bool = False,
) -> Iterator[list[list[Response]]]:
    """Samples K responses for every row: new ones, or the continuations of those that the row holds.

    Args:
      sampler: of the same processor, for this mesh.
      model: the policy, laid out for sampling.
      shards: rows, of one shape within a shard. A shard is sampled on its own, so that it is the same to the
        last bit when it is sampled again.
      batches: (rows, batch) pairs from `loader.row_batches`: the next E rows of the shard, and this process's
        share of them as arrays; a shard's last batch may end in empty rows.
      processor: the family's host side.
      key: PRNG key of this seed and iteration.
      temperatures: float32[K], one per sample; 0 is greedy.
      iteration: written into the responses.
      mesh: the device mesh.
      each: called between the segments of decoding with how many rows have ended since the last call, how
        many steps the shard has taken, and how many tokens those rows were given; it may raise to stop.
      logprobs: whether new responses keep the log probability of each token.

    Yields:
      For each shard, in order, the K responses of each of its rows; a continuation's tokens and text are
      those of the whole response, its logprob that of the new tokens. Several processes share the rows: those
      that are not `processes.mine` have no responses here.
    """
    config, temperatures = sampler.config, np.asarray(temperatures, np.float32)
    if temperatures.shape != (config.branches,):
        raise ValueError(
            f"need {config.branches} temperatures, one per branch, got shape {temperatures.shape}"
        )
    count, parts = sampler.slots, sampler.shards
    chunked, chunk = ring(config.max_new_tokens)
    share = sharding.share_of(mesh)
    mine = share.rows(count)

    def decoded(rows: Sequence[Row], at: int, host: Generated) -> list[Response]:
        sums = _logprobs(rows[at], host)
        if not processes.mine(at):
            return []
        found = _responses(rows[at], host, sums, processor, config, temperatures, iteration)
        return [_with_logprobs(r, host) for r in found] if logprobs else found

    for rows in shards:
        answered: list[list[Response]] = [[] for _ in rows]
        slots, entered = None, 0
        ended = list[tuple[int, Generated]]()
        free, owner = np.ones(count, bool), np.zeros(count, int)  # of every slot, its row in the shard
        age, clock = np.zeros((count, config.places), int), 0
        done = np.ones(age.shape, bool)
        pending: tuple[tuple[Row, ...], Batch] | None = next(batches)
        while pending or not free.all():
            while pending and _room(free, size := share.whole(len(pending[1].tokens)), parts):
                these, batch = pending
                source = _assign(free, owner, entered, len(these), size, parts)
                entered += len(these)
                values = _values(these, size, processor, config)
                query_keys, limits, keys, starts = jax.tree.map(lambda x: x[share.rows(size)], values)
                entry = Entry(batch, query_keys, limits, keys, starts, source[mine])
                entry = sharding.put_batch(entry, mesh)
                if slots is None:
                    slots = sampler.blank(model, entry.batch, entry.starts)
                slots = sampler.enter(model, slots, key, entry)
                new = (source >= 0)[:, None]
                age, done = np.where(new, 0, age), np.where(new, False, done)
                pending = next(batches) if entered < len(rows) else None
            wanted = np.int32((size if pending else count) // parts)
            chunks, before = sampler.chunks(age[~done], clock), clock
            slots = sampler.advance(model, slots, temperatures, wanted, chunks=chunks)
            for row, host in ended:  # finished rows are decoded to text while the device continues
                answered[row] = decoded(rows, row, host)
            here = slots.done, slots.out, slots.cache.age, slots.cache.clock
            done, out, age, clock = processes.fetch(here)
            if chunked > 1 and clock % chunk == 0 and clock > before:
                slots = slots._replace(cache=slots.cache.rotated())
            left = np.flatnonzero(~free & done.all(axis=1))
            free[left] = True
            ended = [(owner[b], Generated(*(x[b] for x in out))) for b in left]
            each(len(left), int(clock), sum(int(host.length.sum()) for _, host in ended))
        for row, host in ended:
            answered[row] = decoded(rows, row, host)
        yield answered


def _room(free: np.ndarray, size: int, parts: int) -> bool:
    return bool(free.reshape(parts, -1).sum(axis=1).min() >= size // parts)


def _assign(free: np.ndarray, owner: np.ndarray, entered: int, rows: int, size: int, parts: int):
    """Gives rows free slots in their own part of the batch; returns `source` of an `Entry`."""
    source, each = np.full(len(free), -1, np.int32), size // parts
    for part, slots in enumerate(np.arange(len(free)).reshape(parts, -1)):
        mine = range(part * each, min((part + 1) * each, rows))
        for row, slot in zip(mine, slots[free[slots]]):
            source[slot], owner[slot], free[slot] = row - part * each, entered + row, False
    return source


def _values(rows: Sequence[Row], size: int, processor: Processor, config: SamplingConfig):
    """query keys [E], limits [E, K], sample keys [E, K], and starts (parent, kept) [E, K] or None."""
    query_keys, shape = np.zeros(size, np.uint32), (size, config.branches)
    sample_keys = np.broadcast_to(np.arange(config.branches, dtype=np.uint32), shape).copy()
    limits, parent, kept = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for at, row in enumerate(rows):
        query_keys[at], prompt = query_key(row.prompt.query.id), row.prompt.length
        limits[at] = min(processor.length_limit(prompt) - prompt, config.max_new_tokens)
        if row.starts:
            parent[at], kept[at], sample_keys[at] = np.array(row.starts).T
            limits[at] -= kept[at]
    return query_keys, limits, sample_keys, (parent, kept) if rows[0].starts else None


def _logprobs(row: Row, host: Generated) -> list[float]:
    """Of each of a row's K responses, the log probability of its tokens.

    Raises:
      ValueError: the policy's logits were not finite.
    """
    found = []
    for sample, length in enumerate(host.length):
        logprob = float(host.logprobs[sample, : int(length)].sum())
        if not math.isfinite(logprob):
            raise ValueError(
                f"query {row.prompt.query.id!r}, sample {sample}: the log probability of its tokens is "
                f"{logprob}, so the policy's logits are not finite. Set sampling.dtype to bfloat16 or "
                "float32 (float16 ends at 65504); if that does not help, its parameters have diverged"
            )
        found.append(logprob)
    return found


def _with_logprobs(response: Response, host: Generated) -> Response:
    """The response with the log probability of each token that was sampled.

    Raises:
      ValueError: its tokens are others: it was continued, or cut at a stop string.
    """
    count = int(host.length[response.sample])
    if list(response.tokens) != host.tokens[response.sample, :count].tolist():
        where = f"query {response.query_id!r}, sample {response.sample}"
        raise ValueError(
            f"{where}: its tokens are not those that were sampled, so they have no probabilities"
        )
    return dataclasses.replace(response, logprobs=float32(host.logprobs[response.sample, :count]))


def _responses(
    row: Row,
    host: Generated,
    logprobs: Sequence[float],
    processor: Processor,
    config: SamplingConfig,
    temperatures: np.ndarray,
    iteration: int,
) -> list[Response]:
    """The K responses of a row that has ended."""
    out = []
    for sample in range(config.branches):
        parent, kept, _ = row.starts[sample] if row.starts else (0, 0, 0)
        before = row.responses[parent - 1][:kept] if kept else ()
        tokens = [*before, *host.tokens[sample, : int(host.length[sample])].tolist()]
        text = processor.decode(tokens)
        cuts = [cut for cut in (text.find(stop) for stop in config.stop_strings) if cut >= 0]
        if cuts:  # what is read is what is trained on, without the stop string and closed by the stop id
            text = text[: min(cuts)]
            tokens = processor.encode_response(text)
        out.append(
            Response(
                query_id=row.prompt.query.id,
                sample=sample,
                text=text,
                tokens=int32(tokens),
                logprob=logprobs[sample],
                truncated=not bool(host.stopped[sample]),
                iteration=iteration,
                temperature=round(float(temperatures[sample]), 6),
            )
        )
    return out
