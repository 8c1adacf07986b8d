"""explore: the sampling temperature with the best Reward-Pass@2 on validation queries (Figures 4 and 5)."""

import logging

import numpy as np

from mstar_jax.inference.score import Scorer
from mstar_jax.rewards import metrics
from mstar_jax.rewards import temperature as temperatures
from mstar_jax.stages.generate import pass_name, respond
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run, lap
from mstar_jax.stages.select import scores
from mstar_jax.structs import Stage

log = logging.getLogger(__name__)


def explore(run: Run, policy: Policy, reward: Scorer | None, temperature: float) -> float:
    """Samples validation queries at each of `explore.temperatures` and chooses one of them; what it found
    joins the stage's validation record as `grid` and `chosen`.

    Where it is not time for this (every `explore.every` iterations, and after the warm-up), or without a
    reward model, the temperature stays as it is. It also stays with `explore.adapt` off, which only measures.

    Args:
      run: see `Run`.
      policy: what is sampled from.
      reward: what scores the samples.
      temperature: the one sampled at until now.

    Returns:
      The temperature to sample at from now on.
    """
    stage, c = policy.stage, run.config.explore
    record = run.results.find(stage, "validation")
    if (record is None or "grid" not in record) and reward is not None and explores(run, stage, reward):
        queries = run.validation[: c.queries]
        part = "temperatures"
        sampled = [0.0, *np.repeat(list(c.temperatures), c.samples).tolist()]
        found = respond(run, stage, policy, queries, sampled, part=part, batch=c.batch, kind="evaluation")
        found = scores(run, reward, pass_name(stage, part), queries, found)
        groups = [found[query.id] for query in queries if query.id in found]
        k = min(run.config.eval.k, c.samples)
        rows = metrics.by_temperature(groups, k, aggregate=run.config.prm.aggregate, alpha=c.alpha)
        grid = [row | {"k": k, "n": len(groups)} for row in rows]
        chosen = temperatures.choose(grid, c.criterion, temperature) if c.adapt else None
        if chosen is not None:
            log.info("%s: temperature %g, chosen by %s (it was %g)", stage, chosen, c.criterion, temperature)
        run.results.extend(stage, "validation", {"grid": grid, "chosen": chosen} | lap(run))
    return temperature_after(run, stage, temperature)


def temperature_after(run: Run, stage: Stage, temperature: float) -> float:
    """What a finished exploration after a stage chose, as its record says; else the temperature given."""
    record = run.results.find(stage, "validation") or {}
    chosen = record.get("chosen")
    return temperature if chosen is None else chosen


def explores(run: Run, stage: Stage, reward: Scorer | None) -> bool:
    """Whether temperatures are explored after a stage."""
    every = run.config.explore.every
    return bool(reward is not None and every and stage >= Stage.warmup and stage.number % every == 0)
