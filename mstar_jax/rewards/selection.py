"""Which responses train the policy: correct ones, the best of them, and by which answer (numpy only)."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mstar_jax.answers import check
from mstar_jax.structs import Query, Response

# R_p from the scores of a response's steps; the paper's is the least of them.
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


# ---- 1. by the answer ---------------------------------------------------------------------------------


def judge(query: Query, response: Response) -> Response:
    """Fills in `answer` and `verdict` by the answer checker; an unlabelled query gets no verdict."""
    if query.answer is None:
        found = check.extract(response.text, options=query.options)
        return dataclasses.replace(response, answer=found)
    how: dict[str, Any] = {"options": query.options, "answer_type": query.answer_type}
    grade = check.grade(response.text, query.answer, precision=query.precision, **how)
    return dataclasses.replace(response, answer=grade.answer, verdict=grade.verdict)


def correct(responses: Sequence[Response]) -> list[Response]:
    """H's domain, 1(a = a*): correct responses that came to an end by themselves."""
    return [r for r in responses if r.verdict == "correct" and not r.truncated]


# ---- 2. by the reward ---------------------------------------------------------------------------------


def reward(response: Response, aggregate: str = "min") -> float:
    """R_p(response) of the paper, in 0..1: its step scores taken together by one of AGGREGATES.

    A truncated response has 0, scored or not, and so has one without steps.

    Raises:
      ValueError: the response was not scored, a score is outside 0..1, or the aggregate is unknown.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"a reward is one of {', '.join(AGGREGATES)} of the step scores, got {aggregate!r}")
    if response.truncated:
        return 0.0
    scores, where = response.step_scores, f"query {response.query_id!r}, sample {response.sample}"
    if scores is None:
        raise ValueError(f"{where}: no step scores; the reward model has not scored this response")
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"{where}: step scores have to lie in 0..1, got {scores}")
    return float(AGGREGATES[aggregate](scores)) if scores else 0.0


def top_k(responses: Sequence[Response], rewards: Sequence[float], k: int) -> list[Response]:
    """Top-K: the k of the greatest reward, in the order given; all of them if k is 0.

    Of equal rewards the earlier response is preferred.
    """
    ranked = [i for i, _ in sorted(enumerate(rewards), key=lambda pair: -pair[1])]
    chosen = set(ranked[:k] if k else ranked)
    return [r for i, (r, _) in enumerate(zip(responses, rewards, strict=True)) if i in chosen]


def above(responses: Sequence[Response], rewards: Sequence[float], alpha: float) -> list[Response]:
    """Those with R_p > alpha."""
    return [r for r, value in zip(responses, rewards, strict=True) if value > alpha]


# ---- 3. controls --------------------------------------------------------------------------------------


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


def frequencies(responses: Sequence[Response]) -> list[float]:
    """For each response, how many of the given ones have its text: a reward without a reward model."""
    count = collections.Counter(r.text for r in responses)
    return [float(count[r.text]) for r in responses]


# ---- 4. votes and pseudo answers ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vote:
    """Result of `vote`.

    Attributes:
      answer: the winning class's first answer, as it was extracted.
      share: weight of the winning class over the weight of all responses given, voting or not.
      classes: how many different answers were voted for.
    """

    answer: str
    share: float
    classes: int


def checker(query: Query) -> Callable[[str, str], bool]:
    """`same(a, b)` of two extracted answers to the query: by letter where it has options, else by value."""

    def same(a: str, b: str) -> bool:
        how: dict[str, Any] = {"options": query.options, "answer_type": query.answer_type}
        return check.equivalent(a, b, precision=query.precision, **how)

    return same


def vote(
    responses: Sequence[Response], weights: Sequence[float], same: Callable[[str, str], bool]
) -> Vote | None:
    """The answer with the largest sum of weights; with weights of 1 the majority vote.

    An answer joins the first class whose first member it is the `same` as. Truncated responses and those
    without an answer do not vote. Of equal sums the class that came first wins. None where no weight is
    voted.
    """
    classes: dict[str, list[float]] = {}  # by the first answer of each
    for response, weight in zip(responses, weights, strict=True):
        if response.answer is not None and not response.truncated:
            answer = response.answer
            first = next((known for known in classes if same(known, answer)), answer)
            classes.setdefault(first, []).append(weight)
    sums = {first: math.fsum(members) for first, members in classes.items()}  # exact: ties stay ties
    winner = max(sums, key=sums.__getitem__, default=None)
    if winner is None or sums[winner] <= 0:
        return None
    return Vote(winner, sums[winner] / math.fsum(weights), len(classes))


def pseudo_label(
    query: Query, responses: Sequence[Response], weights: Sequence[float], threshold: float
) -> Query | None:
    """An unlabelled query with the voted answer as its gold answer (Table 3).

    None is an abstention: the winner has less than `threshold` of the weight of all responses given, or is
    not a possible gold answer (it names no option, or cannot be read as the query's type).
    """
    won = vote(responses, weights, checker(query))
    if won is None or won.share < threshold:
        return None
    answer = check.as_gold(won.answer, options=query.options, answer_type=query.answer_type)
    return None if answer is None else dataclasses.replace(query, answer=answer)
