"""The process reward model R_p: trained once, on Monte-Carlo labels of the warm-up policy's steps."""

import collections
import functools
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from mstar_jax import models
from mstar_jax.data import loader, splits, truth
from mstar_jax.inference import sampler
from mstar_jax.inference.generate import (
    Asked,
    Groups,
    Inference,
    Task,
    ask,
    pass_key,
    plan,
    sample_rows,
    sampler_for,
)
from mstar_jax.inference.score import Scorer, of_folder, score, score_with
from mstar_jax.models import vlm
from mstar_jax.rewards import custom, metrics, prm, selection
from mstar_jax.stages.generate import failures, generate
from mstar_jax.stages.given import Labelled, Labels, given_labels, reported_on, warmup_queries
from mstar_jax.stages.improve import Carry, carried, train
from mstar_jax.stages.policy import Policy, restore_params
from mstar_jax.stages.run import Run, lap
from mstar_jax.store import complete
from mstar_jax.structs import Query, Response, Row, ScoringModel, Source, Stage, TrainState

log = logging.getLogger(__name__)

Ranked = tuple[Hashable, float, bool]  # (group, score, is it right)


def train_reward_model(run: Run, warmup: Policy) -> Scorer | None:
    """Labels the steps of the warm-up policy's responses, trains the reward model on them, and reports on it.
    Where there is `prm.data`, its responses and labels take their place.

    Nothing is trained where `prm.path` names a reward model, or the warm-up's own likelihood selects.

    Args:
      run: see `Run`.
      warmup: writes the responses and their completions, and becomes the reward model's trunk; its state is
        donated.

    Returns:
      The reward model, None where the config has none.
    """
    settings = run.config.prm
    if settings.path:
        return pretrained_scorer(run)
    if run.config.evolve.select == "likelihood":
        return own_scorer(run, likelihood=True)
    if not (settings.queries or settings.data):
        return None
    reward = own_scorer(run, likelihood=False)
    reported = run.results.find(Stage.reward_model, "held-out") is not None
    if reported and run.checkpoints.has(Stage.reward_model):  # a damaged one is gone, and made again
        return reward

    if settings.data:
        found = given_labels(run)
    else:
        found = monte_carlo_labels(run, warmup)

    # SFT with the labels as targets, from the warm-up policy
    rows = labelled_rows(run, ask(found.trained, run.template), found.responses, found.labels)

    def begin() -> TrainState:
        start = TrainState(0, vlm.RewardModel(warmup.take().params), ())
        return carried(run, Stage.reward_model, start, Carry())

    loss = prm.make_loss(settings.mc_weight)
    train(run, Stage.reward_model, begin, [Source(rows)], sampled_at=settings.temperature, loss=loss)

    if reported:
        return reward
    record = report(run, reward, ask(found.held_out, run.template), found.responses, found.labels)
    record |= failures(run, Stage.reward_model, lambda: failed_rewards(run, found.responses))
    run.results.add(Stage.reward_model, record | lap(run))
    log.info("prm: AUC within held-out queries: %s", auc_text(record))
    return reward


# ---- 1. the reward model as a scorer ------------------------------------------------------------------


def own_scorer(run: Run, *, likelihood: bool) -> Scorer:
    """The run's reward model; with `likelihood` the warm-up policy as an untrained reward model."""

    def load() -> ScoringModel:
        stage = Stage.warmup if likelihood else Stage.reward_model
        params = restore_params(run, stage)
        model = vlm.RewardModel(params) if likelihood else params
        return sampler.for_sampling(model, run.mesh, jnp.dtype(run.sampling.dtype))

    identity = {"path": "", "likelihood": likelihood}
    return Scorer(load, identity, run.processor, prm.as_written(run.processor, run.texts))


def pretrained_scorer(run: Run) -> Scorer:
    """The reward model of `prm.path`, of any family."""
    c = run.config
    files = models.pretrained(c.prm.path, run.source.family, c.policy.max_crops)
    identity = {"path": c.prm.path, "head": c.prm.head}
    return of_folder(files, c.prm, run.mesh, jnp.dtype(run.sampling.dtype), identity)


# ---- 2. data ------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """The labelled queries that the reward model is trained and reported on."""

    trained: Sequence[Query]
    held_out: Sequence[Query]


def reward_queries(run: Run) -> Queries:
    """`prm.held_out` and `prm.queries` of the labelled queries, no image in both; those that the warm-up
    trained on come last: the policy may have memorised them (see `splits.hold_out`)."""
    settings = run.config.prm
    known = {query.id for query in warmup_queries(run)}
    order = sorted(run.labelled, key=lambda query: query.id in known)
    held_out = reported_on(run, order)
    found = Queries(splits.apart(order, held_out)[: settings.queries], held_out)
    again = sum(query.id in known for part in found for query in part)
    if again or len(found.trained) < settings.queries:
        text = "prm: %d labelled queries are few: %d of them to train on, %d in all were the warm-up's"
        log.warning(text, len(order), len(found.trained), again)
    return found


def monte_carlo_labels(run: Run, warmup: Policy) -> Labelled:
    """Responses of the warm-up policy, and of each of their steps the share of completions that are right."""
    settings = run.config.prm
    queries, held_out = reward_queries(run)
    responses = generate(
        run, Stage.reward_model, warmup, [*queries, *held_out], settings.temperature, settings.k
    )
    labels = label(run, warmup, [*queries[: settings.labelled], *held_out], responses)
    return Labelled(queries, held_out, responses, labels)


def label(run: Run, policy: Policy, queries: Sequence[Query], responses: Groups) -> Labels:
    """Monte-Carlo labels of the steps of every response."""
    settings = run.config.prm
    rows: list[Row] = []
    for prompt in plan(run, ask(queries, run.template), "prm"):
        if prompt is not None:
            found = prm.prefixes(responses[prompt.query.id], run.texts)
            longest = max(run.data.buckets)
            rows += prm.stems(prompt, found, settings.completions, settings.samples, longest)
    task = Task(
        folder="labels/prm",
        temperatures=[settings.temperature] * settings.samples,
        key=pass_key(run.seed, "labels"),
        settings={
            "completions": settings.completions,
            "samples": settings.samples,
            "temperature": settings.temperature,
            **run.grading.identity,
        },
        kind="labels",
    )
    sampled_by = sampler_for(run, settings.samples, settings.rows)
    record = functools.partial(label_record, run)
    store, shards = sample_rows(run, task, sampled_by, rows, lambda: policy.params, record)
    values: dict[str, dict[prm.Prefix, float]] = {query.id: {} for query in queries}
    for query_id, reached in store.read(shards, read_labels):
        values[query_id].update(reached)
    return {
        (query.id, r.sample): prm.label(r, values[query.id], run.texts, hard=settings.hard)
        for query in queries
        for r in responses.get(query.id, ())
    }


def label_record(run: Run, row: Row, completions: Sequence[Response]) -> dict[str, object]:
    """A record of the store of labels: how many completions of each step prefix reached the gold answer."""
    query, count = row.prompt.query, run.prm.completions
    steps = []
    for at in range(0, len(row.starts), count):
        branch, kept, _ = row.starts[at]
        if kept:
            judged = run.grading.judge(query, completions[at : at + count])
            tokens = row.responses[branch - 1][:kept]
            reached = len(selection.correct(judged))
            text = run.processor.decode(tokens)
            step = {"text": text, "reached": reached, "of": count, "tokens": list(tokens)}
            failed = sum(r.verdict == selection.FAILED for r in judged)
            steps.append(step | ({"failed": failed} if failed else {}))
    return {"query": query.id, "question": query.question, "gold": query.answer, "steps": steps}


def read_labels(record: dict[str, Any]) -> tuple[str, list[tuple[prm.Prefix, float]]]:
    """(query id, the share of right completions of each step prefix) of such a record."""
    return record["query"], [(tuple(s["tokens"]), s["reached"] / s["of"]) for s in record["steps"]]


def failed_rewards(run: Run, responses: Groups) -> dict[str, custom.Failures]:
    """Where a user's reward failed: of the responses, and of the completions of their steps, if there are
    any."""
    sampled = {"sampled": custom.failures(responses.values())}
    if run.config.prm.data:
        return sampled
    store, shards = complete(run.workdir / "labels" / "prm")
    total = 0
    found = collections.Counter[str]()
    for record in store.read(shards, dict):
        for step in record["steps"]:
            total += step["of"]
            found[record["query"]] += step.get("failed", 0)
    return sampled | {"completions": custom.count(total, +found)}


def labelled_rows(host: Inference, asked: Sequence[Asked], responses: Groups, labels: Labels) -> list[Row]:
    """Rows to train the reward model on: the distinct responses of each query; where their steps have no
    labels, the correct ones."""
    rows: list[Row] = []
    left_out = long = 0
    encode = prm.as_written(host.processor, host.texts)
    for prompt in plan(host, asked, "prm"):
        if prompt is None:
            continue
        every = selection.distinct(responses.get(prompt.query.id, []))
        room = max(host.data.buckets) - prompt.length  # those of a file may be of any length
        found = [r for r in every if len(encode(r.text).tokens) <= room]
        long += len(every) - len(found)
        own = [labels[r.query_id, r.sample] for r in found if (r.query_id, r.sample) in labels]
        try:
            if own:
                row = prm.row(prompt, found, encode, own)
                least = prompt.length + max(map(len, row.responses))  # a long prompt makes a longer row
                rows += loader.split_rows([row], max(host.prm.longest, least))
            elif right := selection.correct(found):
                rows.append(Row(prompt, tuple(tuple(encode(r.text).tokens) for r in right)))
        except ValueError as error:
            left_out += 1
            log.warning("prm: left out: %s", error)
    if left_out:
        log.warning("prm: %d of %d queries left out", left_out, len(asked))
    if long:
        text = "prm: %d responses left out: with their prompt over %d tokens, the largest of data.buckets"
        log.warning(text, long, max(host.data.buckets))
    return rows


# ---- 3. report ----------------------------------------------------------------------------------------


def report(
    run: Run, reward: Scorer, asked: Sequence[Asked], responses: Groups, labels: Labels
) -> dict[str, Any]:
    """How good the reward model is on held-out queries: against their Monte-Carlo labels, as a verifier,
    and, on the embedded data, against what the generator knows, next to the untrained one."""
    aggregate = run.config.prm.aggregate
    asked = [each for each in asked if each.query.id in responses]
    some = {each.query.id: responses[each.query.id] for each in asked}
    scored = score(run, reward, "prm_held_out", asked, some, settings=dict(reward.identity))
    pairs = [
        (r.query_id, step, value, target)
        for group in scored.values()
        for r in selection.distinct(group)
        if r.step_scores is not None
        for step, (value, target) in enumerate(zip(r.step_scores, labels[r.query_id, r.sample]))
    ]
    values = [value for _, _, value, _ in pairs]
    targets = [target for *_, target in pairs]
    right = [target >= 0.5 for target in targets]
    calibration: Mapping[str, object] = {**metrics.calibration(values, targets)} if pairs else {}
    groups = [(each.query, scored[each.query.id]) for each in asked if each.query.answer is not None]
    least = min((len(group) for _, group in groups), default=0)
    ns = [n for n in (1, 2, 4, 8, 16, 32) if n <= least]
    record: dict[str, Any] = {
        "split": "held-out",
        "n": len(asked),
        "responses": sum(map(len, scored.values())),
        "steps": len(pairs),
        "label_auc": metrics.auc(values, right),
        "label_auc_within": within(
            ((query, step), value, target >= 0.5) for query, step, value, target in pairs
        ),
        "ece": calibration.get("ece"),
        "brier": calibration.get("brier"),
        "calibration": calibration.get("bins"),
        "curve": metrics.curve(groups, ns, aggregate=aggregate) if groups else [],
    }
    asked = [each for each in asked if each.query.id in run.truth]
    if asked:
        some = {each.query.id: responses[each.query.id] for each in asked}
        scored = {each.query.id: scored[each.query.id] for each in asked}
        untrained = own_scorer(run, likelihood=True)
        plain = score_with(run, untrained, untrained.load(), asked, some)
        record["truth"] = against_truth(scored, run.truth, aggregate) | {
            f"{name}_likelihood": value for name, value in against_truth(plain, run.truth, aggregate).items()
        }
    return record | {"temperature": run.config.prm.temperature, "kept": None}


def auc_text(record: Mapping[str, Any]) -> str:
    """The AUCs of a record of `report`, and why that of the labels is missing."""
    known = {"labels": record["label_auc_within"]} | record.get("truth", {})
    shown = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
    if known["labels"] is not None:
        return ", ".join(shown)
    if not record["n"]:
        why = "no query is held out; see prm.held_out, and how many queries are labelled"
    elif not record["steps"]:
        why = f"no step of their {record['responses']} responses has a score"
    else:
        why = f"of their {record['steps']} steps no two of one query and number differ in being right"
    return ", ".join([f"labels none ({why})", *shown])


def against_truth(
    scored: Groups, known: Mapping[str, truth.Truth], aggregate: str
) -> dict[str, float | None]:
    """AUCs of scores within queries, on distinct responses, against the generator's knowledge:

    step_auc: is this step, and all before it, right; pairs of the same query and step number.
    all_right_auc: of the correct responses, which have all steps right; pairs of the same query.
    """
    steps: list[Ranked] = []
    whole: list[Ranked] = []
    for query, group in scored.items():
        for r in selection.distinct(group):
            if r.step_scores is None:
                continue
            right = truth.check_steps(r.text, known[query])
            steps += [((query, at), value, ok) for at, (value, ok) in enumerate(zip(r.step_scores, right))]
            if selection.correct([r]):
                reward = selection.reward(r, aggregate)
                whole.append((query, reward, truth.all_right(r.text, known[query])))
    return {"step_auc": within(steps), "all_right_auc": within(whole)}


def within(scores: Iterable[Ranked]) -> float | None:
    """The AUC over pairs of the same group."""
    groups: dict[Hashable, tuple[list[float], list[bool]]] = {}
    for group, value, right in scores:
        values, labels = groups.setdefault(group, ([], []))
        values.append(value)
        labels.append(right)
    return metrics.within_auc(groups.values())
