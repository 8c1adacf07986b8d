"""Which responses train the policy: filters and rankings by answer and reward, and votes on answers.

Numpy only. A function takes the responses to one query and returns some of them, in the order given.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from mstar_jax.answers import check
from mstar_jax.structs import Query, Response

# How R_p follows from the scores of a response's steps; the paper takes the smallest.
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}

Judge = Callable[[Query, Sequence[Response]], list[Response]]  # fills in what tells right from wrong
FAILED = "failed"  # the verdict on a response for which a user's reward failed


# ---- 1. by answer -------------------------------------------------------------------------------------


def judge(query: Query, response: Response) -> Response:
    """Fills in `answer` and `verdict` with the answer checker; an unlabelled query gives no verdict."""
    if query.answer is None:
        found = check.extract(response.text, options=query.options)
        return dataclasses.replace(response, answer=found)
    grade = check.grade(
        response.text,
        query.answer,
        options=query.options,
        answer_type=query.answer_type,
        precision=query.precision,
    )
    return dataclasses.replace(response, answer=grade.answer, verdict=grade.verdict)


def judge_all(query: Query, responses: Sequence[Response]) -> list[Response]:
    """The responses, each as `judge` fills it in."""
    return [judge(query, r) for r in responses]


def is_correct(response: Response) -> bool:
    """1(a = a*) of a judged response: the rule of selecting, labelling and measuring alike.

    A truncated response is never correct, whatever stands in it: it did not end, so its answer may not be its
    last word, and it would train the policy not to end.
    """
    return response.verdict == "correct" and not response.truncated


def outcome(response: Response) -> float:
    """The reward in 0..1 of a judged response: the score that a user's reward gave it, else 1 for a correct
    one and 0 for another. It is 0 for a truncated response; `is_correct` says why."""
    if response.truncated or response.score is None:
        return float(is_correct(response))
    return response.score


def correct(responses: Sequence[Response]) -> list[Response]:
    """The domain of H: the responses that are correct."""
    return [r for r in responses if is_correct(r)]


# ---- 2. by reward -------------------------------------------------------------------------------------


def reward(response: Response, aggregate: str = "min") -> float:
    """R_p(response) of the paper, in 0..1: the step scores, combined by one of AGGREGATES.

    It is 0 for a truncated response, scored or not, and for one without steps.

    Raises:
      ValueError: the response was not scored, a score is outside 0..1, or the aggregate is unknown.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"a reward is one of {', '.join(AGGREGATES)} of the step scores, got {aggregate!r}")
    if response.truncated:
        return 0.0
    scores = response.step_scores
    where = f"query {response.query_id!r}, sample {response.sample}"
    if scores is None:
        raise ValueError(f"{where}: no step scores; the reward model has not scored this response")
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"{where}: step scores have to lie in 0..1, got {scores}")
    return float(AGGREGATES[aggregate](scores)) if scores else 0.0


def top_k(responses: Sequence[Response], rewards: Sequence[float], k: int) -> list[Response]:
    """Top-K: the k responses with the largest rewards; all of them if k is 0.

    Among equal rewards the earlier response is preferred.
    """
    ranked = [i for i, _ in sorted(enumerate(rewards), key=lambda pair: -pair[1])]
    chosen = set(ranked[:k] if k else ranked)
    return [r for i, (r, _) in enumerate(zip(responses, rewards, strict=True)) if i in chosen]


def above(responses: Sequence[Response], rewards: Sequence[float], alpha: float) -> list[Response]:
    """The responses with R_p > alpha."""
    return [r for r, value in zip(responses, rewards, strict=True) if value > alpha]


# ---- 3. controls --------------------------------------------------------------------------------------


def random_k(responses: Sequence[Response], k: int, rng: np.random.Generator) -> list[Response]:
    """Random-K: k responses drawn uniformly without replacement; all of them if k is 0."""
    if not k or len(responses) <= k:
        return list(responses)
    return [responses[i] for i in sorted(rng.choice(len(responses), size=k, replace=False))]


def distinct(responses: Sequence[Response]) -> list[Response]:
    """The first response of each text."""
    first: dict[str, Response] = {}
    for response in responses:
        first.setdefault(response.text, response)
    return list(first.values())


def frequencies(responses: Sequence[Response]) -> list[float]:
    """How many of the given responses share each one's text: a reward that needs no reward model."""
    count = collections.Counter(r.text for r in responses)
    return [float(count[r.text]) for r in responses]


RANKINGS: dict[str, Callable[[Sequence[Response]], list[float]]] = {  # values of `evolve.select`
    "frequency": frequencies,
}


# ---- 4. votes and pseudo-labels -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vote:
    """Result of `vote`.

    Attributes:
      answer: the first answer of the winning class, as extracted.
      share: weight of the winning class over the weight of all responses given, voting or not.
      classes: number of distinct answers.
    """

    answer: str
    share: float
    classes: int


def checker(query: Query) -> Callable[[str, str], bool]:
    """`same(a, b)` of two extracted answers to the query: by letter where it has options, else by value."""

    def same(a: str, b: str) -> bool:
        return check.equivalent(
            a, b, options=query.options, answer_type=query.answer_type, precision=query.precision
        )

    return same


def vote(
    responses: Sequence[Response], weights: Sequence[float], same: Callable[[str, str], bool]
) -> Vote | None:
    """The answer with the largest total weight; with weights of 1 this is the majority vote.

    An answer joins the first class whose first member is the `same`. Truncated responses and those without
    an answer do not vote. Ties go to the class that appeared first. None if all votes together weigh nothing.
    """
    classes: dict[str, list[float]] = {}  # weights, by the first answer of a class
    for response, weight in zip(responses, weights, strict=True):
        if response.answer is not None and not response.truncated:
            answer = response.answer
            first = next((known for known in classes if same(known, answer)), answer)
            classes.setdefault(first, []).append(weight)
    sums = {first: math.fsum(members) for first, members in classes.items()}  # exact, so ties stay ties
    winner = max(sums, key=sums.__getitem__, default=None)
    if winner is None or sums[winner] <= 0:
        return None
    return Vote(winner, sums[winner] / math.fsum(weights), len(classes))


def pseudo_label(
    query: Query, responses: Sequence[Response], weights: Sequence[float], threshold: float
) -> Query | None:
    """An unlabelled query with the winner of a vote as its gold answer (Table 3 of the paper).

    Returns None to abstain: the winner has less than `threshold` of the weight of all responses given, or it
    cannot be a gold answer (it names no option, or cannot be read as the query's answer type).
    """
    won = vote(responses, weights, checker(query))
    if won is None or won.share < threshold:
        return None
    answer = check.as_gold(won.answer, options=query.options, answer_type=query.answer_type)
    return None if answer is None else dataclasses.replace(query, answer=answer)
