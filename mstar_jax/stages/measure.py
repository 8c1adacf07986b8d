"""measure: the dynamics of a stage's policy (greedy accuracy, Pass@K, gap, Reward-Pass@2; Figure 3)."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mstar_jax.data import truth
from mstar_jax.inference.score import Scorer
from mstar_jax.records import write_samples
from mstar_jax.rewards import custom, diversity, metrics, selection
from mstar_jax.stages.curriculum import worth
from mstar_jax.stages.explore import explores
from mstar_jax.stages.generate import failures, pass_name, respond, stored
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run, lap
from mstar_jax.stages.select import scores
from mstar_jax.structs import Query, Response, Source, Stage

log = logging.getLogger(__name__)


def measure(
    run: Run,
    policy: Policy,
    reward: Scorer | None = None,
    trained_on: Sequence[Source] = (),
    *,
    sampled_at: float | None = None,
) -> None:
    """Writes a policy's records on the validation split and, at the ends of the run, on the test split.

    Of the iterations every `eval.every`-th is measured, those after which T is explored, and the last.

    Args:
      run: see `Run`.
      policy: what is measured.
      reward: scores the samples.
      trained_on: what the policy was trained on, for the record.
      sampled_at: the temperature that this was sampled at; only written into the record.
    """
    stage, c = policy.stage, run.config
    for split in splits_of(run, stage, reward):
        if run.results.find(stage, split):
            continue
        queries = run.test if split == "test" else run.validation
        groups = answers(run, policy, reward, queries, split)
        measured = metrics.dynamics(groups, c.eval.k, aggregate=c.prm.aggregate, alpha=c.explore.alpha)
        record: dict[str, Any] = {"split": split, "n": len(groups), **measured, "k": c.eval.k}
        record["temperature"] = sampled_at
        record["kept"] = sum(source.responses for source in trained_on) if trained_on else None
        for source in trained_on:
            record |= source.notes
        failed = failures(run, stage, functools.partial(counted, run, stage, split, groups))
        if failed:
            record["reward_failed"] = {**record.get("reward_failed", {}), **failed["reward_failed"]}
        record |= worth(run, stage) if split == "validation" else {}
        record |= diversity.diversity(groups)
        record |= right_steps(groups, run.truth) | by_part(groups, run.truth, c.eval.k) | lap(run)
        by_id = {query.id: query for query in queries}
        asked = [by_id[group[0].query_id] for group in groups]
        name = pass_name(stage, split)
        write_samples(run.workdir / "samples" / f"{name}.md", asked, groups, c.eval.show)
        run.results.add(stage, record)
        shown = ("greedy_accuracy", "pass_at_k", "gap", "reward_pass_at_2")
        text = ", ".join(f"{key} {100 * measured[key]:.1f}%" for key in shown if key in measured)
        log.info("%s, %s: %s", stage, split, text)


def splits_of(run: Run, stage: Stage, reward: Scorer | None) -> tuple[str, ...]:
    """What a stage's policy is measured on."""
    c = run.config
    last = stage.number == c.evolve.iterations
    if stage.number and stage.number % c.eval.every and not explores(run, stage, reward) and not last:
        return ()
    at_an_end = stage.kind in c.eval.test_at or (stage.number and last)
    return ("validation", "test") if at_an_end else ("validation",)


def check_measured(run: Run, stage: Stage, reward: Scorer | None) -> None:
    """Checks that results.json has all of a stage that a later one has followed: its checkpoint may be gone,
    and the later ones sample at the temperature that its record names.

    Raises:
      ValueError: it has not.
    """
    found = {split: run.results.find(stage, split) for split in splits_of(run, stage, reward)}
    lost = [split for split, record in found.items() if record is None]
    if not lost and explores(run, stage, reward) and "grid" not in (found["validation"] or {}):
        lost = ["temperatures"]
    if lost:
        raise ValueError(
            f"{run.results.path}: no record of {stage} ({', '.join(lost)}), though a later stage has "
            "followed; restore the newest copy of this file, or name another --workdir"
        )


def answers(
    run: Run, policy: Policy, reward: Scorer | None, queries: Sequence[Query], split: str
) -> list[list[Response]]:
    """Per query its greedy response and its samples, scored where there is a reward model."""
    stage, c = policy.stage, run.config.eval
    temperatures = [0.0] + [c.temperature] * c.samples
    found = respond(run, stage, policy, queries, temperatures, part=split, kind="evaluation")
    if reward is not None:
        found = scores(run, reward, pass_name(stage, split), queries, found)
    return [found[query.id] for query in queries if query.id in found]


def counted(
    run: Run, stage: Stage, split: str, groups: Sequence[Sequence[Response]]
) -> dict[str, custom.Failures]:
    """Where a user's reward failed: of the responses measured and, once a stage, of those to train on."""
    sampled = stored(run, stage.name).values() if split == "validation" else ()
    return {"measured": custom.failures(groups), "sampled": custom.failures(sampled)}


def by_part(
    groups: Sequence[Sequence[Response]], known: Mapping[str, truth.Truth], k: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Where the embedded data's queries belong to parts, such as held-out figures, of each part: n queries,
    greedy and sampled accuracy, Pass@k, and the share of greedy responses with all steps right."""
    parts: dict[str, list[Sequence[Response]]] = {}
    for group in groups:
        if part := known[group[0].query_id].part if known else "":
            parts.setdefault(part, []).append(group)
    found: dict[str, dict[str, float]] = {}
    for part, some in parts.items():
        measured = metrics.dynamics(some, k) | right_steps(some, known)
        shown = ("greedy_accuracy", "sampled_accuracy", "pass_at_k", "all_right")
        found[part] = {"n": len(some)} | {key: measured[key] for key in shown if key in measured}
    return {"parts": found} if found else {}


def right_steps(groups: Sequence[Sequence[Response]], known: Mapping[str, truth.Truth]) -> dict[str, float]:
    """On the embedded data, of the greedy responses: all_right, the share with all steps right, and
    unfaithful, the share of the correct ones that have a wrong step."""
    greedy = [r for group in groups for r in group if r.temperature == 0]
    if not known or not greedy:
        return {}
    right = [truth.all_right(r.text, known[r.query_id]) for r in greedy]
    correct = [x for x, r in zip(right, greedy) if selection.is_correct(r)]
    unfaithful = {"unfaithful": 1 - sum(correct) / len(correct)} if correct else {}
    return {"all_right": sum(right) / len(right)} | unfaithful
