"""From queries and responses to batches: planning on the host, decoding in Grain workers.

A plan is made from image headers and token counts alone, so shapes are known, few and the same on every
process before an image is decoded. Each stage's stream is a function of its plan and seed, and its state
is a small dictionary: a restart continues with the very next batch.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from mstar_jax import sharding
from mstar_jax.data.images import load_image
from mstar_jax.structs import Batch, Processor, Prompt, Query, Row


def plan_prompts(
    pairs: Sequence[tuple[Query, str]], processor: Processor, max_length: int
) -> list[Prompt | None]:
    """Measures prompts without decoding their images.

    Args:
      pairs: (query, rendered prompt).
      processor: the family's host side.
      max_length: longest prefix in tokens. A longer prompt is left out whole: cutting it could cut an
        image span, and then features and placeholders no longer match. So is one that leaves no room for
        a response in the model's context.

    Returns:
      A prompt for each pair, None for one that is left out.
    """
    prompts: list[Prompt | None] = []
    size = functools.cache(_image_size)
    for query, text in pairs:
        length, crops = processor.prefix_shape(text, [size(path) for path in query.images])
        fits = length <= max_length and processor.length_limit(length) > length
        prompts.append(Prompt(query, text, length, crops) if fits else None)
    return prompts


def _image_size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # shown rotated by a quarter
    return (height, width) if turned else (width, height)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`.

    Raises:
      ValueError: none does.
    """
    for size in sorted(buckets):
        if length <= size:
            return size
    raise ValueError(
        f"{length} tokens do not fit the largest bucket, {max(buckets)}: add one to data.buckets"
    )


def encode_row(row: Row, processor: Any, length: int, crops: int) -> Batch:
    """Decodes the images of a row and lays out prefix and branches, padded to `length` and `crops`.

    Raises:
      ValueError: naming the query, where image features and their places do not match or the row does
        not fit. The device is never called with such a row.
    """
    query = row.prompt.query
    prefix = processor.encode(row.prompt.text, [load_image(path) for path in query.images])
    n, c = len(prefix.tokens), len(jax.tree.leaves(prefix.pixels)[0])
    if (n, c) != (row.prompt.length, row.prompt.crops):
        raise ValueError(
            f"query {query.id}: planned {row.prompt.length} prompt tokens and {row.prompt.crops} crops, "
            f"encoded {n} and {c}; did an image change on disk?"
        )
    if row.length > length or c > crops:
        raise ValueError(
            f"query {query.id}: {row.length} tokens and {c} crops do not fit {length} and {crops}"
        )
    tokens, branch = np.zeros(length, np.int32), np.full(length, -1, np.int32)
    index, mask = np.full(length, -1, np.int32), np.zeros(length, np.float32)
    labels = np.full(length, -1, np.float32)
    tokens[:n], branch[:n], index[:n] = prefix.tokens, 0, prefix.image_index
    at = n
    for number, response in enumerate(row.responses):
        end = at + len(response)
        tokens[at:end], branch[at:end] = response, number + 1
        mask[at:end] = row.weights[number] if row.weights else 1.0
        for place, label in row.labels[number] if row.labels else ():
            labels[at + place] = label
        at = end
    pixels = jax.tree.map(lambda x: _padded(x, (crops, *x.shape[1:])), prefix.pixels)
    return Batch(tokens, branch, mask, index, pixels, labels)


def _padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(x, [(0, size - there) for there, size in zip(x.shape, shape)])


def _stack(rows: Sequence[Batch], size: int, like: Batch) -> Batch:
    """Stacks rows, images to their common shape, and fills up with empty rows of the shapes of `like`."""
    nothing = np.full_like(like.branch, -1)
    unlabelled = np.full_like(like.labels, -1)
    empty = jax.tree.map(np.zeros_like, like)
    empty = empty._replace(branch=nothing, image_index=nothing, labels=unlabelled)
    rows = [*rows, *[empty] * (size - len(rows))]

    def stack(*parts):
        shape = tuple(map(max, zip(*(x.shape for x in parts))))
        return np.stack([x if x.shape == shape else _padded(x, shape) for x in parts])

    return jax.tree.map(stack, *rows)


@dataclasses.dataclass(frozen=True)
class _EncodeRows(grain.transforms.Map):
    """One planned batch of rows to arrays: this process's share of it."""

    processor: Any
    size: int
    share: sharding.Share

    def map(self, plan):
        length, rows = plan
        crops = max(row.prompt.crops for row in rows)
        encoded = [
            encode_row(row, self.processor, length, crops)
            for row in (rows[i] for i in self.share.rows(self.size) if i < len(rows))
        ]
        # a share without rows has the shapes of the first row
        like = encoded[0] if encoded else encode_row(rows[0], self.processor, length, crops)
        return tuple(rows), _stack(encoded, len(self.share.rows(self.size)), like)


def plan_batches(rows: Sequence[Row], size: int, buckets: Sequence[int]) -> list[tuple[int, list[Row]]]:
    """Groups rows by shape, in order: (bucket, up to `size` rows with the same number of crops)."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((bucket(row.length, buckets), row.prompt.crops), []).append(row)
    return [
        (length, group[at : at + size])
        for (length, _), group in sorted(groups.items())
        for at in range(0, len(group), size)
    ]


def row_batches(
    plans: Sequence[tuple[int, list[Row]]],
    processor: Any,
    size: int,
    *,
    workers: int = 0,
    share: sharding.Share = sharding.WHOLE,
) -> Iterator[tuple[tuple[Row, ...], Batch]]:
    """Encodes planned rows in order, ahead of their use.

    Args:
      plans: from `plan_batches`.
      processor: the family's host side.
      size: rows of a batch: a longer plan gives several, a short one is filled up with empty rows.
      workers: processes that decode images; 0 decodes in threads of this one.
      share: this process's part of every batch; it gets all of the rows.
    """
    parts = [(length, rows[at : at + size]) for length, rows in plans for at in range(0, len(rows), size)]
    if not parts:
        return iter(())
    data = grain.MapDataset.source(parts).map(_EncodeRows(processor, size, share))
    return iter(_prefetched(data, workers))


@dataclasses.dataclass(frozen=True)
class _EncodeBatch(grain.transforms.Map):
    """The rows of a training batch to arrays: this process's share of them."""

    processor: Any
    length: int
    crops: int
    share: sharding.Share

    def map(self, rows):
        mine = [rows[i] for i in self.share.rows(len(rows))]
        encoded = [encode_row(row, self.processor, self.length, self.crops) for row in mine]
        return _stack(encoded, len(mine), encoded[0])


def split_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Cuts rows whose branches do not fit into several rows of the same query.

    Raises:
      ValueError: a single response does not fit beside its prompt.
    """
    out = []
    for row in rows:
        first, room = 0, max_length - row.prompt.length
        for last, response in enumerate(row.responses):
            if len(response) > room:
                raise ValueError(
                    f"query {row.prompt.query.id}: {row.prompt.length} prompt and {len(response)} response "
                    f"tokens do not fit {max_length}, the largest of data.buckets"
                )
            if sum(map(len, row.responses[first : last + 1])) > room:
                out.append(_part(row, first, last))
                first = last
        out.append(_part(row, first, len(row.responses)))
    return out


def _part(row: Row, first: int, last: int) -> Row:
    these = slice(first, last)
    return Row(row.prompt, row.responses[these], row.weights[these], row.labels[these])


def by_bucket(rows: Sequence[Row], size: int, buckets: Sequence[int]) -> list[list[Row]]:
    """Rows in groups of one bucket, the shortest first; one that does not fill a batch of `size` joins the
    next, the last one that before it."""
    groups = list[list[Row]]()
    for length in sorted(buckets):
        same = [row for row in rows if bucket(row.length, buckets) == length]
        if groups and len(groups[-1]) < size:
            groups[-1] += same
        elif same:
            groups.append(same)
    if len(groups) > 1 and len(groups[-1]) < size:
        last = groups.pop()
        groups[-1] += last
    return groups


def train_batches(
    sources: Sequence[tuple[Sequence[Row], float]],
    processor: Any,
    size: int,
    buckets: Sequence[int],
    *,
    seed: int,
    grouped: bool = False,
    workers: int = 0,
    share: sharding.Share = sharding.WHOLE,
    state: dict[str, Any] | None = None,
) -> grain.DatasetIterator:
    """An endless, shuffled stream of training batches from weighted sources.

    Sources whose longest rows fall into the same bucket are mixed row by row; sources of different shapes
    take turns, batch by batch, so that short rows are not padded to the longest ones. So do the groups of a
    source, where it is `grouped`; all its rows still come equally often.

    Args:
      sources: (rows, weight): e.g. labelled and pseudo-labelled rows; weights are shares of the rows
        drawn.
      processor: the family's host side.
      size: rows of the *global* batch.
      buckets: row lengths to choose from; one is chosen for a source, so few programs are compiled.
      seed: of the shuffle; every epoch has its own order.
      grouped: a batch holds rows of one bucket, see `by_bucket`: more programs, less padding.
      workers: processes that decode images; 0 decodes in threads of this one.
      share: this process's part of every global batch.
      state: of an earlier iterator (`get_state()`), to continue behind it.

    Raises:
      ValueError: no source has rows, or the processes do not divide the batch.
    """
    filled = [
        (split_rows(rows, max(buckets)), weight) for rows, weight in sources if len(rows) and weight > 0
    ]
    if not filled:
        raise ValueError("there is nothing to train on: no source has rows")
    share.rows(size)
    shapes: dict[tuple[int, int], list[tuple[Any, float]]] = {}
    for part, weight in filled:
        for group in by_bucket(part, size, buckets) if grouped else [part]:
            shape = bucket(max(row.length for row in group), buckets), max(row.prompt.crops for row in group)
            rows = grain.MapDataset.source(group).seed(seed).shuffle().repeat()
            shapes.setdefault(shape, []).append((rows, weight * len(group) / len(part)))
    streams = []
    for (length, crops), parts in shapes.items():
        batches = _mix(parts).batch(size, batch_fn=list)  # whole, so that they do not depend on the count
        encoded = batches.map(_EncodeBatch(processor, length, crops, share))
        streams.append((encoded, sum(weight for _, weight in parts)))
    encoded = _mix(streams)
    iterator = iter(_prefetched(encoded, workers))
    if state:
        iterator.set_state(state)
    return iterator


def _mix(parts: Sequence[tuple[grain.MapDataset, float]]) -> grain.MapDataset:
    datasets, weights = zip(*parts)
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def _prefetched(data: grain.MapDataset, workers: int) -> grain.IterDataset:
    if workers:
        stream = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        return stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
