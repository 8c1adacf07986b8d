"""How often a stage calls its programs, with lengths of responses drawn at random."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mstar_jax.data import loader
from mstar_jax.structs import ring


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a config does not say.

    Attributes:
      queries: labelled ones.
      prompt: tokens of a prompt.
      response, spread: mean and standard deviation of the tokens of a response.
      right: share of the responses that are right; a copy of another one's text counts as wrong.
      distinct: share of a query's `evolve.k` responses that are no copies of another one's text: only these
        are scored.
      distinct_warm_up: the same of the warm-up policy, which repeats itself less.
      prefixes: steps of a response, on average, that a label is sampled for: all but the last, and but those
        that begin another response as well.
    """

    queries: int
    prompt: int
    response: float
    spread: float
    right: float
    distinct: float
    distinct_warm_up: float
    prefixes: float

    def distinct_of(self, samples: int, k: int, warm_up: bool = False) -> float:
        """The share of `samples` responses that are no copies, where `distinct` is that of k: how many differ
        grows as a power of how many there are (Heaps' law)."""
        share = self.distinct_warm_up if warm_up else self.distinct
        return float(samples ** (math.log(share) / math.log(max(k, 2))))


class Calls(NamedTuple):
    """Calls of sampling: prefills, calls and steps of decoding, and the share of the suffixes they read."""

    prefills: int
    segments: int
    steps: int
    share: float


def sampled(lengths: np.ndarray, slots: int, places: int, entering: int, parts: int, room: int) -> Calls:
    """Plays a shard of rows through the slots, as `rollouts.rollouts` does.

    Args:
      lengths: int[rows, K], the tokens of the samples, in the order in which they start.
      slots, places, entering, parts: of the sampler.
      room: the most tokens of a sample.
    """
    first, last = spans(lengths, places)
    end, born, row = np.zeros(slots, int), np.zeros(slots, int), np.zeros(slots, int)
    free = np.ones(slots, bool)
    chunks, size = ring(room)
    clock = prefills = segments = steps = at = 0
    read = 0.0
    each, some = slots // parts, entering // parts
    while at < len(lengths) or not free.all():
        while at < len(lengths) and free.reshape(parts, each).sum(1).min() >= some:
            for part in range(parts):
                mine = np.flatnonzero(free[part * each : (part + 1) * each])[:some] + part * each
                mine = mine[: max(len(lengths) - at - part * some, 0)]
                row[mine] = at + part * some + np.arange(len(mine))
                end[mine] = clock + last[row[mine]].max(axis=1)
                born[mine], free[mine] = clock, False
            at += entering
            prefills += 1
        wanted = some if at < len(lengths) else each
        until = np.sort(np.where(free, clock, end).reshape(parts, each), axis=1)[:, wanted - 1].max()
        until = max(until, clock + 1)
        if chunks > 1:
            until = min(until, (clock // size + 1) * size)
        took, busy = (clock - born[~free])[:, None], row[~free]
        oldest = np.where(took < last[busy], took - first[busy], 0).max(initial=0)
        needed = min(1 + max(-(-(oldest - clock % size) // size), 0), chunks)
        read += (until - clock) * needed / chunks
        steps += until - clock
        segments += 1
        clock = until
        free |= end <= clock
    return Calls(prefills, segments, int(steps), read / max(steps, 1))


def spans(lengths: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """When samples [rows, K] start and end, in steps since their row entered: the next one starts in the
    place that is free first."""
    rows, free = np.arange(len(lengths)), np.zeros((len(lengths), places), int)
    first, last = np.zeros_like(lengths), np.zeros_like(lengths)
    for sample, length in enumerate(lengths.T):
        at = free.argmin(axis=1)
        first[:, sample] = free[rows, at]
        last[:, sample] = free[rows, at] = free[rows, at] + length
    return first, last


def scored_batches(
    rng: np.random.Generator,
    queries: int,
    samples: int,
    *,
    right: float,
    assumed: Assumed,
    room: int,
    buckets: Sequence[int],
    chunk: int,
    batch: int,
) -> collections.Counter[int]:
    """Batches of scoring by the length of their rows.

    Args:
      rng: draws the responses.
      queries, samples: queries, and responses of each.
      right: share of the responses that are scored.
      assumed: see `Assumed`.
      room: the most tokens of a response.
      buckets: lengths of rows.
      chunk: queries that are scored together.
      batch: rows of a batch.
    """
    found: collections.Counter[int] = collections.Counter()
    for size, times in ((min(chunk, queries), queries // chunk), (queries % chunk, 1)):
        rows: list[int] = []
        for _ in range(size if times else 0):
            some = lengths_of(rng, (rng.binomial(samples, right),), assumed, room)
            rows += [loader.bucket(row, buckets) for row in packed(some, assumed.prompt, max(buckets))]
        for longest in sorted(rows, reverse=True)[::batch]:  # as `loader.full_batches`
            found[longest] += times
    return found


def stems(room: int, samples: int, assumed: Assumed) -> tuple[float, float]:
    """Rows that continue the step prefixes of a query's responses, and the tokens of responses in each: all
    that is labelled of them, or of a single one up to a step in its middle.

    Args:
      room: prefixes of a row, at most.
      samples: responses of the query.
      assumed: see `Assumed`.
    """
    rows = samples * assumed.prefixes / room + 0.5  # the last one is half full, on average
    part = samples * assumed.prefixes / rows / (assumed.prefixes + 1)  # in responses
    return rows, max(part, (1 + part) / 2) * assumed.response


def packed(responses: np.ndarray, prompt: int, longest: int) -> Iterator[int]:
    """Tokens of the rows that hold a query's responses, each with the prompt; at most `longest`."""
    row = 0
    for tokens in responses:
        if row and prompt + row + tokens > longest:
            yield min(prompt + row, longest)
            row = 0
        row += int(tokens)
    if row:
        yield min(prompt + row, longest)


def lengths_of(rng: np.random.Generator, shape: tuple[int, ...], assumed: Assumed, room: int) -> np.ndarray:
    """Tokens of responses, drawn at random, at most `room`."""
    drawn = rng.normal(assumed.response, assumed.spread, shape)
    return np.clip(np.rint(drawn), 1, room).astype(int)
