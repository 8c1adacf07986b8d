"""From queries and responses to batches: planned on the host, decoded in processes that only do that.

A plan needs image headers and token counts only, so before any image is decoded the shapes are known, few,
and the same on every process. A stage's stream of batches is a function of its plan and seed, and its state
is a small dictionary, so a restart continues with the next batch.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mstar_jax import sharding
from mstar_jax.data import pictures, pixels, positions, workers
from mstar_jax.structs import Batch, Prefix, Processor, Prompt, Query, Row

TOGETHER = 4096  # prompts that are tokenised together: their ids are in memory at once


Shapes = dict[bytes, tuple[int, int]]  # (prompt tokens, crops) by `_key`


def plan_prompts(
    pairs: Sequence[tuple[Query, str]], processor: Processor, max_length: int, shapes: Shapes | None = None
) -> list[Prompt | None]:
    """Measures prompts without decoding their images.

    Args:
      pairs: (query, rendered prompt).
      processor: the family's host side.
      max_length: longest prefix in tokens. A longer prompt is left out whole: cutting it could cut an
        image span, and then features and placeholders no longer match. So is one that leaves no room for
        a response in the model's context.
      shapes: what this processor has measured before; new prompts are added.

    Returns:
      A prompt for each pair, None for one that is left out.
    """
    shapes = {} if shapes is None else shapes
    size = functools.cache(pictures.size)
    sizes = [[size(path) for path in query.images] for query, _ in pairs]
    keys = [_key(text, some) for (_, text), some in zip(pairs, sizes)]
    new = list({key: at for at, key in enumerate(keys) if key not in shapes}.values())
    for part in (new[at : at + TOGETHER] for at in range(0, len(new), TOGETHER)):
        found = processor.prefix_shapes([pairs[at][1] for at in part], [sizes[at] for at in part])
        shapes.update(zip((keys[at] for at in part), found, strict=True))
    prompts: list[Prompt | None] = []
    for (query, text), key in zip(pairs, keys):
        length, crops = shapes[key]
        fits = length <= max_length and processor.length_limit(length) > length
        prompts.append(Prompt(query, text, length, crops) if fits else None)
    return prompts


def _key(text: str, sizes: Sequence[tuple[int, int]]) -> bytes:
    """All that a prompt's shape depends on, besides its processor, in 16 bytes: texts are long and many."""
    return hashlib.blake2b(f"{sizes} {text}".encode(), digest_size=16).digest()


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`.

    Raises:
      ValueError: none does.
    """
    for size in sorted(buckets):
        if length <= size:
            return size
    raise ValueError(
        f"{length} tokens do not fit into the largest bucket, {max(buckets)}: add one to data.buckets"
    )


def encode_rows(
    rows: Sequence[Row],
    processor: Processor,
    length: int,
    crops: int,
    *,
    share: Sequence[int] | None = None,
    find: Callable[[pixels.Job], pixels.Found] = pixels.find,
) -> Batch:
    """Decodes the images of rows and lays out their prefixes and branches, padded to `length` and `crops`.

    Args:
      rows: the first rows of a batch.
      processor: the policy's processor.
      length, crops: of the batch.
      share: indices of the wanted rows; rows beyond the last one are empty. None for all.
      find: decodes images, here or in another process.

    Raises:
      ValueError: a prompt differs from its plan, or a row does not fit; the message names the query. The
        device is never given such a row.
    """
    share = range(len(rows)) if share is None else share
    mine = [rows[i] for i in share if i < len(rows)]
    decoded = mine or rows[:1]  # a share without rows gets the shapes of the first row
    for row in decoded:
        if row.length > length or row.prompt.crops > crops:
            raise ValueError(
                f"query {row.prompt.query.id}: {row.length} tokens and {row.prompt.crops} crops do not fit "
                f"into {length} and {crops}"
            )
    paths = [row.prompt.query.images for row in decoded]
    planned = [row.prompt.crops for row in decoded]
    found = find(pixels.Job(processor.cut, paths, planned, crops, len(share)))
    prefixes = [
        processor.prefix(row.prompt.text, sizes) for row, sizes in zip(decoded, found.sizes, strict=True)
    ]
    turned = any(prefix.positions is not None for prefix in prefixes)
    hot = any(row.temperature is not None for row in rows)

    def numbers(wanted: bool) -> np.ndarray | None:
        return np.zeros((len(share), length), np.float32) if wanted else None

    batch = Batch(
        tokens=np.zeros((len(share), length), np.int32),
        branch=np.full((len(share), length), -1, np.int32),
        loss_mask=np.zeros((len(share), length), np.float32),
        image_index=np.full((len(share), length), -1, np.int32),
        pixels=found.pixels,
        labels=np.full((len(share), length), -1, np.float32),
        positions=np.zeros((len(share), 3, length), np.int32) if turned else None,
        old=numbers(any(row.old for row in rows)),
        reference=numbers(any(row.reference for row in rows)),
        temperature=np.ones(len(share), np.float32) if hot else None,
    )
    for at, (row, prefix, count) in enumerate(zip(decoded, prefixes, found.counts, strict=True)):
        if (len(prefix.tokens), count) != (row.prompt.length, row.prompt.crops):
            query = row.prompt.query
            raise ValueError(
                f"query {query.id}: planned {row.prompt.length} prompt tokens and {row.prompt.crops} crops, "
                f"but encoded {len(prefix.tokens)} and {count}; did one of its images change on disk? "
                f"{list(query.images)}"
            )
        if mine:
            _lay_out(batch, at, row, prefix)
    return batch if mine else batch._replace(pixels=jax.tree.map(np.zeros_like, batch.pixels))


def _lay_out(batch: Batch, at: int, row: Row, prefix: Prefix) -> None:
    """Writes a row's prefix and branches into row `at` of a batch; its pixels are there already."""
    end = len(prefix.tokens)
    batch.tokens[at, :end] = prefix.tokens
    batch.branch[at, :end] = 0
    batch.image_index[at, :end] = prefix.image_index
    for number, response in enumerate(row.responses):
        start, end = end, end + len(response)
        batch.tokens[at, start:end] = response
        batch.branch[at, start:end] = number + 1
        batch.loss_mask[at, start:end] = row.weights[number] if row.weights else 1.0
        for place, label in row.labels[number] if row.labels else ():
            batch.labels[at, start + place] = label
        if row.old:
            batch.old[at, start:end] = row.old[number]
        if row.reference:
            batch.reference[at, start:end] = row.reference[number]
    if row.temperature is not None:
        batch.temperature[at] = row.temperature
    if prefix.positions is not None:
        batch.positions[at] = positions.of_row(prefix.positions, batch.branch[at])


@dataclasses.dataclass(frozen=True)
class _EncodeRows(grain.transforms.Map):
    """Encodes this process's share of a planned batch of rows."""

    processor: Processor
    size: int
    share: sharding.Share
    workers: int

    def map(self, plan):
        length, rows = plan
        crops = max(row.prompt.crops for row in rows)
        share = self.share.rows(self.size)
        batch = encode_rows(rows, self.processor, length, crops, share=share, find=_finder(self.workers))
        return tuple(rows), batch


def plan_batches(rows: Sequence[Row], size: int, buckets: Sequence[int]) -> list[tuple[int, list[Row]]]:
    """Groups rows by shape, in order.

    Returns:
      (bucket, up to `size` rows of this bucket with the same number of crops).
    """
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((bucket(row.length, buckets), row.prompt.crops), []).append(row)
    return [
        (length, group[at : at + size])
        for (length, _), group in sorted(groups.items())
        for at in range(0, len(group), size)
    ]


def full_batches(rows: Sequence[Row], size: int, buckets: Sequence[int]) -> list[tuple[int, list[Row]]]:
    """Groups rows into the fewest batches, where shapes may be mixed: the longest rows first, and in a bucket
    those with the most crops. A batch has the shape of its largest row.

    Returns:
      (bucket, `size` rows); only the last batch, of the shortest rows, may have fewer.
    """

    def shape(row: Row) -> tuple[int, int]:
        return bucket(row.length, buckets), row.prompt.crops

    ordered = sorted(rows, key=shape, reverse=True)
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [(bucket(part[0].length, buckets), part) for part in parts]


def row_batches(
    plans: Sequence[tuple[int, list[Row]]],
    processor: Processor,
    size: int,
    *,
    workers: int = 0,
    share: sharding.Share = sharding.WHOLE,
) -> Iterator[tuple[tuple[Row, ...], Batch]]:
    """Encodes planned rows in order, ahead of their use.

    Args:
      plans: from `plan_batches` or `full_batches`.
      processor: the policy's processor.
      size: rows of a batch. A longer plan is split into several batches; a shorter one is padded with empty
        rows.
      workers: processes that decode images; 0 decodes in threads of this process.
      share: this process's share of every batch.

    Yields:
      All rows of a batch, and this process's share of them as arrays.
    """
    parts = [(length, rows[at : at + size]) for length, rows in plans for at in range(0, len(rows), size)]
    if not parts:
        return iter(())
    data = grain.MapDataset.source(parts).map(_EncodeRows(processor, size, share, workers))
    return iter(_prefetched(data, workers))


@dataclasses.dataclass(frozen=True)
class _EncodeBatch(grain.transforms.Map):
    """Encodes this process's share of the rows of a training batch."""

    processor: Processor
    length: int
    crops: int
    share: sharding.Share
    workers: int

    def map(self, rows):
        share, find = self.share.rows(len(rows)), _finder(self.workers)
        return encode_rows(rows, self.processor, self.length, self.crops, share=share, find=find)


def split_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Splits rows that are too long into several rows of the same query.

    Raises:
      ValueError: a prompt with a single response is too long; the message names the query.
    """
    out = []
    for row in rows:
        first = 0
        room = max_length - row.prompt.length
        for last, response in enumerate(row.responses):
            if len(response) > room:
                raise ValueError(
                    f"query {row.prompt.query.id}: {row.prompt.length} prompt and {len(response)} response "
                    f"tokens do not fit into {max_length}, the largest of data.buckets; start another "
                    "workdir with a larger one"
                )
            if sum(map(len, row.responses[first : last + 1])) > room:
                out.append(_part(row, first, last))
                first = last
        out.append(_part(row, first, len(row.responses)))
    return out


def _part(row: Row, first: int, last: int) -> Row:
    these = slice(first, last)
    return Row(
        row.prompt,
        row.responses[these],
        row.weights[these],
        row.labels[these],
        old=row.old[these],
        reference=row.reference[these],
        temperature=row.temperature,
    )


def by_bucket(rows: Sequence[Row], size: int, buckets: Sequence[int]) -> list[list[Row]]:
    """Groups rows by bucket, the shortest first. A group with fewer than `size` rows is merged into the next
    one, and the last group into the one before it."""
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
    processor: Processor,
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

    Sources of the same shape (the bucket of their longest row, and the most crops) are mixed row by row.
    Sources of different shapes alternate batch by batch, so that short rows are not padded to the longest
    ones. With `grouped`, the same holds for the groups of a source, and all its rows are still drawn equally
    often.

    Args:
      sources: (rows, weight), e.g. labelled and pseudo-labelled rows; a weight is a share of the rows drawn.
      processor: the policy's processor.
      size: rows of the *global* batch.
      buckets: the row lengths to choose from. One is chosen per source, so that few programs are compiled.
      seed: of the shuffle; every epoch has its own order.
      grouped: whether each batch has rows of one bucket only (see `by_bucket`): less padding, more programs.
      workers: processes that decode images; 0 decodes in threads of this process.
      share: this process's share of every global batch.
      state: from `get_state()` of an earlier iterator, to continue after its last batch.

    Raises:
      ValueError: no source has rows, or the global batch cannot be split evenly.
    """
    filled = [
        (split_rows(rows, max(buckets)), weight) for rows, weight in sources if len(rows) and weight > 0
    ]
    if not filled:
        raise ValueError("there is nothing to train on: no source with a positive weight has rows")
    share.rows(size)  # raises if the batch cannot be split evenly
    shapes: dict[tuple[int, int], list[tuple[grain.MapDataset, float]]] = {}
    for part, weight in filled:
        for group in by_bucket(part, size, buckets) if grouped else [part]:
            longest = max(row.length for row in group)
            shape = (bucket(longest, buckets), max(row.prompt.crops for row in group))
            rows = grain.MapDataset.source(group).seed(seed).shuffle().repeat()
            shapes.setdefault(shape, []).append((rows, weight * len(group) / len(part)))
    streams = []
    for (length, crops), parts in shapes.items():
        # global: independent of the number of processes. Endless, so nothing is dropped; without
        # drop_remainder Grain overflows for batches of one row
        batches = _mix(parts).batch(size, drop_remainder=True, batch_fn=list)
        encoded = batches.map(_EncodeBatch(processor, length, crops, share, workers))
        streams.append((encoded, sum(weight for _, weight in parts)))
    encoded = _mix(streams)
    iterator = iter(_prefetched(encoded, workers))
    if state:
        iterator.set_state(state)
    return iterator


def _mix(parts: Sequence[tuple[grain.MapDataset, float]]) -> grain.MapDataset:
    datasets, weights = zip(*parts)
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def _finder(count: int) -> Callable[[pixels.Job], pixels.Found]:
    return workers.workers(count).find if count else pixels.find


def _prefetched(data: grain.MapDataset, count: int) -> grain.IterDataset:
    """The elements in order, made ahead of their use by threads, each of which waits for a worker."""
    return data.to_iter_dataset(
        grain.ReadOptions(num_threads=count or 2, prefetch_buffer_size=max(4, 2 * count))
    )
