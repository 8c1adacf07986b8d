"""Metrics of responses and of rewards, and the statistics that go with them (numpy and scipy only)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
import scipy.stats

from mstar_jax.rewards import selection
from mstar_jax.structs import Query, Response

# ---- 1. one query -------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that k samples contain a correct one, given c correct of n.

    Source: Chen et al. 2021, 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: k is outside 1..n, or c is outside 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def reward_pass_at_k(rewards: Sequence[float], correct: Sequence[bool], texts: Sequence[str], k: int) -> bool:
    """Whether one of the k distinct texts with the highest rewards is correct.

    Not quite the paper's, which ranks all K samples: here copies of a text count once; otherwise the top two
    are often the same response. Ties go to the earlier one.
    """
    if k < 1:
        raise ValueError(f"Reward-Pass@k needs k >= 1, got {k}")
    ranked = sorted(zip(rewards, texts, correct, strict=True), key=lambda row: -row[0])
    first: dict[str, bool] = {}
    for _, text, right in ranked:
        first.setdefault(text, right)
    return any(list(first.values())[:k])


def best_of_n(rewards: Sequence[float], correct: Sequence[bool]) -> bool:
    """Whether the response with the highest reward is correct; ties go to the earlier one."""
    pairs = list(zip(rewards, correct, strict=True))
    return bool(max(pairs, key=lambda pair: pair[0])[1]) if pairs else False


def balance_score(selected: int, right: int, target: int = 8) -> float:
    """Quantity times quality of the selected responses: min(c / target, 1) * c / n, or 0 if n is 0.

    Source: B-STaR (Zeng et al. 2024).

    Args:
      selected: n, the number of responses that the reward keeps.
      right: c, how many of them are correct.
      target: the number of correct responses that is enough.
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
    """The training dynamics on one split. A truncated response is never correct (`selection.is_correct`).

    Args:
      groups: for each query its samples and, if there is one, its greedy response (temperature 0).
      k: the K of Pass@K; capped at the number of samples.
      aggregate: how step scores become a reward, one of `selection.AGGREGATES`.
      alpha: the balance score counts samples whose reward exceeds it as selected.
      target: of the balance score.

    Returns:
      greedy_accuracy, pass_at_k, gap (Pass@K minus greedy accuracy), sampled_accuracy, distinct_answers (per
      query, over its samples); unparsed, gold_unparsed and truncated (fractions of all responses); length
      (mean, in tokens); and, for scored samples, reward_pass_at_2 and balance_score. Metrics that are
      undefined (no greedy response, no samples, no scores) are left out.

    Raises:
      ValueError: some samples are scored while others that are not truncated have no scores.
    """
    everything = [r for group in groups for r in group]
    greedy = [r for r in everything if r.temperature == 0]
    samples = [[r for r in group if r.temperature > 0] for group in groups]
    out: dict[str, float] = {}
    if greedy:
        out["greedy_accuracy"] = _mean([selection.is_correct(r) for r in greedy])
    if samples and samples[0]:
        right = [[selection.is_correct(r) for r in group] for group in samples]
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


def by_temperature(
    groups: Sequence[Sequence[Response]],
    k: int,
    *,
    aggregate: str = "min",
    alpha: float = 0.5,
    target: int = 8,
) -> list[dict[str, float]]:
    """The dynamics at each temperature: the grid from which the next temperature is chosen.

    Args:
      groups: for each query its samples at every temperature and, if there is one, its greedy response.
      k: the K of Pass@K.
      aggregate, alpha, target: as in `dynamics`.

    Returns:
      For each temperature above 0, in ascending order: `temperature` and the dynamics of its samples.
      greedy_accuracy is the same in every row, and gap is measured from it.

    Raises:
      ValueError: a query has no sample at a temperature at which another has one.
    """
    greedy = [selection.is_correct(r) for group in groups for r in group if r.temperature == 0]
    out = []
    for temperature in sorted({r.temperature for group in groups for r in group} - {0.0}):
        at = [[r for r in group if r.temperature == temperature] for group in groups]
        if not all(at):
            where = at.index([])
            raise ValueError(f"group {where} has no sample at temperature {temperature}, but others have")
        measured = dynamics(at, k, aggregate=aggregate, alpha=alpha, target=target)
        row = {"temperature": temperature} | measured
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
    """Accuracy against the number of rollouts, for each way of choosing one answer (Figure 2a).

    Args:
      groups: labelled queries, each with its scored samples and, if there is one, its greedy response.
        Responses without a verdict are judged here by the query's gold answer.
      ns: numbers of rollouts; n means the first n samples of every query.
      same_of: for a query, the function that says whether two answers vote together.
      aggregate: how step scores become a reward.

    Returns:
      For each n: `n`, best_of_n, majority, weighted_vote and, if there are greedy responses, greedy.

    Raises:
      ValueError: a query has no gold answer or fewer than n samples, or a sample has no scores.
    """
    greedy: list[bool] = []
    rows: dict[int, list[tuple[bool, bool, bool]]] = {n: [] for n in ns}
    for query, group in groups:
        if query.answer is None:
            raise ValueError(f"query {query.id!r} has no gold answer to compare its votes with")
        judged = [r if r.verdict else selection.judge(query, r) for r in group]
        greedy += [selection.is_correct(r) for r in judged if r.temperature == 0]
        samples = [r for r in judged if r.temperature > 0]
        rewards = [selection.reward(r, aggregate) for r in samples]
        right: dict[str | None, bool] = {}
        for r in samples:  # the verdict on the first response with an answer, should others of it differ
            right.setdefault(r.answer, r.verdict == "correct")
        same = same_of(query)
        for n in rows:
            if not 1 <= n <= len(samples):
                raise ValueError(f"query {query.id!r} has {len(samples)} samples; n={n} is out of range")
            votes = [selection.vote(samples[:n], weights[:n], same) for weights in ([1.0] * n, rewards)]
            majority, weighted = (won is not None and right[won.answer] for won in votes)
            best = best_of_n(rewards[:n], [selection.is_correct(r) for r in samples[:n]])
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


# ---- 3. intervals and tests ---------------------------------------------------------------------------


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n trials.

    The share may also be the mean of n values in 0..1, such as Pass@K. Then `share * n` need not be whole,
    and the interval is interpolated between those of the neighbouring whole numbers of successes.

    Raises:
      ValueError: n is not positive, or the share is outside 0..1.
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"an interval needs a share in 0..1 and n >= 1, got {share} and {n}")
    successes = round(share * n, 6)  # 0.29 * 100 is not quite 29
    below = math.floor(successes)
    ends = [
        scipy.stats.binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
        for count in (below, math.ceil(successes))
    ]
    low, high = (float(np.interp(successes - below, (0, 1), pair)) for pair in zip(*ends))
    return low, high


class Comparison(TypedDict):
    """Two policies on the same questions, see `paired`."""

    difference: float
    interval: list[float]  # [low, high]
    gained: int
    lost: int
    p: float


def paired(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compares two policies on the same questions.

    Args:
      first: for each question, whether the first policy is right.
      second: whether the second one is.

    Returns:
      difference (accuracy of the second minus that of the first), its 95 % interval (normal, from the
      variance of the paired differences), the numbers of questions gained and lost, and the two-sided p of
      McNemar's exact test: are gains and losses equally likely?

    Raises:
      ValueError: the numbers of questions differ, or there are none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need the same questions, got {len(first)} and {len(second)}")
    gained = sum(b and not a for a, b in zip(first, second))
    lost = sum(a and not b for a, b in zip(first, second))
    n = len(first)
    changed = gained + lost
    difference = (gained - lost) / n
    error = math.sqrt(max(changed / n - difference**2, 0.0) / n)
    half = float(scipy.stats.norm.ppf(0.975)) * error
    return {
        "difference": difference,
        "interval": [difference - half, difference + half],
        "gained": gained,
        "lost": lost,
        "p": float(scipy.stats.binomtest(gained, changed).pvalue) if changed else 1.0,
    }


# ---- 4. the reward model ------------------------------------------------------------------------------


def _wins(scores: Sequence[float], labels: Sequence[float]) -> tuple[float, int]:
    """(Mann-Whitney U of the positives, number of pairs of a positive and a negative); ties count half."""
    value = np.asarray(scores, np.float64)
    label = np.asarray(labels)
    if value.shape != label.shape or value.ndim != 1:
        raise ValueError(f"need one label per score, got shapes {value.shape} and {label.shape}")
    if not (np.isin(label, (0, 1)).all() and np.isfinite(value).all()):
        raise ValueError("an AUC needs labels 0 and 1, and finite scores")
    positive = label == 1
    count = int(positive.sum())
    ranks = scipy.stats.rankdata(value)
    return float(ranks[positive].sum()) - count * (count + 1) / 2, count * (len(value) - count)


def auc(scores: Sequence[float], labels: Sequence[float]) -> float | None:
    """Area under the ROC curve: the probability that a positive outscores a negative; ties count half.

    None if one of the labels, 0 and 1, does not occur.
    """
    return within_auc([(scores, labels)])


def within_auc(groups: Iterable[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """AUC over pairs from the same (scores, labels) group, pooled over the groups; None without any pair.

    Unlike `auc`, it gives no credit for telling easy queries from hard ones.
    """
    found = [_wins(scores, labels) for scores, labels in groups]
    pairs = sum(each for _, each in found)
    return math.fsum(wins for wins, _ in found) / pairs if pairs else None


class Bin(TypedDict):
    """One bin of a reliability diagram: its borders, how many scores it holds, and their means."""

    low: float
    high: float
    count: int
    score: float
    label: float


class Calibration(TypedDict):
    """Expected calibration error, Brier score, and the bins that are not empty."""

    ece: float
    brier: float
    bins: list[Bin]


def calibration(scores: Sequence[float], labels: Sequence[float], bins: int = 10) -> Calibration:
    """How well scores match the observed frequencies. Labels may be soft, such as Monte-Carlo estimates.

    Args:
      scores: in 0..1.
      labels: in 0..1.
      bins: number of bins of equal width; a score on a border belongs to the upper bin.

    Returns:
      ece (the mean of |mean score - mean label| over the bins, weighted by their counts), brier (the mean
      squared difference of score and label), and the bins that are not empty.

    Raises:
      ValueError: there are no scores, the numbers of scores and labels differ, or a value is outside 0..1.
    """
    value = np.asarray(scores, np.float64)
    label = np.asarray(labels, np.float64)
    if value.shape != label.shape or value.ndim != 1 or not value.size or bins < 1:
        raise ValueError(
            f"need scores, one label for each, and bins >= 1, got {value.shape}, {label.shape}, {bins}"
        )
    if not all(((each >= 0) & (each <= 1)).all() for each in (value, label)):
        raise ValueError("scores and labels must lie in 0..1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.searchsorted(edges[1:-1], value, side="right")
    rows: list[Bin] = [
        {
            "low": float(edges[at]),
            "high": float(edges[at + 1]),
            "count": int((place == at).sum()),
            "score": float(value[place == at].mean()),
            "label": float(label[place == at].mean()),
        }
        for at in np.unique(place)
    ]
    ece = math.fsum(row["count"] * abs(row["score"] - row["label"]) for row in rows) / value.size
    return {"ece": ece, "brier": float(np.mean((value - label) ** 2)), "bins": rows}
