"""weigh: how much better every response is than the others to its query, for the objectives that learn from
right and wrong ones."""

import collections
import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from mstar_jax.inference.generate import Groups, ask, plan
from mstar_jax.inference.logprobs import Arrays, logprobs
from mstar_jax.inference.score import Scorer
from mstar_jax.rewards import diversity, selection, steps
from mstar_jax.stages.generate import pass_name
from mstar_jax.stages.policy import Policy, restore_params
from mstar_jax.stages.run import Run
from mstar_jax.stages.select import dropped, scores
from mstar_jax.structs import Query, Response, Row, Source, Stage, float32
from mstar_jax.training import objectives

log = logging.getLogger(__name__)


class Group(NamedTuple):
    """A query whose responses teach something.

    Attributes:
      query: what was asked.
      tokens: of each response.
      advantages: float64[tokens] of each response.
      sampled: the log probability of each token when it was sampled.
      temperature: that it was sampled at.
    """

    query: Query
    tokens: tuple[Sequence[int], ...]
    advantages: tuple[np.ndarray, ...]
    sampled: Arrays
    temperature: float


def weigh(
    run: Run, stage: Stage, policy: Policy, reward: Scorer | None, queries: Sequence[Query], responses: Groups
) -> Source:
    """All responses to the queries that can teach: rows with advantages as weights, and the log probabilities
    that `evolve.objective` needs.

    The policy that sampled reads its responses once more, as it is about to train: this gives p_old of the
    ratios, the check of sampler against trainer, and the importance weights where they differ. The warm-up
    reads them all where `evolve.kl` is above 0, and otherwise those to `evolve.kl_queries` queries, to
    measure how far the policy has moved. Both readings are kept in the workdir, and no second policy is in
    memory while this one trains.

    Args:
      run: see `Run`.
      stage: what the responses are for.
      policy: what sampled them, and is about to train.
      reward: R_p, for `evolve.process_weight`.
      queries: with the answers that count.
      responses: judged, with the log probabilities of their tokens.
    """
    e, name = run.config.evolve, pass_name(stage)
    judged = responses
    if reward is not None and e.process_weight:
        judged = scores(run, reward, name, queries, responses)
    groups, counts = teaching(queries, judged, e, run.texts)
    prompts = plan(run, ask([group.query for group in groups], run.template), "rows")
    pairs = [(prompt, group) for prompt, group in zip(prompts, groups) if prompt is not None]
    groups = [group for _, group in pairs]
    rows = [Row(prompt, group.tokens, temperature=group.temperature) for prompt, group in pairs]
    size, dtype = e.batch // run.config.train.accumulate, run.config.train.dtype
    old = logprobs(run, name, lambda: policy.params, rows, size=size, dtype=dtype)
    asked = rows if e.kl else rows[: e.kl_queries]
    reference = old[: len(asked)]
    if policy.stage != Stage.warmup:
        reference = logprobs(
            run,
            pass_name(stage, "reference"),
            lambda: restore_params(run, Stage.warmup),
            asked,
            size=size,
            dtype=dtype,
        )
    notes: dict[str, object] = {**counts}
    both = [pair for each, group in zip(old, groups) for pair in zip(each, group.sampled)]
    notes |= diversity.agreement(both)
    moved = diversity.divergence(pair for one, two in zip(old, reference) for pair in zip(one, two))
    notes |= {} if moved is None else {"kl": moved}
    if not rows:
        notes["dropped"] = dropped(queries, responses)
    found = [
        dataclasses.replace(
            row,
            weights=weights(group, each, e.truncate),
            old=each,
            reference=reference[at] if e.kl else (),
        )
        for at, (row, group, each) in enumerate(zip(rows, groups, old))
    ]
    return Source(found, notes=notes)


def teaching(
    queries: Sequence[Query], responses: Groups, settings: ml_collections.ConfigDict, texts: Sequence[str]
) -> tuple[list[Group], dict[str, int]]:
    """The queries with a response whose advantage is not 0, and how many there are of every kind.

    Args:
      queries: what was asked.
      responses: by query id, judged.
      settings: `config.evolve`: objective and process_weight.
      texts: what each id adds to a text, see `draw.token_texts`.

    Returns:
      The queries, and counts: trained_groups; skipped_right and skipped_wrong, whose responses all are
      correct, or none is; skipped_other, where they differ in nothing else that counts.
    """
    found: list[Group] = []
    counts = collections.Counter(trained_groups=0, skipped_right=0, skipped_wrong=0, skipped_other=0)
    for query in queries:
        group = responses.get(query.id, [])
        if not group:
            continue
        own = advantages(group, settings, texts)
        if any(each.any() for each in own):
            counts["trained_groups"] += 1
            found.append(
                Group(
                    query,
                    tuple(r.tokens for r in group),
                    tuple(own),
                    tuple(sampled(r) for r in group),
                    group[0].temperature,
                )
            )
            continue
        right = [selection.outcome(r) for r in group]
        kind = "right" if min(right) == 1 else "wrong" if max(right) == 0 else "other"
        counts[f"skipped_{kind}"] += 1
    return found, dict(counts)


def advantages(
    group: Sequence[Response], settings: ml_collections.ConfigDict, texts: Sequence[str]
) -> list[np.ndarray]:
    """float64[tokens] of each response to one query: that of its outcome, and `process_weight` times that of
    its steps."""
    advantage = objectives.ADVANTAGES[settings.objective]
    whole = advantage(np.array([selection.outcome(r) for r in group]))
    # views of one number: an iteration's tokens are many
    found = [np.broadcast_to(value, len(r.tokens)) for r, value in zip(group, whole, strict=True)]
    if not settings.process_weight:
        return found
    parts = objectives.dense(
        advantage,
        [r.step_scores or () for r in group],
        [steps.ends(r.tokens, texts) for r in group],
        [len(r.tokens) for r in group],
    )
    return [each + settings.process_weight * part for each, part in zip(found, parts, strict=True)]


def sampled(response: Response) -> Sequence[float]:
    """The log probabilities that a response was sampled with.

    Raises:
      ValueError: they were not kept.
    """
    if response.logprobs is None:
        raise ValueError(
            f"query {response.query_id!r}, sample {response.sample}: its store has no log probabilities of "
            "tokens, which evolve.objective needs; remove the store to sample it again"
        )
    return response.logprobs


def weights(group: Group, old: Arrays, truncate: float) -> tuple[Sequence[float], ...]:
    """The weight of every token: its advantage, times its importance weight."""
    found = group.advantages
    if truncate:
        found = tuple(
            each * objectives.importance(np.asarray(trainer), np.asarray(sampler), truncate)
            for each, trainer, sampler in zip(found, old, group.sampled, strict=True)
        )
    return tuple(map(float32, found))
