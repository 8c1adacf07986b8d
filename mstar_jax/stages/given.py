"""given: responses that others have written, in place of those of the run's own policies."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mstar_jax.data import splits
from mstar_jax.data.given import Given
from mstar_jax.inference.generate import Groups
from mstar_jax.rewards import selection
from mstar_jax.stages.run import Run
from mstar_jax.structs import Query, Response, int32

log = logging.getLogger(__name__)

Labels = Mapping[tuple[str, int], tuple[float, ...]]  # of a response's steps, by query id and sample


def given_rationales(run: Run) -> tuple[Sequence[Query], Groups]:
    """The queries of `warmup.data` and its rationales, judged as the policy's own would be."""
    queries, responses = judged(run, run.rationales)
    right = sum(selection.is_correct(r) for group in responses.values() for r in group)
    text = "warmup: %d of %d rationales for %d queries are correct"
    log.info(text, right, len(run.rationales), len(queries))
    return queries, responses


class Labelled(NamedTuple):
    """What the reward model is trained on (`trained`) and reported on (`held_out`)."""

    trained: Sequence[Query]
    held_out: Sequence[Query]
    responses: Groups
    labels: Labels


def given_labels(run: Run) -> Labelled:
    """The responses of `prm.data` and the labels of their steps. `prm.held_out` of the queries are held out,
    a quarter at most, and no query about one of their images is trained on.

    A response whose query has no gold answer counts as correct if its last step's label is at least 1/2.
    """
    queries, responses = judged(run, run.steps)
    queries = splits.shuffled(queries, run.seed, 0)  # a file may be sorted
    labels: dict[tuple[str, int], tuple[float, ...]] = {}
    counted: dict[str, int] = {}
    for row in run.steps:
        sample = counted[row.query.id] = counted.get(row.query.id, -1) + 1
        labels[row.query.id, sample] = row.labels
    held_out = reported_on(run, queries)
    trained = splits.apart(queries, held_out)
    left_out = len(queries) - len(held_out) - len(trained)
    text = (
        "prm: %d responses to %d queries have labels; %d queries are held out, %d left out with their images"
    )
    log.info(text, len(run.steps), len(queries), len(held_out), left_out)
    return Labelled(trained, held_out, responses, labels)


def warmup_queries(run: Run) -> Sequence[Query]:
    """What the warm-up trained on, or asked: those of `warmup.data` if it is given."""
    return [row.query for row in run.rationales] or run.labelled[: run.config.warmup.queries]


def reported_on(run: Run, queries: Sequence[Query]) -> list[Query]:
    """`prm.held_out` of the queries, a quarter at most, that the reward model is reported on."""
    size = min(run.config.prm.held_out, len(queries) // 4)
    found, seen = splits.hold_out(queries, size, warmup_queries(run))
    if seen:
        log.info("prm: %d of %d held-out queries show what the warm-up trained on", seen, len(found))
    return found


def judged(run: Run, rows: Sequence[Given]) -> tuple[list[Query], dict[str, list[Response]]]:
    """The queries, in the order of their first rows, and the responses to each.

    One that is longer than the policy may write counts as truncated: no policy can learn to end it.
    """
    queries: dict[str, Query] = {}
    found: dict[str, list[Response]] = {}
    ends: dict[str, list[float]] = {}  # the label of each response's last step, where steps have labels
    for row in rows:
        query, text = queries.setdefault(row.query.id, row.query), row.response
        group = found.setdefault(query.id, [])
        tokens = int32(run.processor.encode_response(text))
        truncated = len(tokens) > run.sampling.max_new_tokens
        group.append(Response(query.id, len(group), text, tokens, 0.0, truncated))
        ends.setdefault(query.id, []).extend(row.labels[-1:])
    responses = {name: run.grading.judge(queries[name], group) for name, group in found.items()}
    for name, labels in ends.items():
        if queries[name].answer is None and labels:
            verdicts = ["correct" if label >= 0.5 else "wrong" for label in labels]
            responses[name] = [
                dataclasses.replace(r, verdict=verdict)
                for r, verdict in zip(responses[name], verdicts, strict=True)
            ]
    return list(queries.values()), responses
