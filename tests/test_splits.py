"""The share of the queries that an iteration asks."""

import collections

from mstar_jax.data import splits
from mstar_jax.structs import Query

QUERIES = [Query(str(n), (), "How many?", answer="1") for n in range(10)]


def asked(fraction, iterations, seed=3):
    shares = [splits.share(QUERIES, fraction, t, seed) for t in range(1, iterations + 1)]
    return [[query.id for query in share] for share in shares]


def test_an_epoch_asks_every_query_once():
    found = asked(0.2, 10)
    assert {len(share) for share in found} == {2}
    first, second = sum(found[:5], []), sum(found[5:], [])
    assert sorted(first) == sorted(second) == [query.id for query in QUERIES]
    assert first != second  # each epoch in an order of its own
    assert found == asked(0.2, 10) != asked(0.2, 10, seed=4)


def test_shares_that_do_not_divide_an_epoch_run_into_the_next():
    found = asked(0.3, 10)  # three epochs
    assert {len(share) for share in found} == {3}
    assert set(collections.Counter(sum(found, [])).values()) == {3}
    assert asked(0.01, 1) == [asked(0.1, 1)[0][:1]]  # at least one
