"""select: H( 1(a = a*) R_p(y) ), which responses of a query the policy is trained on."""

import collections
import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from mstar_jax import processes, store
from mstar_jax.data import truth
from mstar_jax.inference.generate import Asked, Groups, ask, plan
from mstar_jax.inference.score import Scorer, score
from mstar_jax.rewards import custom, selection
from mstar_jax.stages.generate import failures, pass_name
from mstar_jax.stages.run import Run
from mstar_jax.structs import Query, Response, Row, Source, Stage

JUDGED = ("answer", "verdict", "score")  # what judging fills in


def select(
    run: Run,
    stage: Stage,
    reward: Scorer | None,
    queries: Sequence[Query],
    responses: Groups,
    *,
    part: str = "",
) -> Source:
    """The correct responses of every query that `evolve.select` prefers, `evolve.keep` of them (Table 2).

    Args:
      run: see `Run`.
      stage: what the responses are for.
      reward: R_p; None for selection without a reward model.
      queries: with the answers that count, gold or voted.
      responses: judged by these answers.
      part: see `generate`.
    """
    name = pass_name(stage, part)
    evolve = run.config.evolve
    scored = responses
    if reward is not None and evolve.select in ("prm", "likelihood"):
        scored = scores(run, reward, name, queries, responses, only_correct=True)

    def kept(query: Query) -> list[Response]:
        return keep(
            query,
            scored.get(query.id, []),
            settings=evolve,
            aggregate=run.config.prm.aggregate,
            draw=draw(run.seed, name, query),
            known=run.truth.get(query.id),
        )

    return source(run, queries, kept, responses)


def keep(
    query: Query,
    responses: Sequence[Response],
    *,
    settings: ml_collections.ConfigDict,
    aggregate: str,
    draw: np.random.Generator,
    known: truth.Truth | None,
) -> list[Response]:
    """The responses of one query that train the policy.

    Args:
      query: with the answer that counts.
      responses: judged by this answer, scored where the reward model selects.
      settings: `config.evolve`: select, keep, distinct and threshold.
      aggregate: what makes a reward of step scores.
      draw: for the random selection.
      known: what the embedded data's generator knows, for the oracle's selection.
    """
    found = selection.correct(responses)
    if settings.distinct:
        found = selection.distinct(found)
    if settings.select == "random":
        return selection.random_k(found, settings.keep, draw)
    if settings.select in selection.RANKINGS:
        rewards = selection.RANKINGS[settings.select](found)
    elif settings.select == "oracle":  # an upper bound: no method knows this
        rewards = [float(known is not None and truth.all_right(r.text, known)) for r in found]
    else:
        rewards = [selection.reward(r, aggregate) for r in found]
    if settings.threshold is not None:
        found = selection.above(found, rewards, settings.threshold)
        rewards = [value for value in rewards if value > settings.threshold]
    return selection.top_k(found, rewards, settings.keep)


def select_rationales(run: Run, queries: Sequence[Query], responses: Groups) -> Source:
    """What the warm-up trains on: for each query, `warmup.keep` different correct responses, drawn uniformly
    at random."""

    def kept(query: Query) -> list[Response]:
        found = selection.distinct(selection.correct(responses.get(query.id, [])))
        random = draw(run.seed, Stage.warmup.name, query)
        return selection.random_k(found, run.config.warmup.keep, random)

    chosen = source(run, queries, kept, responses)
    given = {"given": dropped(queries, responses)} if run.config.warmup.data else {}
    return chosen._replace(notes={**chosen.notes, **given})


def gold_answers(run: Run, queries: Sequence[Query]) -> Source:
    """SFT's data: the gold answer itself as the response."""
    asked = ask(queries, run.config.prompts.direct)
    golds = [(tuple(run.processor.encode_response(f"{truth.ANSWER} {query.answer}")),) for query in queries]
    return Source(training_rows(run, asked, golds))


def select_unlabelled(
    run: Run, stage: Stage, reward: Scorer | None, queries: Sequence[Query], responses: Groups, *, part: str
) -> Source:
    """Pseudo-labels (Table 3): unlabelled queries get the answer that their responses vote for, and then the
    selection is that of the labelled ones. Weighted by `evolve.unlabelled.weight`."""
    settings = run.config.evolve.unlabelled
    voters = responses
    if reward is not None and not settings.oracle:
        voters = scores(run, reward, pass_name(stage, f"{part}_votes"), queries, responses)
    answered, notes = pseudo_label(
        queries,
        voters,
        hidden=run.hidden,
        settings=settings,
        aggregate=run.config.prm.aggregate if reward is not None else "",
    )
    outcomes = judged_by(run.grading.judge, answered, responses)

    def judge(query_id: str) -> list[Response]:
        group = responses.get(query_id, [])
        return [dataclasses.replace(r, **told) for r, told in zip(group, outcomes[query_id], strict=True)]

    judged = store.Groups(outcomes, judge)
    chosen = select(run, stage, reward, answered, judged, part=part)
    failed = failures(run, stage, lambda: {part: custom.failures(judged.values())})
    return chosen._replace(weight=settings.weight, notes={**notes, **failed})


def judged_by(
    judge: selection.Judge, queries: Sequence[Query], responses: Groups
) -> dict[str, list[dict[str, Any]]]:
    """By query what judging says of each of its responses, once and for all: several processes share the
    work, and a user's function is not asked again. Without the responses themselves: they are many."""

    def told(at: int) -> bytes:
        found = judge(queries[at], responses.get(queries[at].id, []))
        return json.dumps([{key: getattr(r, key) for key in JUDGED} for r in found]).encode()

    made = processes.shared(told, len(queries))
    return {query.id: json.loads(each) for query, each in zip(queries, made, strict=True)}


def pseudo_label(
    queries: Sequence[Query],
    responses: Groups,
    *,
    hidden: Mapping[str, str | None],
    settings: ml_collections.ConfigDict,
    aggregate: str,
) -> tuple[list[Query], dict[str, float]]:
    """Gives unlabelled queries the answer that their responses vote for.

    Args:
      queries: without answers.
      responses: by query id, scored if the votes are weighted.
      hidden: the true answers, to measure precision with; the oracle is given them.
      settings: `config.evolve.unlabelled`: threshold and oracle.
      aggregate: what makes a vote's weight of step scores; empty for equal votes.

    Returns:
      The queries that got an answer, and pseudo_coverage (their share) with pseudo_precision (the share of
      them whose answer is the hidden one).
    """
    answered: list[Query] = []
    right = 0
    for query in queries:
        gold = dataclasses.replace(query, answer=hidden[query.id])
        if settings.oracle:
            answered.append(gold)
            continue
        group = responses.get(query.id, [])
        weights = [selection.reward(r, aggregate) if aggregate else 1.0 for r in group]
        voted = selection.pseudo_label(query, group, weights, settings.threshold)
        if voted is not None:
            answered.append(voted)
            right += selection.checker(query)(voted.answer or "", gold.answer or "")
    coverage = len(answered) / max(len(queries), 1)
    precision = 1.0 if settings.oracle else right / max(len(answered), 1)
    return answered, {"pseudo_coverage": coverage, "pseudo_precision": precision}


def scores(
    run: Run,
    reward: Scorer,
    name: str,
    queries: Sequence[Query],
    responses: Groups,
    *,
    only_correct: bool = False,
) -> Groups:
    """The responses of a pass with their step scores, asked with the run's prompt."""
    asked = ask(queries, run.template)
    settings = dict(reward.identity)
    return score(run, reward, name, asked, responses, settings=settings, only_correct=only_correct)


def draw(seed: int, name: str, query: Query) -> np.random.Generator:
    """Random numbers that depend on the run's seed, the pass and the query alone."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(query.id.encode())])


def source(
    run: Run, queries: Sequence[Query], kept: Callable[[Query], list[Response]], responses: Groups
) -> Source:
    """Training rows: each query's prompt, without a hint, and the responses that are kept of it. Where there
    are none, the notes say what became of all responses."""
    chosen = [tuple(r.tokens for r in kept(query)) for query in queries]  # without their texts: they are many
    some = [(query, tokens) for query, tokens in zip(queries, chosen) if tokens]
    asked = ask([query for query, _ in some], run.config.prompts.cot)
    rows = training_rows(run, asked, [tokens for _, tokens in some])
    return Source(rows, notes={} if rows else {"dropped": dropped(queries, responses)})


def dropped(queries: Sequence[Query], responses: Groups) -> dict[str, int]:
    """How many of the responses were truncated, and of the others how many had which verdict; `correct` ones
    were not selected. `unanswered` counts queries without any response: their prompts are too long."""
    causes = collections.Counter[str]()
    unanswered = 0
    for query in queries:
        group = responses.get(query.id, [])
        causes.update("truncated" if r.truncated else str(r.verdict) for r in group)
        unanswered += not group
    return {**causes, "unanswered": unanswered}


def training_rows(
    run: Run, asked: Sequence[Asked], responses: Sequence[tuple[Sequence[int], ...]]
) -> list[Row]:
    """Each prompt that fits, with the token ids of its responses."""
    prompts = plan(run, asked, "rows")
    return [Row(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True) if prompt is not None]
