"""Which responses train, against straightforward implementations."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax.answers import check
from mstar_jax.rewards import selection
from mstar_jax.structs import Query, Response


def response(sample=0, text="", verdict=None, **changes):
    values = {"tokens": (1,) * (sample + 1), "logprob": 0.0, "truncated": False} | changes
    return Response("q", sample, text, verdict=verdict, **values)


def test_random_k():
    pool = [response(i) for i in range(10)]
    draws = [selection.random_k(pool, 4, np.random.default_rng(seed)) for seed in range(300)]
    assert draws[7] == selection.random_k(pool, 4, np.random.default_rng(7))
    for drawn in draws:
        samples = [r.sample for r in drawn]
        assert len(set(samples)) == 4 and samples == sorted(samples)
    counts = np.bincount([r.sample for drawn in draws for r in drawn], minlength=10)
    assert counts.min() > 80 and counts.max() < 160  # 120 each, sd 8.5
    assert selection.random_k(pool, 0, np.random.default_rng(0)) == pool
    assert selection.random_k(pool, 10, np.random.default_rng(0)) == pool
    assert selection.random_k([], 2, np.random.default_rng(0)) == []


def test_distinct_keeps_the_first_of_a_text_and_the_order():
    texts = ["a", "b", "a", "c", "b", "a"]
    kept = selection.distinct([response(i, text) for i, text in enumerate(texts)])
    assert [(r.sample, r.text) for r in kept] == [(0, "a"), (1, "b"), (3, "c")]


def test_correct_needs_the_verdict_and_an_end():
    rows = [
        response(i, verdict=v) for i, v in enumerate(["correct", "wrong", "unparsed", "gold-unparsed", None])
    ]
    cut = response(5, verdict="correct", truncated=True)
    assert selection.correct([*rows, cut]) == rows[:1]


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("Sum 3 + 4 = 7\nThe answer is 7", "7", "correct"),
        ("Sum 3 + 4 = 8\nThe answer is 8", "8", "wrong"),
        ("Bars and bars", None, "unparsed"),
    ],
)
def test_judge(text, answer, verdict):
    labelled = Query("q", (), "3 + 4?", answer="7", answer_type="integer")
    judged = selection.judge(labelled, response(text=text))
    assert (judged.answer, judged.verdict) == (answer, verdict)
    unlabelled = Query("q", (), "3 + 4?", answer_type="integer")
    judged = selection.judge(unlabelled, response(text=text))
    assert (judged.answer, judged.verdict) == (answer, None)


# ---- rewards ------------------------------------------------------------------------------------------


SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@settings(deadline=None)
@given(SCORES)
def test_reward(scores):
    scored = response(step_scores=tuple(scores))
    least, product = 1.0, 1.0
    for score in scores:
        least, product = score if score < least else least, product * score
    assert selection.reward(scored) == selection.reward(scored, "min") == least
    assert selection.reward(scored, "last") == scores[-1]
    assert selection.reward(scored, "product") == pytest.approx(product)
    assert selection.reward(scored, "mean") == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("aggregate", selection.AGGREGATES)
def test_reward_of_what_has_no_steps_or_no_end(aggregate):
    assert selection.reward(response(step_scores=()), aggregate) == 0.0
    assert selection.reward(response(step_scores=(0.9, 0.8), truncated=True), aggregate) == 0.0
    assert selection.reward(response(truncated=True), aggregate) == 0.0


@pytest.mark.parametrize(
    ("scores", "aggregate", "complaint"),
    [
        (None, "min", "query 'q', sample 3: no step scores"),
        ((0.5, float("nan")), "min", "query 'q', sample 3: .* 0..1, got .*nan"),
        ((0.5, -2.0), "mean", "0..1, got .*-2.0"),
        ((0.5,), "median", "min, last, product, mean .*'median'"),
    ],
)
def test_reward_refuses(scores, aggregate, complaint):
    with pytest.raises(ValueError, match=complaint):
        selection.reward(response(3, step_scores=scores), aggregate)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12), st.integers(0, 13))
def test_top_k_is_repeated_picking_of_the_first_best(rewards, k):
    pool = [response(i) for i in range(len(rewards))]
    left, picked = list(enumerate(rewards)), set()
    while left and (not k or len(picked) < k):
        best = left[0]
        for each in left:
            if each[1] > best[1]:
                best = each
        left.remove(best)
        picked.add(best[0])
    assert [r.sample for r in selection.top_k(pool, rewards, k)] == sorted(picked)


def test_top_k_by_hand():
    pool = [response(i) for i in range(4)]
    assert [r.sample for r in selection.top_k(pool, [0.2, 0.9, 0.9, 0.9], 2)] == [1, 2]
    assert [r.sample for r in selection.top_k(pool, [0.9, 0.1, 0.2, 1.0], 2)] == [0, 3]
    with pytest.raises(ValueError):
        selection.top_k(pool, [0.5] * 3, 2)


def test_above_is_strict():
    pool = [response(i) for i in range(4)]
    assert [r.sample for r in selection.above(pool, [0.5, 0.51, 0.0, 1.0], 0.5)] == [1, 3]
    assert [r.sample for r in selection.above(pool, [0.0, 0.1, 0.0, 1.0], 0.0)] == [1, 3]
    with pytest.raises(ValueError):
        selection.above(pool, [0.5] * 3, 0.1)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=10))
def test_frequencies(texts):
    pool = [response(i, text) for i, text in enumerate(texts)]
    assert selection.frequencies(pool) == [sum(t == text for t in texts) for text in texts]


# ---- votes --------------------------------------------------------------------------------------------

FREE = Query("q", (), "How much?")
OPTIONS = Query("q", (), "Which?", options=("10 cm", "12 cm", "15 cm"), answer_type="choice")
# answers and the class that each belongs to
SPELLINGS = [("1/2", 0), ("0.5", 0), ("50%", 0), ("2", 1), ("two", 1), ("2.0", 1), ("3", 2), ("red ball", 3)]
SPELLINGS += [("The Red Ball", 3), (None, None)]
BALLOTS = st.lists(st.tuples(st.sampled_from(SPELLINGS), st.integers(0, 8), st.booleans()), max_size=12)


def ballots(rows):
    """(responses, weights) of rows ((answer, class), weight in eighths, truncated)."""
    pool = [response(i, answer=a, truncated=cut) for i, ((a, _), _, cut) in enumerate(rows)]
    return pool, [weight / 8 for _, weight, _ in rows]


def winner(rows):
    """(place of the winning class's first answer, its share, number of classes), or None; by hand."""
    sums, first = {}, {}
    for at, ((answer, name), weight, cut) in enumerate(rows):
        if answer is not None and not cut:
            sums[name] = sums.get(name, 0) + Fraction(weight)
            first.setdefault(name, at)
    best = None
    for name in sums:
        if (
            best is None
            or sums[name] > sums[best]
            or (sums[name] == sums[best] and first[name] < first[best])
        ):
            best = name
    if best is None or sums[best] == 0:
        return None
    return first[best], sums[best] / sum(weight for _, weight, _ in rows), len(sums)


@settings(deadline=None)
@given(BALLOTS)
def test_weighted_vote(rows):
    expected = winner(rows)
    found = selection.vote(*ballots(rows), selection.checker(FREE))
    if expected is None:
        assert found is None
    else:
        at, share, classes = expected
        assert found == selection.Vote(rows[at][0][0], pytest.approx(float(share)), classes)


@settings(deadline=None)
@given(BALLOTS)
def test_majority_vote(rows):
    rows = [(spelling, 1, cut) for spelling, _, cut in rows]
    pool, _ = ballots(rows)
    found, expected = selection.vote(pool, [1.0] * len(pool), selection.checker(FREE)), winner(rows)
    assert (found is None) == (expected is None)
    assert found is None or found.answer == rows[expected[0]][0][0]


@settings(deadline=None)
@given(BALLOTS, st.integers(0, 8))
def test_pseudo_label_abstains_below_the_threshold(rows, eighths):
    expected = winner(rows)
    found = selection.pseudo_label(FREE, *ballots(rows), eighths / 8)
    if expected is None or expected[1] < Fraction(eighths, 8):
        assert found is None
    else:
        assert found == dataclasses.replace(FREE, answer=check.tidy(rows[expected[0]][0][0]))


@pytest.mark.parametrize(
    ("given_answers", "weights", "answer", "share", "classes"),
    [
        (["1", "2", "2"], [0.9, 0.4, 0.4], "1", 0.9 / 1.7, 2),  # PRM-weighted
        (["1", "2", "2"], [1, 1, 1], "2", 2 / 3, 2),  # majority
        (["0.5", "3", "1/2"], [0.3, 0.5, 0.3], "0.5", 0.6 / 1.1, 2),  # equal values share
        (["2", "1", "1", "2"], [0.1, 0.2, 0.3, 0.4], "2", 0.5, 2),  # a tie
        (["2", "2", "2", "1", "1", "1"], [0.3, 0.2, 0.1, 0.1, 0.2, 0.3], "2", 0.5, 2),  # in any order of sums
        (["5", None, None], [1, 1, 2], "5", 0.25, 1),  # responses that do not vote still count
    ],
)
def test_vote_by_hand(given_answers, weights, answer, share, classes):
    pool = [response(i, answer=a) for i, a in enumerate(given_answers)]
    found = selection.vote(pool, weights, selection.checker(FREE))
    assert found == selection.Vote(answer, pytest.approx(share), classes)


def test_nobody_votes():
    same = selection.checker(FREE)
    assert selection.vote([], [], same) is None
    assert selection.vote([response(answer=None)], [1.0], same) is None
    assert selection.vote([response(answer="1", truncated=True)], [1.0], same) is None
    assert selection.vote([response(answer="1"), response(1)], [0.0, 1.0], same) is None
    with pytest.raises(ValueError):
        selection.vote([response(answer="1")], [], same)


def test_classes_are_formed_against_their_first_member():
    """Equality is not transitive: 50% is 0.5 and 50, but 50 is not 0.5."""
    for given_answers, answer, share, classes in [
        (["50%", "0.5", "50"], "50%", 1.0, 1),
        (["0.5", "50", "50%"], "0.5", 2 / 3, 2),
        (["50", "0.5", "50%"], "50", 2 / 3, 2),
    ]:
        pool = [response(i, answer=a) for i, a in enumerate(given_answers)]
        found = selection.vote(pool, [1, 1, 1], selection.checker(FREE))
        assert found == selection.Vote(answer, pytest.approx(share), classes)


def test_letters_vote_as_letters():
    texts = ["The answer is (B) 12 cm.", "The answer is C", "The answer is 12", "The answer is b", "no idea"]
    pool = [selection.judge(OPTIONS, response(i, text)) for i, text in enumerate(texts)]
    found = selection.vote(pool, [1, 2, 1, 1, 0], selection.checker(OPTIONS))
    assert (found.share, found.classes) == (0.6, 2)
    labelled = selection.pseudo_label(OPTIONS, pool, [1, 2, 1, 1, 0], 0.6)
    assert labelled == dataclasses.replace(OPTIONS, answer="B")
    verdicts = [selection.judge(labelled, r).verdict for r in pool]
    assert verdicts == ["correct", "wrong", "correct", "correct", "unparsed"]


@pytest.mark.parametrize(
    ("query", "answer"),
    [(OPTIONS, "13 cm"), (OPTIONS, "E"), (dataclasses.replace(FREE, answer_type="integer"), "red")],
)
def test_pseudo_label_abstains_where_the_winner_is_no_gold_answer(query, answer):
    assert selection.pseudo_label(query, [response(answer=answer)], [1.0], 0.0) is None
