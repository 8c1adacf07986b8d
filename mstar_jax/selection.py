"""Which responses train the policy, and the numbers that describe a set of responses (numpy only)."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mstar_jax import answers
from mstar_jax.structs import Query, Response


def judge(query: Query, response: Response) -> Response:
    """Fills in `answer` and `verdict` by the answer checker; an unlabelled query gets no verdict."""
    if query.answer is None:
        found = answers.extract(response.text)
        return dataclasses.replace(response, answer=found)
    grade = answers.grade(response.text, query.answer, options=query.options, answer_type=query.answer_type)
    return dataclasses.replace(response, answer=grade.answer, verdict=grade.verdict)


def correct(responses: Sequence[Response]) -> list[Response]:
    """H's domain, 1(a = a*): correct responses that came to an end by themselves."""
    return [r for r in responses if r.verdict == "correct" and not r.truncated]


def random_k(responses: Sequence[Response], k: int, rng: np.random.Generator) -> list[Response]:
    """Random-K of the given responses, without replacement, in their order; all of them if k is 0."""
    if not k or len(responses) <= k:
        return list(responses)
    return [responses[i] for i in sorted(rng.choice(len(responses), size=k, replace=False))]


def distinct(responses: Sequence[Response]) -> list[Response]:
    """Drops responses whose text came before."""
    first: dict[str, Response] = {}
    for response in responses:
        first.setdefault(response.text, response)
    return list(first.values())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that k of n samples, c of them correct, hold a correct one.

    Source: Chen et al. 2021, 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: k is not within 1..n, or c not within 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def dynamics(groups: Sequence[Sequence[Response]], k: int) -> dict[str, float]:
    """The metrics of self-evolution on one split.

    Args:
      groups: per query: its greedy response (temperature 0) if there is one, and its samples.
      k: for Pass@K, at most the number of samples.

    Returns:
      greedy_accuracy, pass_at_k, gap (Pass@K - greedy), sampled_accuracy, unparsed and truncated
      (shares of all responses), length (tokens), distinct_answers (per query, over its samples). What
      cannot be told (no greedy response, no samples) is absent.
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
    if greedy and "pass_at_k" in out:
        out["gap"] = out["pass_at_k"] - out["greedy_accuracy"]
    out["unparsed"] = _mean([r.verdict == "unparsed" for r in everything])
    out["gold_unparsed"] = _mean([r.verdict == "gold-unparsed" for r in everything])
    out["truncated"] = _mean([r.truncated for r in everything])
    out["length"] = _mean([len(r.tokens) for r in everything])
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
