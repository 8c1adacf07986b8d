"""Log probabilities of stored responses under a policy, through a store of the workdir, as training computes
them: what the policy gradients of `training.objectives` compare with.

    <workdir>/logprobs/<name>/00000.jsonl    a line for each query: its id, and its responses' arrays
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import processes, sharding
from mstar_jax.data import loader
from mstar_jax.inference.generate import Inference, check_stop, digest_of
from mstar_jax.profiling import flops
from mstar_jax.store import Store, line, packed, unpacked
from mstar_jax.structs import Array, Batch, Model, Row, float32

Arrays = tuple[Sequence[float], ...]  # of a row's responses: the log probability of each token, nats


@functools.partial(jax.jit, static_argnames=("dtype", "forbidden"))
def token_logprobs(model: Model, batch: Batch, dtype: str, forbidden: tuple[int, ...] = ()) -> jax.Array:
    """float32[B, T]: log probabilities of the responses' tokens at `batch.temperature`, 0 elsewhere; computed
    in `dtype` as the train step computes them. `forbidden` ids have no probability."""
    model = sharding.cast(model, dtype)
    own = batch.branch > 0
    found, _ = model.token_logprobs(model(batch), batch.tokens, own, batch.temperature, forbidden)
    return jnp.where(own, found, 0.0)


def logprobs(
    host: Inference, name: str, load: Callable[[], Model], rows: Sequence[Row], *, size: int, dtype: str
) -> list[Arrays]:
    """Log probabilities of the tokens of every row's responses, through the store of them.

    Args:
      host: see `Inference`.
      name: of the pass.
      load: the policy, in the layout that it trains in; called only where something is missing.
      rows: queries with what was sampled for them, all at one `temperature`.
      size: rows that are computed together.
      dtype: of the computation.
    """
    chunk = host.prm.chunk
    chunks = [rows[at : at + chunk] for at in range(0, len(rows), chunk)]
    # not of `size`: it follows from train.accumulate, which may change from start to start
    settings = {"temperature": rows[0].temperature if rows else None, "dtype": dtype}
    store = Store(host.workdir / "logprobs" / name, settings | {"chunk": chunk})

    def asked(number: int) -> str:
        return digest_of(host.workdir, chunks[number])

    model = None
    for number in store.missing(len(chunks), asked):
        model = model or load()
        found = computed(host, name, model, chunks[number], size=size, dtype=dtype)
        store.write(number, map(record, chunks[number], found), asked)
        check_stop(host.stop, f"{name}: log probabilities")
    store.complete(len(chunks))
    return list(store.read(len(chunks), read_record))


def record(row: Row, found: Arrays) -> bytes:
    """A line of the store."""
    return line({"query": row.prompt.query.id, "logprobs": [packed(each) for each in found]})


def read_record(found: dict[str, Any]) -> Arrays:
    """The arrays in such a line."""
    return tuple(unpacked(each) for each in found["logprobs"])


def computed(
    host: Inference, name: str, model: Model, rows: Sequence[Row], *, size: int, dtype: str
) -> list[Arrays]:
    """The same without a store. Rows have the shapes in which they train (see `loader.train_batches`); copies
    of a response to a query are one response.

    Raises:
      ValueError: a log probability is not finite.
    """
    buckets = host.data.buckets
    pieces = loader.split_rows(rows, max(buckets))
    groups = loader.by_bucket(pieces, size, buckets) if host.data.grouped else [pieces]
    plans = [(loader.bucket(max(row.length for row in group), buckets), group) for group in groups]
    share = sharding.share_of(host.mesh)
    batches = loader.row_batches(plans, host.processor, size, workers=host.data.workers, share=share)
    run = functools.partial(token_logprobs, dtype=dtype, forbidden=tuple(host.processor.forbidden_ids))
    watch = host.speeds.of("logprobs", name)
    fed = watch.fed(batches, functools.partial(flops.count, run, model))
    results = _ahead((these, run(model, sharding.put_batch(batch, host.mesh))) for these, batch in fed)
    found: dict[tuple[str, tuple[int, ...]], Sequence[float]] = {}
    for these, values in watch.read(results):
        for row, line_of in zip(these, values):
            start, query = row.prompt.length, row.prompt.query.id
            for tokens in row.responses:
                each = line_of[start : start + len(tokens)]
                if not np.isfinite(each).all():
                    raise ValueError(f"query {query!r}: a log probability is not finite; the policy diverged")
                found[query, tuple(tokens)] = float32(each)
                start += len(tokens)
    return [tuple(found[row.prompt.query.id, tuple(r)] for r in row.responses) for row in rows]


def _ahead(
    results: Iterable[tuple[tuple[Row, ...], jax.Array]],
) -> Iterator[tuple[tuple[Row, ...], Array]]:
    """The results on the host; the device computes a batch while the one before is read."""
    pending = None
    for result in results:
        if pending is not None:
            yield pending[0], processes.fetch(pending[1])
        pending = result
    if pending is not None:
        yield pending[0], processes.fetch(pending[1])
