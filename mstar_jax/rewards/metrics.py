"""Numbers that describe a set of responses or of rewards (numpy only)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mstar_jax.rewards import selection
from mstar_jax.structs import Query, Response

# ---- 1. one query -------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that k of n samples, c of them correct, hold a correct one.

    Source: Chen et al. 2021, 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: k is not within 1..n, or c not within 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def reward_pass_at_k(rewards: Sequence[float], correct: Sequence[bool], texts: Sequence[str], k: int) -> bool:
    """Whether a correct one is among the k different texts with the highest rewards of all K responses.

    Copies of a text count once: else the two highest are often the same response. Of equal rewards the
    earlier ranks higher.
    """
    if k < 1:
        raise ValueError(f"Reward-Pass@k needs k >= 1, got {k}")
    ranked = sorted(zip(rewards, texts, correct, strict=True), key=lambda row: -row[0])
    first: dict[str, bool] = {}
    for _, text, right in ranked:
        first.setdefault(text, right)
    return any(list(first.values())[:k])


def best_of_n(rewards: Sequence[float], correct: Sequence[bool]) -> bool:
    """Whether the response of the highest reward, of equal ones the first, is correct."""
    pairs = list(zip(rewards, correct, strict=True))
    return bool(max(pairs, key=lambda pair: pair[0])[1]) if pairs else False


def balance_score(selected: int, right: int, target: int = 8) -> float:
    """How many and how good the selected responses are: min(c / target, 1) c / n, 0 where n is 0.

    Source: B-STaR (Zeng et al. 2024).

    Args:
      selected: n, responses that the reward keeps.
      right: c, those of them that are correct.
      target: correct responses that are enough.
    """
    if not (0 <= right <= selected and target >= 1):
        raise ValueError(f"need 0 <= right <= selected and target >= 1, got {right}, {selected}, {target}")
    return min(right / target, 1.0) * right / selected if selected else 0.0


# ---- 2. a split ---------------------------------------------------------------------------------------


def dynamics(
    groups: Sequence[Sequence[Response]],
    k: int,
    *,
    aggregate: str = "min",
    alpha: float = 0.5,
    target: int = 8,
) -> dict[str, float]:
    """The metrics of self-evolution on one split.

    Args:
      groups: per query: its greedy response (temperature 0) if there is one, and its samples.
      k: for Pass@K, at most the number of samples.
      aggregate: what makes a reward of step scores, one of `selection.AGGREGATES`.
      alpha: the balance score counts samples with a reward above it as selected.
      target: the balance score's.

    Returns:
      greedy_accuracy, pass_at_k, gap (Pass@K - greedy), sampled_accuracy, unparsed and truncated
      (shares of all responses), length (tokens), distinct_answers (per query, over its samples), and of
      scored samples reward_pass_at_2 and balance_score. What cannot be told (no greedy response, no
      samples, no scores) is absent.

    Raises:
      ValueError: some samples have scores and others, not truncated, have none.
    """
    everything = [r for group in groups for r in group]
    greedy = [r for r in everything if r.temperature == 0]
    samples = [[r for r in group if r.temperature > 0] for group in groups]
    out: dict[str, float] = {}
    if greedy:
        out["greedy_accuracy"] = _mean([r.verdict == "correct" for r in greedy])
    if samples and samples[0]:
        right = [[r.verdict == "correct" for r in group] for group in samples]
        out["pass_at_k"] = _mean([pass_at_k(len(r), sum(r), min(k, len(r))) for r in right])
        out["sampled_accuracy"] = _mean([sum(r) / len(r) for r in right])
        found = [{r.answer for r in group if r.answer is not None} for group in samples]
        out["distinct_answers"] = _mean([len(f) for f in found])
        if any(r.step_scores is not None for group in samples for r in group):
            rewards = [[selection.reward(r, aggregate) for r in group] for group in samples]
            texts = [[r.text for r in group] for group in samples]
            passed = [reward_pass_at_k(*rows, 2) for rows in zip(rewards, right, texts)]
            out["reward_pass_at_2"] = _mean(passed)
            kept = [[c for value, c in zip(*rows) if value > alpha] for rows in zip(rewards, right)]
            out["balance_score"] = _mean([balance_score(len(c), sum(c), target) for c in kept])
    if greedy and "pass_at_k" in out:
        out["gap"] = out["pass_at_k"] - out["greedy_accuracy"]
    out["unparsed"] = _mean([r.verdict == "unparsed" for r in everything])
    out["gold_unparsed"] = _mean([r.verdict == "gold-unparsed" for r in everything])
    out["truncated"] = _mean([r.truncated for r in everything])
    out["length"] = _mean([len(r.tokens) for r in everything])
    return out


def by_temperature(groups: Sequence[Sequence[Response]], k: int, **settings: Any) -> list[dict[str, float]]:
    """The dynamics of the samples of each temperature apart: the grid that the next one is chosen from.

    Args:
      groups: per query: its greedy response if there is one, and its samples of every temperature.
      k: for Pass@K.
      **settings: aggregate, alpha and target of `dynamics`.

    Returns:
      Per temperature above 0, ascending: `temperature` and the dynamics of its samples; greedy_accuracy
      is the same in all of them, and gap is the distance from it.

    Raises:
      ValueError: a query has no sample of a temperature that another has.
    """
    greedy = [r.verdict == "correct" for group in groups for r in group if r.temperature == 0]
    out = []
    for temperature in sorted({r.temperature for group in groups for r in group} - {0.0}):
        at = [[r for r in group if r.temperature == temperature] for group in groups]
        if not all(at):
            where = at.index([])
            raise ValueError(f"group {where} has no sample at temperature {temperature}, others have")
        row = {"temperature": temperature, **dynamics(at, k, **settings)}
        if greedy:
            row["greedy_accuracy"] = _mean(greedy)
            row["gap"] = row["pass_at_k"] - row["greedy_accuracy"]
        out.append(row)
    return out


def curve(
    groups: Sequence[tuple[Query, Sequence[Response]]],
    ns: Sequence[int],
    same_of: Callable[[Query], Callable[[str, str], bool]] = selection.checker,
    *,
    aggregate: str = "min",
) -> list[dict[str, float]]:
    """Accuracy against the number of rollouts, by how one answer is made of them (Figure 2a).

    Args:
      groups: labelled queries, each with its scored samples and, if there is one, its greedy response. A
        response is judged here by its query's answer, whatever it was judged by before.
      ns: numbers of rollouts: the first n samples of every query.
      same_of: which answers of a query vote together.
      aggregate: what makes a reward of step scores.

    Returns:
      Per n: `n`, best_of_n, majority, weighted_vote and, where there are greedy responses, greedy.

    Raises:
      ValueError: a query has no gold answer or fewer than n samples, or a sample has no scores.
    """
    greedy: list[bool] = []
    rows: dict[int, list[tuple[bool, bool, bool]]] = {n: [] for n in ns}
    for query, group in groups:
        if query.answer is None:
            raise ValueError(f"query {query.id!r} has no gold answer to measure its votes by")
        judged = [selection.judge(query, r) for r in group]
        greedy += [r.verdict == "correct" for r in judged if r.temperature == 0]
        samples = [r for r in judged if r.temperature > 0]
        rewards = [selection.reward(r, aggregate) for r in samples]
        right = {r.answer: r.verdict == "correct" for r in samples}  # a verdict depends on the answer alone
        same = same_of(query)
        for n in rows:
            if not 1 <= n <= len(samples):
                raise ValueError(f"query {query.id!r} has {len(samples)} samples; n={n} is not within them")
            votes = [selection.vote(samples[:n], weights[:n], same) for weights in ([1.0] * n, rewards)]
            majority, weighted = (won is not None and right[won.answer] for won in votes)
            best = best_of_n(rewards[:n], [right[r.answer] for r in samples[:n]])
            rows[n].append((best, majority, weighted))
    out = []
    for n, found in rows.items():
        row = {"n": n} | ({"greedy": _mean(greedy)} if greedy else {})
        for at, name in enumerate(("best_of_n", "majority", "weighted_vote")):
            row[name] = _mean([each[at] for each in found])
        out.append(row)
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Compares two policies on the same questions.

    Args:
      first: per question, was the one right.
      second: was the other.

    Returns:
      difference (share right of the second less that of the first), interval (its 95 % interval, from the
      variance of the paired differences), gained and lost (questions), and p, two-sided, of McNemar's exact
      test: were gains and losses equally likely.

    Raises:
      ValueError: other numbers of questions, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need the same questions, got {len(first)} and {len(second)}")
    gained = sum(b and not a for a, b in zip(first, second))
    lost = sum(a and not b for a, b in zip(first, second))
    n, changed, change = len(first), gained + lost, (gained - lost) / len(first)
    width = 1.959964 * math.sqrt(max(changed / n - change**2, 0.0) / n)
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    p = min(1.0, 2 * tail / 2**changed)  # whole numbers: exact for any number of questions
    interval = [change - width, change + width]
    return {"difference": change, "interval": interval, "gained": gained, "lost": lost, "p": p}


# ---- 3. the reward model ------------------------------------------------------------------------------


def _wins(scores: Sequence[float], labels: Sequence[float]) -> tuple[float, int]:
    """(pairs whose positive scores higher, a tie as half; pairs), from the ranks: O(n log n)."""
    value, label = np.asarray(scores, np.float64), np.asarray(labels)
    if value.shape != label.shape or value.ndim != 1:
        raise ValueError(f"need one label per score, got shapes {value.shape} and {label.shape}")
    if not (np.isin(label, (0, 1)).all() and np.isfinite(value).all()):
        raise ValueError("an AUC needs labels 0 and 1, and finite scores")
    positive = label == 1
    count = int(positive.sum())
    _, place, copies = np.unique(value, return_inverse=True, return_counts=True)
    rank = np.cumsum(copies) - (copies - 1) / 2  # from 1; the mean rank of equal scores
    return float(rank[place][positive].sum()) - count * (count + 1) / 2, count * (len(value) - count)


def auc(scores: Sequence[float], labels: Sequence[float]) -> float | None:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties half.

    None where one of the two labels, 0 and 1, is missing.
    """
    return within_auc([(scores, labels)])


def within_auc(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """AUC over the pairs within a (scores, labels) group, all groups' pairs pooled; None without a pair.

    Unlike `auc` it does not reward telling easy queries from hard ones.
    """
    found = [_wins(scores, labels) for scores, labels in groups]
    pairs = sum(each for _, each in found)
    return math.fsum(wins for wins, _ in found) / pairs if pairs else None


def calibration(scores: Sequence[float], labels: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """How far scores are from the shares they stand for; soft labels, such as Monte-Carlo ones, are fine.

    Args:
      scores: in 0..1.
      labels: in 0..1.
      bins: of equal width; a score on a border belongs to the upper one.

    Returns:
      ece (expected calibration error: the mean of |mean score - mean label| over the bins, weighted by
      their counts), brier (mean squared difference), and `bins`: low, high, count, score and label (means)
      of every bin with something in it.

    Raises:
      ValueError: no scores, other numbers of labels, or a value outside 0..1.
    """
    value, label = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if value.shape != label.shape or value.ndim != 1 or not value.size or bins < 1:
        raise ValueError(
            f"need a score, a label for each and a bin, got {value.shape}, {label.shape}, {bins}"
        )
    if not all(((each >= 0) & (each <= 1)).all() for each in (value, label)):
        raise ValueError("scores and labels have to lie in 0..1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.searchsorted(edges[1:-1], value, side="right")
    rows = []
    for at in np.unique(place):
        score, share = float(value[place == at].mean()), float(label[place == at].mean())
        row = {"low": float(edges[at]), "high": float(edges[at + 1]), "count": int((place == at).sum())}
        rows.append(row | {"score": score, "label": share})
    ece = math.fsum(row["count"] * abs(row["score"] - row["label"]) for row in rows) / value.size
    return {"ece": ece, "brier": float(np.mean((value - label) ** 2)), "bins": rows}
