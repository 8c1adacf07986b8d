"""Metrics against enumeration and straightforward computations."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax.rewards import metrics, selection
from mstar_jax.structs import Query, Response


def response(sample=0, text="", verdict=None, **changes):
    values = {"tokens": (1,) * (sample + 1), "logprob": 0.0, "truncated": False} | changes
    return Response("q", sample, text, verdict=verdict, **values)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
            assert metrics.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        metrics.pass_at_k(n, c, k)


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
    found = metrics.dynamics(groups, k)

    every = [r for group in groups for r in group]
    passed = []
    for group in groups:
        right = [r.verdict == "correct" and not r.truncated for r in group[1:]]
        subsets = list(itertools.combinations(right, min(k, len(right))))
        passed.append(sum(map(any, subsets)) / len(subsets))
    greedy = sum(group[0].verdict == "correct" and not group[0].truncated for group in groups) / 20
    expected = {
        "greedy_accuracy": greedy,
        "pass_at_k": sum(passed) / 20,
        "gap": sum(passed) / 20 - greedy,
        "sampled_accuracy": sum(
            sum(r.verdict == "correct" and not r.truncated for r in g[1:]) / (len(g) - 1) for g in groups
        )
        / 20,
        "distinct_answers": sum(len({r.answer for r in g[1:]} - {None}) for g in groups) / 20,
        "unparsed": sum(r.verdict == "unparsed" for r in every) / len(every),
        "gold_unparsed": sum(r.verdict == "gold-unparsed" for r in every) / len(every),
        "truncated": sum(r.truncated for r in every) / len(every),
        "length": sum(len(r.tokens) for r in every) / len(every),
    }
    assert found == pytest.approx(expected)


def test_a_truncated_response_is_never_correct():
    """Measured as it is selected: greedy, Pass@K, Reward-Pass@2, at every temperature, and best of n."""
    text = "It is 6, for the answer is 6"
    query = Query("q", (), "3 + 3?", answer="6", answer_type="integer")

    def group(truncated):
        values = {"verdict": "correct", "answer": "6", "truncated": truncated, "step_scores": (0.9,)}
        return [response(i, text, temperature=float(i > 0), **values) for i in range(3)]

    shares = ("greedy_accuracy", "pass_at_k", "sampled_accuracy", "reward_pass_at_2")
    for truncated in (False, True):
        found = metrics.dynamics([group(truncated)], 2)
        [row] = metrics.by_temperature([group(truncated)], 2)
        assert [each[key] for each in (found, row) for key in shares] == [float(not truncated)] * 8
        [at] = metrics.curve([(query, group(truncated))], [2])
        assert at == {"n": 2} | dict.fromkeys(
            ("greedy", "best_of_n", "majority", "weighted_vote"), float(not truncated)
        )
        assert len(selection.correct(group(truncated))) == 3 * (not truncated)


def test_dynamics_leaves_out_what_is_undefined():
    greedy = [response(verdict="correct", temperature=0.0)]
    sampled = [response(verdict="wrong"), response(1, verdict="correct")]
    assert {"pass_at_k", "gap", "sampled_accuracy"}.isdisjoint(metrics.dynamics([greedy], 4))
    alone = metrics.dynamics([sampled], 1)
    assert alone["pass_at_k"] == 0.5 and {"greedy_accuracy", "gap"}.isdisjoint(alone)
    assert metrics.dynamics([], 4)["truncated"] == 0.0


# ---- scored samples -----------------------------------------------------------------------------------

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
SAMPLES = st.lists(st.tuples(LEVELS, st.booleans(), st.sampled_from("abcdef")), max_size=8)


def consistent(samples):
    """The same, but equal texts have the same verdict and reward."""
    first = {}
    return [(*first.setdefault(text, (value, right)), text) for value, right, text in samples]


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 9))
def test_reward_pass_at_k(samples, k):
    samples, left, passed = consistent(samples), [], False
    for row in samples:
        if row not in left:
            left.append(row)
    for _ in range(min(k, len(left))):
        best = max(value for value, _, _ in left)
        row = next(row for row in left if row[0] == best)
        left.remove(row)
        passed |= row[1]
    columns = [list(column) for column in zip(*samples)] or [[], [], []]
    assert metrics.reward_pass_at_k(*columns, k) == passed


def test_reward_pass_at_k_by_hand():
    texts, right = ["a", "a", "b", "c"], [False, False, True, False]
    assert metrics.reward_pass_at_k([0.9, 0.9, 0.5, 0.1], right, texts, 2)  # a and its copy count once
    assert not metrics.reward_pass_at_k([0.9, 0.9, 0.5, 0.6], right, texts, 2)
    assert not metrics.reward_pass_at_k([0.5, 0.5, 0.5, 0.5], right, texts, 1)  # ties to the earlier
    with pytest.raises(ValueError, match="got 0"):
        metrics.reward_pass_at_k([0.5], [True], ["a"], 0)
    with pytest.raises(ValueError):
        metrics.reward_pass_at_k([0.5], [True, False], ["a", "b"], 1)


@settings(deadline=None)
@given(SAMPLES)
def test_best_of_n(samples):
    best = None
    for value, right, _ in samples:
        if best is None or value > best[0]:
            best = (value, right)
    rewards, correct = [s[0] for s in samples], [s[1] for s in samples]
    assert metrics.best_of_n(rewards, correct) is (best is not None and best[1])


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 10))
def test_balance_score(wrong, right, target):
    selected, score = wrong + right, metrics.balance_score(wrong + right, right, target)
    if not selected:
        assert score == 0.0
    elif right >= target:
        assert score == pytest.approx(right / selected)
    else:
        assert score == pytest.approx(right / selected * right / target)


def test_balance_score_by_hand():
    assert metrics.balance_score(16, 8) == 0.5
    assert metrics.balance_score(4, 4) == 0.5  # all right, but too few
    for selected, right, target in [(3, 4, 8), (3, -1, 8), (3, 1, 0)]:
        with pytest.raises(ValueError, match=f"got {right}, {selected}, {target}"):
            metrics.balance_score(selected, right, target)


@pytest.mark.parametrize("aggregate", selection.AGGREGATES)
def test_dynamics_of_scored_samples(aggregate):
    rng = np.random.default_rng(1)
    groups = []
    for _ in range(12):
        rows = [response(99, verdict="wrong", temperature=0.0)]  # a greedy response needs no scores
        for i in range(6):
            text, scores = "abcd"[rng.integers(4)], tuple(rng.random(int(rng.integers(1, 4))).tolist())
            rows.append(response(i, text, str(rng.choice(["correct", "wrong"])), step_scores=scores))
        rows.append(response(6, "cut", "correct", truncated=True))
        groups.append(rows)
    found = metrics.dynamics(groups, 4, aggregate=aggregate, alpha=0.3, target=2)
    passed, balance = [], []
    for group in groups:
        rows = [(selection.reward(r, aggregate), r.verdict == "correct", r.text) for r in group[1:]]
        passed.append(metrics.reward_pass_at_k(*zip(*rows), 2))
        kept = [right for value, right, _ in rows if value > 0.3]
        balance.append(metrics.balance_score(len(kept), sum(kept), 2))
    assert found["reward_pass_at_2"] == pytest.approx(sum(passed) / 12) and 0 < sum(passed) < 12
    assert found["balance_score"] == pytest.approx(sum(balance) / 12) and sum(balance) > 0
    plain = metrics.dynamics([[dataclasses.replace(r, step_scores=None) for r in g] for g in groups], 4)
    assert {key: found[key] for key in plain} == plain
    assert found.keys() - plain.keys() == {"reward_pass_at_2", "balance_score"}


def test_dynamics_refuses_a_half_scored_split():
    scored, bare = response(step_scores=(0.5,), verdict="wrong"), response(7, verdict="wrong")
    with pytest.raises(ValueError, match="sample 7: no step scores"):
        metrics.dynamics([[scored], [bare]], 1)


def test_by_temperature():
    rng = np.random.default_rng(2)
    groups = [
        [
            response(
                i,
                str(i),
                str(rng.choice(["correct", "wrong", "unparsed"])),
                temperature=t,
                step_scores=(float(rng.random()),),
                tokens=(1,) * int(rng.integers(1, 9)),
            )
            for i, t in enumerate([0.0, 0.7, 0.3, 1.2, 0.7, 0.3, 1.2, 0.7, 0.3, 1.2])
        ]
        for _ in range(15)
    ]
    found = metrics.by_temperature(groups, 2, alpha=0.2, target=1)
    assert [row["temperature"] for row in found] == [0.3, 0.7, 1.2]
    greedy = sum(g[0].verdict == "correct" for g in groups) / 15
    for row in found:
        samples = [[r for r in g if r.temperature == row["temperature"]] for g in groups]
        alone = metrics.dynamics(samples, 2, alpha=0.2, target=1)  # lengths and shares: of samples only
        gap = alone["pass_at_k"] - greedy
        more = {"temperature": row["temperature"], "greedy_accuracy": greedy, "gap": gap}
        assert row == pytest.approx(alone | more) and "balance_score" in row
    assert {"greedy_accuracy", "gap"}.isdisjoint(metrics.by_temperature([g[1:] for g in groups], 2)[0])
    assert metrics.by_temperature([], 2) == []
    with pytest.raises(ValueError, match="group 14 has no sample at temperature 0.3"):
        metrics.by_temperature([*groups[:-1], [r for r in groups[-1] if r.temperature != 0.3]], 2)


# ---- accuracy against the number of rollouts ----------------------------------------------------------


def query(name, answer, **changes):
    return Query(name, (), "?", answer=answer, **changes)


def sample(i, answer, *scores, **changes):
    return response(i, f"The answer is {answer}", step_scores=scores, **changes)


def test_curve_by_hand():
    halves = [  # 1/2 is right: 0.5 and 1/2 share their weight
        response(0, "The answer is 3", temperature=0.0),
        sample(1, "3", 0.9, 0.8),
        sample(2, "1/2", 0.5),
        sample(3, "0.5", 0.6, 0.45),
        sample(4, "3", 0.02),
    ]
    letters = [  # B is right
        response(0, "The answer is B", temperature=0.0),
        sample(1, "A", 0.3),
        sample(2, "12 cm", 0.9),
        sample(3, "A", 0.4),
        sample(4, "B", 1.0, truncated=True),
    ]
    choice = query("b", "B", options=("10 cm", "12 cm"), answer_type="choice")
    found = metrics.curve([(query("a", "1/2"), halves), (choice, letters)], [1, 2, 3, 4])
    assert found == [
        {"n": 1, "greedy": 0.5, "best_of_n": 0.0, "majority": 0.0, "weighted_vote": 0.0},
        {"n": 2, "greedy": 0.5, "best_of_n": 0.5, "majority": 0.0, "weighted_vote": 0.5},
        {"n": 3, "greedy": 0.5, "best_of_n": 0.5, "majority": 0.5, "weighted_vote": 1.0},
        {"n": 4, "greedy": 0.5, "best_of_n": 0.5, "majority": 0.0, "weighted_vote": 1.0},
    ]
    by_last = metrics.curve([(query("a", "1/2"), halves[1:])], [3], aggregate="last")
    assert by_last == [{"n": 3, "best_of_n": 0.0, "majority": 1.0, "weighted_vote": 1.0}]
    strings = metrics.curve([(query("a", "1/2"), halves)], [3], lambda q: str.__eq__)
    assert strings[0]["majority"] == strings[0]["weighted_vote"] == 0.0  # as strings they do not share


ROWS = st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.integers(0, 8)), min_size=6, max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("123"), ROWS), min_size=1, max_size=4))
def test_curve(rows):
    groups = [
        (query(str(at), gold), [sample(i, a or "", value / 8) for i, (a, value) in enumerate(group)])
        for at, (gold, group) in enumerate(rows)
    ]
    for row in metrics.curve(groups, range(1, 7)):
        right = {"best_of_n": 0, "majority": 0, "weighted_vote": 0}
        for gold, group in rows:
            given_answers, values = zip(*group[: row["n"]])
            right["best_of_n"] += given_answers[values.index(max(values))] == gold
            for name, weights in ("majority", [1] * row["n"]), ("weighted_vote", values):
                sums = {a: 0 for a in given_answers if a is not None}  # in order of first occurrence
                for a, weight in zip(given_answers, weights):
                    if a is not None:
                        sums[a] += weight
                right[name] += any(sums.values()) and max(sums, key=sums.get) == gold
        assert row == {"n": row["n"]} | {name: pytest.approx(c / len(rows)) for name, c in right.items()}


def test_curve_refuses():
    group = [sample(0, "1", 0.5), sample(1, "1", 0.5)]
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"query 'a' has 2 samples; n={n}"):
            metrics.curve([(query("a", "1"), group)], [n])
    with pytest.raises(ValueError, match="query 'a' has no gold"):
        metrics.curve([(query("a", None), group)], [1])
    with pytest.raises(ValueError, match="no step scores"):
        metrics.curve([(query("a", "1"), [response(text="The answer is 1")])], [1])


# ---- intervals and tests ------------------------------------------------------------------------------


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_share_is_196_sigma_away(counts):
    right, n = counts
    share = right / n
    low, high = metrics.wilson(share, n)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert math.isclose(abs(share - end), 1.959964 * math.sqrt(end * (1 - end) / n), rel_tol=1e-5)


def test_wilson_by_hand():
    assert metrics.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert metrics.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert metrics.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    for share, n in ((0.5, 0), (1.1, 10), (-0.1, 10)):
        with pytest.raises(ValueError, match="share in 0..1"):
            metrics.wilson(share, n)


def test_wilson_of_a_mean_lies_between_its_neighbours():
    ends = [metrics.wilson(count / 10, 10) for count in (6, 7)]
    for end, low, high in zip(metrics.wilson(0.625, 10), *ends):
        assert end == pytest.approx(0.75 * low + 0.25 * high)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired(pairs):
    found = metrics.paired(*zip(*pairs))
    changes = [int(b) - int(a) for a, b in pairs]
    assert found["difference"] == pytest.approx(np.mean(changes))
    width = 1.959964 * np.std(changes) / math.sqrt(len(changes))
    ends = [np.mean(changes) - width, np.mean(changes) + width]
    assert found["interval"] == pytest.approx(ends, abs=1e-6)  # seven digits of the quantile
    gained, lost = changes.count(1), changes.count(-1)
    assert (found["gained"], found["lost"]) == (gained, lost)
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    expected = min(1.0, 2 * tail / 2 ** (gained + lost))
    assert found["p"] == pytest.approx(expected)


def test_paired_needs_the_same_questions():
    for first, second in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="the same questions"):
            metrics.paired(first, second)


# ---- the reward model ---------------------------------------------------------------------------------

SCORED = st.lists(st.tuples(LEVELS, st.booleans()), max_size=8)


def columns(rows):
    return [value for value, _ in rows], [label for _, label in rows]


def pairs(rows):
    """Per pair of a positive and a negative: 1, 1/2 or 0."""
    up, down = [v for v, label in rows if label], [v for v, label in rows if not label]
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a in up for b in down]


@settings(deadline=None)
@given(SCORED)
def test_auc(rows):
    won = pairs(rows)
    assert metrics.auc(*columns(rows)) == (pytest.approx(sum(won) / len(won)) if won else None)


@settings(deadline=None)
@given(st.lists(SCORED, max_size=5))
def test_within_auc(groups):
    won = [each for rows in groups for each in pairs(rows)]
    expected = pytest.approx(sum(won) / len(won)) if won else None
    assert metrics.within_auc(columns(rows) for rows in groups) == expected


def test_within_auc_gives_no_credit_for_telling_queries_apart():
    easy, hard = ([0.9, 0.8], [0, 1]), ([0.2, 0.1, 0.1], [0, 0, 1])
    assert metrics.within_auc([easy, hard]) == pytest.approx(0.5 / 3)
    assert metrics.auc(easy[0] + hard[0], easy[1] + hard[1]) == pytest.approx(2.5 / 6)


def test_auc_refuses_soft_labels():
    for scores, labels in [([0.1, 0.2], [0.5, 1]), ([0.1], [0, 1]), ([0.1, float("nan")], [0, 1])]:
        with pytest.raises(ValueError):
            metrics.auc(scores, labels)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), min_size=1, max_size=20), st.integers(1, 12))
def test_calibration(rows, bins):
    scores, labels = [v / 100 + 0.0003 * (v < 100) for v, _ in rows], [label for _, label in rows]
    found = metrics.calibration(scores, labels, bins)
    ece, expected = 0.0, []
    for at in range(bins):
        low, high = at / bins, (at + 1) / bins
        inside = [(s, y) for s, y in zip(scores, labels) if low <= s < high or at == bins - 1 and s == 1]
        if inside:
            score, label = (sum(column) / len(inside) for column in zip(*inside))
            ece += len(inside) / len(rows) * abs(score - label)
            expected.append({"low": low, "high": high, "count": len(inside), "score": score, "label": label})
    assert [pytest.approx(row) for row in expected] == found["bins"]
    assert found["ece"] == pytest.approx(ece, abs=1e-12)
    assert found["brier"] == pytest.approx(sum((s - y) ** 2 for s, y in zip(scores, labels)) / len(rows))


def test_calibration_by_hand():
    found = metrics.calibration([0.0, 0.05, 0.5, 1.0], [0, 0.1, 1, 1], bins=2)
    low, high = found["bins"]  # 0.5 belongs to the upper bin
    assert (low["count"], high["count"], high["score"], high["label"]) == (2, 2, 0.75, 1.0)
    assert found["ece"] == pytest.approx(0.5 * 0.025 + 0.5 * 0.25)
    for scores, labels in [([], []), ([0.5], [0.5, 0.5]), ([1.5], [1]), ([0.5], [-1]), ([float("nan")], [0])]:
        with pytest.raises(ValueError):
            metrics.calibration(scores, labels)
