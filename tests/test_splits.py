"""The queries that an iteration asks."""

import collections

import pytest

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


# ---- the informative curriculum -----------------------------------------------------------------------

MANY = [Query(str(n), (), "How many?", answer="1") for n in range(400)]


def chosen(known, t=3, queries=MANY, seed=0, bounds=(0.0, 1.0), fraction=0.25, remeasure=0.1):
    found = splits.informative(queries, fraction, t, seed, known=known, bounds=bounds, remeasure=remeasure)
    return [query.id for query in found]


def measured(rates, at=4):
    return {str(n): splits.Measured(at, rate) for n, rate in rates.items()}


def test_nothing_measured_is_the_first_share():
    assert chosen({}, t=1) == [query.id for query in splits.share(MANY, 0.25, 1, 0)]


def test_informative_queries_come_first():
    """Of 400: 60 between the bounds, 100 that were never measured, the others all right or all wrong."""
    rates = dict.fromkeys(range(60), 0.5) | {n: float(n % 2) for n in range(160, 400)}
    known = measured(rates)
    for t in range(1, 5):
        found = [int(each) for each in chosen(known, t)]
        assert len(found) == len(set(found)) == 100
        assert set(range(60)) <= set(found)
        assert sum(60 <= n < 160 for n in found) == 30 and sum(n >= 160 for n in found) == 10
    assert chosen(known) == chosen(dict(reversed(known.items()))) != chosen(known, t=4)
    assert chosen(known, seed=1) != chosen(known)
    again = chosen(known, remeasure=0.0)  # none is kept for the settled ones
    assert sum(60 <= int(each) < 160 for each in again) == 40


def test_more_informative_queries_than_are_asked():
    """A tenth is still kept for new queries, and another one for settled ones; the rest is drawn evenly."""
    known = measured(dict.fromkeys(range(200), 0.25) | dict.fromkeys(range(300, 400), 1.0))
    counts = collections.Counter(int(each) for seed in range(200) for each in chosen(known, seed=seed))
    assert sum(counts[n] for n in range(200)) == 80 * 200
    assert sum(counts[n] for n in range(200, 300)) == sum(counts[n] for n in range(300, 400)) == 10 * 200
    # 200 draws of 80 of 200: 80 each, with a standard deviation of sqrt(200 * 0.4 * 0.6) = 6.9
    assert all(abs(counts[n] - 80) < 6 * 6.9 for n in range(200))


def test_bounds_and_the_longest_not_measured():
    known = {str(n): splits.Measured(at=n % 7, rate=n / 400) for n in range(400)}
    found = chosen(known, bounds=(0.25, 0.75), fraction=0.2, remeasure=0.0)
    assert all(100 <= int(each) <= 300 for each in found)
    latest = max(known[each].at for each in found)  # 80 of 201: 28 or 29 of each time
    assert latest == 2 and sum(known[each].at < 2 for each in found) == sum(
        100 <= n <= 300 and n % 7 < 2 for n in range(400)
    )
    assert not splits.is_informative(0.0, (0.0, 1.0)) and not splits.is_informative(1.0, (0.0, 1.0))
    assert splits.is_informative(0.25, (0.25, 0.5)) and splits.is_informative(0.5, (0.25, 0.5))


def test_few_queries():
    few = MANY[:3]
    for fraction, count in ((0.01, 1), (0.5, 2), (1.0, 3)):
        for rates in ({}, {0: 0.5}, {0: 0.0, 1: 1.0, 2: 0.0}, {0: 0.5, 1: 0.5, 2: 0.5}):
            for remeasure in (0.0, 0.1, 0.5):
                found = chosen(measured(rates), queries=few, fraction=fraction, remeasure=remeasure)
                assert len(found) == len(set(found)) == count


@pytest.mark.parametrize("remeasure", [0.1, 0.29, 0.5])
def test_a_share_of_less_than_a_query_is_kept_now_and_then(remeasure):
    """Of 8 or 9 of 90 queries a tenth is none; over 100 iterations it is that share all the same."""
    rates = dict.fromkeys(range(30), 0.5) | dict.fromkeys(range(30, 60), 1.0)
    for fraction, count in ((8 / 90, 8), (0.1, 9)):
        found = collections.Counter()
        for t in range(1, 101):
            asked = chosen(measured(rates), t, MANY[:90], fraction=fraction, remeasure=remeasure)
            assert len(set(asked)) == count
            kinds = ("informative", "settled", "new")  # see rates
            found.update(kinds[int(n) // 30] for n in asked)
        share = min(100 * remeasure * count, 100 * (count // 2))  # never more than half of an odd number
        assert found["new"] == found["settled"] == pytest.approx(share, abs=1)


def test_what_was_spared():
    """By hand. 100 queries: 20 informative before, 30 new, 50 settled; asked 10, 5 and 5 of them, of which 8,
    2 and 1 groups are informative now. Uniform: 0.2 * 0.8 + 0.3 * 0.4 + 0.5 * 0.2 = 0.38, so 11 informative
    groups take 11 / 0.38 = 28.9 groups instead of 20: with 4 responses each 36 rollouts more."""
    queries = MANY[:100]
    known = measured(dict.fromkeys(range(20), 0.5) | dict.fromkeys(range(50, 100), 1.0))
    asked = [*range(10), *range(20, 25), *range(50, 55)]
    hits = {*range(8), 20, 21, 50}
    rates = {str(n): 0.75 if n in hits else 0.0 for n in asked}
    found = splits.spared(queries, rates, 4, known=known, bounds=(0.0, 1.0))
    assert found["uniform"] == pytest.approx(0.38)
    assert found | {"uniform": 0} == {
        "groups": 20,
        "informative": 11,
        "asked": {"informative": 10, "new": 5, "settled": 5},
        "uniform": 0,
        "rollouts_spared": 36,
    }
    none = splits.spared(queries, dict.fromkeys(rates, 1.0), 4, known=known, bounds=(0.0, 1.0))
    assert none["informative"] == 0 and none["uniform"] is none["rollouts_spared"] is None
    some = {each: rate for each, rate in rates.items() if int(each) < 50}  # no settled query was asked
    assert splits.spared(queries, some, 4, known=known, bounds=(0.0, 1.0))["rollouts_spared"] is None


def test_asking_uniformly_spares_nothing():
    """If all strata are asked alike, the estimate is the share that was found."""
    known = measured(dict.fromkeys(range(100), 0.5) | dict.fromkeys(range(200, 400), 0.0))
    rates = {str(n): 0.5 if n % 8 == 0 else 0.0 for n in range(0, 400, 2)}
    found = splits.spared(MANY, rates, 16, known=known, bounds=(0.0, 1.0))
    assert found["informative"] == 50 and found["uniform"] == pytest.approx(0.25)
    assert found["rollouts_spared"] == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("hardest", (0.0, 1.0), "rollouts"), "evolve.curriculum = 'hardest': choose one of 'uniform', 'inf"),
        (("informative", (0.0, 1.0), "answers"), "evolve.data = 'answers' has no rollouts to go by"),
        (("informative", (0.5, 0.5), "rollouts"), r"evolve.informative = \(0.5, 0.5\): give two pass rates"),
        (("informative", (0.1,), "rollouts"), r"evolve.informative = \(0.1,\)"),
        (("informative", (-0.1, 1.0), "rollouts"), r"evolve.informative = \(-0.1, 1.0\)"),
    ],
)
def test_choices_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        splits.check_choice(*values)
    splits.check_choice("uniform", (0.0, 1.0), "answers")
