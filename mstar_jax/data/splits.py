"""Splits of a data set by image, and the queries of it that an iteration asks."""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mstar_jax.data import pictures
from mstar_jax.structs import Query


def split(
    queries: Sequence[Query],
    *,
    seed: int,
    labelled: float = 0.5,
    validation: int = 250,
    test: int = 750,
) -> dict[str, list[Query]]:
    """Splits by image: no two splits share an image, so test images are never trained on.

    An image is what its file holds (`pictures.content`), whatever its name. Near copies, such as the same
    picture scaled or encoded again, count as different ones.

    As in M-STaR (section 4), half of MathV360K is labelled and the other half counts as unlabelled;
    validation and test queries come from the unlabelled half. Queries that share an image, directly or
    through others, form a group, and splits are stratified by source as far as whole groups allow. If a group
    is larger than what a split still needs, the rest of the group is in no split. The splits depend on the
    seed and the ids, not on the order of the queries, and each split keeps that order.

    Args:
      queries: labelled queries with unique ids.
      seed: any integer.
      labelled: fraction of the queries that are labelled.
      validation, test: exact numbers of queries.

    Returns:
      `labelled`, `unlabelled` (see `unlabelled`), `validation` and `test`.

    Raises:
      ValueError: a query has no answer, ids are not unique, or the unlabelled part is too small.
    """
    if missing := [query.id for query in queries if query.answer is None]:
        raise ValueError(f"split needs answers; {len(missing)} queries have none, such as {missing[0]!r}")
    if len({query.id for query in queries}) != len(queries):
        names = [query.id for query in queries]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"split needs unique ids; {twice!r} occurs more than once")

    def order(group: list[Query]) -> tuple[str, str]:  # by source, shuffled within it
        return group[0].source, hashlib.sha256(f"{seed}:{group[0].id}".encode()).hexdigest()

    groups = sorted(_groups(queries), key=order)
    chosen: dict[str, set[str]] = {"labelled": set(), "validation": set(), "test": set()}
    rest, seen = [], 0
    for group in groups:
        seen += len(group)
        if len(chosen["labelled"]) + len(group) / 2 <= labelled * seen:
            chosen["labelled"].update(query.id for query in group)
        else:
            rest.append(group)
    available = sum(map(len, rest))
    if available < validation + test:
        raise ValueError(
            f"{validation} validation + {test} test queries wanted, but the unlabelled part has {available} "
            f"of {len(queries)} queries (labelled={labelled})"
        )
    for name, count in (("test", test), ("validation", validation)):
        chosen[name], rest = _take(rest, count)
        if len(chosen[name]) < count:
            raise ValueError(
                f"{count} {name} queries wanted, {len(chosen[name])} left after splitting by image; "
                f"{available} of {len(queries)} queries are in the unlabelled part"
            )
    left = {query.id for group in rest for query in group}
    splits = {name: [query for query in queries if query.id in ids] for name, ids in chosen.items()}
    splits["unlabelled"] = [unlabelled(q) for q in queries if q.id in left]
    return splits


def unlabelled(query: Query) -> Query:
    """The query without its answer, and without what only the answer tells: its type."""
    return dataclasses.replace(query, answer=None, answer_type=query.asked_type)


def apart(queries: Sequence[Query], held_out: Sequence[Query]) -> list[Query]:
    """The queries that show none of the images of the held-out ones, nor ask the same without an image."""
    contents = pictures.contents({image for query in [*queries, *held_out] for image in query.images})

    def shown(query: Query) -> set[object]:
        return {contents[image] for image in query.images} or {(query.question, query.options)}

    hidden = {each for query in held_out for each in shown(query)}
    ids = {query.id for query in held_out}
    return [query for query in queries if query.id not in ids and hidden.isdisjoint(shown(query))]


class HeldOut(NamedTuple):
    """Queries that a model is reported on, and how many of them show what another was trained on."""

    queries: list[Query]
    seen: int


def hold_out(queries: Sequence[Query], size: int, known: Sequence[Query]) -> HeldOut:
    """Takes `size` of the queries, of each source as many as are among the first `size`.

    Of a source, queries that show an image of the `known` ones come after the others, the known ones last:
    a model that was trained on them may have memorised them.
    """
    ids = {query.id for query in known}
    fresh = {query.id for query in apart(queries, known)}
    order = sorted(queries, key=lambda query: (query.id in ids) + (query.id not in fresh))
    left = collections.Counter(query.source for query in queries[:size])
    found = []
    for query in order:
        if left[query.source]:
            left[query.source] -= 1
            found.append(query)
    return HeldOut(found, sum(query.id not in fresh for query in found))


def _groups(queries: Sequence[Query]) -> list[list[Query]]:
    """Connected components of queries that share images, each sorted by id."""
    contents = pictures.contents({image for query in queries for image in query.images})
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    nodes = [
        [f"image:{contents[image]}" for image in query.images] or [f"id:{query.id}"] for query in queries
    ]
    for first, *others in nodes:
        for other in others:
            parent[find(other)] = find(first)
    groups: dict[str, list[Query]] = {}
    for query, (first, *_) in zip(queries, nodes, strict=True):
        groups.setdefault(find(first), []).append(query)
    return [sorted(group, key=lambda query: query.id) for group in groups.values()]


def _take(groups: list[list[Query]], count: int) -> tuple[set[str], list[list[Query]]]:
    """Takes `count` queries, or all if there are fewer.

    Every source contributes its share in whole groups. The remainder comes from whole groups of any source,
    and finally from a part of one group.

    Returns:
      The ids of the queries taken, and the groups of which none was taken.
    """
    total = sum(map(len, groups))
    sources: dict[str, list[int]] = {}
    taken: set[str] = set()
    used: set[int] = set()
    for i, group in enumerate(groups):
        sources.setdefault(group[0].source, []).append(i)

    def fill(indices: Sequence[int], limit: int) -> None:
        for i in indices:
            if i not in used and len(groups[i]) <= limit:
                limit -= len(groups[i])
                used.add(i)
                taken.update(query.id for query in groups[i])

    for indices in sources.values():
        fill(indices, count * sum(len(groups[i]) for i in indices) // max(total, 1))
    fill(range(len(groups)), count - len(taken))
    for i, group in enumerate(groups):
        if i not in used and len(taken) < count:
            used.add(i)
            taken.update(query.id for query in group[: count - len(taken)])
    return taken, [group for i, group in enumerate(groups) if i not in used]


def shuffled(queries: Sequence[Query], seed: int, epoch: int) -> list[Query]:
    """The queries in the random order of one epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(queries))
    return [queries[i] for i in order]


def share(queries: Sequence[Query], fraction: float, iteration: int, seed: int) -> list[Query]:
    """The queries of an iteration: the next `fraction` of them, epoch after epoch; iterations start at 1."""
    count = max(1, math.ceil(fraction * len(queries)))
    first = (iteration - 1) * count
    out: list[Query] = []
    while len(out) < count:
        epoch, at = divmod(first + len(out), len(queries))
        out += shuffled(queries, seed, epoch + 1)[at : at + count - len(out)]
    return out


# ---- the informative curriculum -----------------------------------------------------------------------


class Measured(NamedTuple):
    """What the last responses to a query said.

    Attributes:
      at: when they were sampled, a number that grows from stage to stage.
      rate: the share of them that was right, in 0..1.
    """

    at: int
    rate: float


Bounds = tuple[float, float]  # the pass rates of informative queries, both included
Known = Mapping[str, Measured]  # by query id; a query that is absent was never measured


def check_choice(curriculum: str, bounds: Sequence[float], trained_on: str) -> None:
    """Refuses what no curriculum can be made of: `evolve.curriculum`, `.informative` and `.data`.

    Raises:
      ValueError: says which value, and what it may be.
    """
    if curriculum not in ("uniform", "informative"):
        raise ValueError(f"evolve.curriculum = {curriculum!r}: choose one of 'uniform', 'informative'")
    if curriculum == "informative" and trained_on != "rollouts":
        raise ValueError(
            f"evolve.curriculum = {curriculum!r}: evolve.data = {trained_on!r} has no rollouts to go by"
        )
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        raise ValueError(f"evolve.informative = {bounds}: give two pass rates in 0..1, the lower one first")


def is_informative(rate: float, bounds: Bounds) -> bool:
    """Whether responses of this pass rate differ in being right, and the rate is within the bounds."""
    return 0 < rate < 1 and bounds[0] <= rate <= bounds[1]


def strata(queries: Sequence[Query], known: Known, bounds: Bounds) -> dict[str, list[Query]]:
    """The queries that were `informative` when last measured, that are `new`, and that are `settled`."""
    found: dict[str, list[Query]] = {"informative": [], "new": [], "settled": []}
    for query in queries:
        last = known.get(query.id)
        name = "new" if last is None else "informative" if is_informative(last.rate, bounds) else "settled"
        found[name].append(query)
    return found


def informative(
    queries: Sequence[Query],
    fraction: float,
    iteration: int,
    seed: int,
    *,
    known: Known,
    bounds: Bounds,
    remeasure: float,
) -> list[Query]:
    """As many queries as `share` gives, but those first that were informative when they were last measured.

    A policy changes, so a share `remeasure` is kept for settled queries, and as large a one for new ones;
    where it is less than a query, some iterations keep one and others none. What informative queries leave
    goes to new ones and then to settled ones. Of its kind, the query that was not measured for longest comes
    first; otherwise the order is random. Where nothing has been measured, this is the first iteration of
    `share`.
    """
    count = max(1, math.ceil(fraction * len(queries)))
    order = shuffled(queries, seed, iteration)
    parts = strata(order, known, bounds)
    for name in ("informative", "settled"):
        parts[name].sort(key=lambda query: known[query.id].at)
    so_far = [int(remeasure * count * t + 1e-9) for t in (iteration - 1, iteration)]  # 0.29 * 100 is below 29
    kept = min(so_far[1] - so_far[0], count // 2)
    takes = {name: min(kept, len(parts[name])) for name in ("new", "settled")}
    for name in ("informative", "new", "settled"):
        room = count - sum(takes.values())
        takes[name] = min(takes.get(name, 0) + room, len(parts[name]))
    chosen = {query.id for name, part in parts.items() for query in part[: takes[name]]}
    return [query for query in order if query.id in chosen]


def spared(
    queries: Sequence[Query], rates: Mapping[str, float], k: int, *, known: Known, bounds: Bounds
) -> dict[str, object]:
    """What the choice of an iteration's queries was worth, against queries drawn uniformly.

    The share of informative groups that uniform queries would have had is estimated from this iteration's own
    groups: of each stratum the share among those asked, weighted by the stratum's part of all queries.

    Args:
      queries: all that could have been asked.
      rates: the pass rate of each one that was, by id.
      k: responses to each.
      known: what was known before they were asked.
      bounds: see `Bounds`.

    Returns:
      `groups` asked and `informative` ones among them; by stratum how many were `asked`; `uniform`, the share
      of informative groups that uniform queries would have had, and `rollouts_spared` for as many of them.
      The last two are None where a stratum was not asked, or no group was informative.
    """
    asked: dict[str, int] = {}
    uniform: float | None = 0.0
    hits = 0
    for name, part in strata(queries, known, bounds).items():
        found = [is_informative(rates[query.id], bounds) for query in part if query.id in rates]
        asked[name] = len(found)
        hits += sum(found)
        if part:
            share = sum(found) / len(found) if found else None
            uniform = None if uniform is None or share is None else uniform + share * len(part) / len(queries)
    groups = sum(asked.values())
    more = round((hits / uniform - groups) * k) if uniform else None
    return {
        "groups": groups,
        "informative": hits,
        "asked": asked,
        "uniform": uniform if hits else None,
        "rollouts_spared": more,
    }
