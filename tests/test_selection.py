"""Selection and its metrics against enumeration and a straightforward reckoning."""

import itertools

import numpy as np
import pytest

from mstar_jax import selection
from mstar_jax.structs import Query, Response


def response(sample=0, text="", verdict=None, **changes):
    values = {"tokens": (1,) * (sample + 1), "logprob": 0.0, "truncated": False} | changes
    return Response("q", sample, text, verdict=verdict, **values)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            assert selection.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        selection.pass_at_k(n, c, k)


def test_dynamics():
    rng = np.random.default_rng(0)
    verdicts = ["correct", "wrong", "unparsed", "gold-unparsed"]
    groups, k = [], 3
    for _ in range(20):
        n = int(rng.integers(2, 7))  # one greedy response, and 1 to 5 samples
        groups.append(
            [
                response(
                    i,
                    verdict=str(rng.choice(verdicts)),
                    answer=[None, "1", "2", "3"][rng.integers(4)],
                    truncated=bool(rng.integers(2)),
                    temperature=0.7 if i else 0.0,
                    tokens=(5,) * int(rng.integers(1, 9)),
                )
                for i in range(n)
            ]
        )
    found = selection.dynamics(groups, k)

    every = [r for group in groups for r in group]
    passed = []
    for group in groups:
        right = [r.verdict == "correct" for r in group[1:]]
        subsets = list(itertools.combinations(right, min(k, len(right))))
        passed.append(sum(map(any, subsets)) / len(subsets))
    greedy = sum(group[0].verdict == "correct" for group in groups) / 20
    expected = {
        "greedy_accuracy": greedy,
        "pass_at_k": sum(passed) / 20,
        "gap": sum(passed) / 20 - greedy,
        "sampled_accuracy": sum(sum(r.verdict == "correct" for r in g[1:]) / (len(g) - 1) for g in groups)
        / 20,
        "distinct_answers": sum(len({r.answer for r in g[1:]} - {None}) for g in groups) / 20,
        "unparsed": sum(r.verdict == "unparsed" for r in every) / len(every),
        "gold_unparsed": sum(r.verdict == "gold-unparsed" for r in every) / len(every),
        "truncated": sum(r.truncated for r in every) / len(every),
        "length": sum(len(r.tokens) for r in every) / len(every),
    }
    assert found == pytest.approx(expected)


def test_dynamics_leaves_out_what_cannot_be_told():
    greedy = [response(verdict="correct", temperature=0.0)]
    sampled = [response(verdict="wrong"), response(1, verdict="correct")]
    assert {"pass_at_k", "gap", "sampled_accuracy"}.isdisjoint(selection.dynamics([greedy], 4))
    alone = selection.dynamics([sampled], 1)
    assert alone["pass_at_k"] == 0.5 and {"greedy_accuracy", "gap"}.isdisjoint(alone)
    assert selection.dynamics([], 4)["truncated"] == 0.0


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
