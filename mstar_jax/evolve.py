"""Self-evolving training (M-STaR, arXiv 2412.17451), from a base model to an evolved one.

    base       a policy to start from: a checkpoint; the tiny one is trained here, on a narrow data set
    warm-up    prompted with the answer, the policy writes rationales; the correct ones teach it to reason
    reward     R(y) = H( 1(a = a*) R_p(y) ): a process reward model, trained on Monte-Carlo labels of steps
    iteration  generate:  y_1..y_K ~ pi_t( . | x, o; T)      for a share of the labelled queries
               reward:    Top-2 by R_p of the correct ones   (or Random-k, all, ...)
               improve:   pi_t+1 = SFT(pi_t)                 optimizer and schedule inherited, or reset
               explore:   T by Reward-Pass@2                 every two iterations

Iterative RFT, ReST^EM and SFT are the same loop with other values (`configs/tiny.py`).
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections

from mstar_jax.data import splits
from mstar_jax.stages.measure import Dynamics
from mstar_jax.stages.reward_model import Reward
from mstar_jax.stages.run import Run


def run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, head: dict[str, Any], stop: Callable[[], bool]
):
    """Runs all stages, or what is left of them, and returns the records of results.json.

    Args:
      config: see `configs/tiny.py`.
      workdir: everything the run writes; a second start with the same config goes on from there.
      head: what results.json says above its stages.
      stop: asked between device batches and steps; once true, the run saves and raises `Stopped`.

    Raises:
      ValueError: a config value is impossible, before anything is compiled.
      Stopped: see `stop`.
    """
    r = Run(config, workdir, head, stop)
    reward = Reward(r)
    dynamics = Dynamics(r, reward)
    warmup, evolve, unlabelled = config.warmup, config.evolve, config.evolve.unlabelled
    final = functools.partial(functools.partial, r.final)  # final("warmup")() is that stage's outcome

    # ---------------------------------------------------------------------------------------- base
    if not r.beyond("base"):
        r.base()
        dynamics.measure("base", 0, final("base"))

    # ------------------------------------------------------------------------------------- warm-up
    queries = r.labelled[: warmup.queries]
    hinted = r.generate(
        "warmup", final("base"), queries, config.prompts.hint, [warmup.temperature] * warmup.k
    )
    rationales = r.rows(queries, reward.rationales("warmup", queries, hinted, warmup.keep))
    if not r.beyond("warmup"):
        start = r.final("base")
        r.improve("warmup", 0, start, [(rationales, 1.0)], warmup, temperature=warmup.temperature)

    # -------------------------------------------------------------------------------- reward model
    reward.train()
    if not r.beyond("prm"):
        dynamics.measure("warmup", 0, final("warmup"), sum(len(row.responses) for row in rationales))

    # -------------------------------------------------------------------------------------- evolve
    for t in range(1, evolve.iterations + 1):
        stage, before = f"iteration_{t:02d}", "warmup" if t == 1 else f"iteration_{t - 1:02d}"
        if r.beyond(stage):
            continue
        temperature = dynamics.temperature(t)
        policy, sampled = final(before), [temperature] * evolve.k
        queries = splits.share(r.labelled, evolve.fraction, t, config.seed)
        more: dict[str, Any] = {}

        if evolve.data == "rollouts":
            # generate: y_1..y_K ~ pi_t( . | x, o; T), for this iteration's share of the queries
            responses = r.generate(stage, policy, queries, r.template, sampled, iteration=t)
            # reward: H( 1(a = a*) R_p(y) )
            sources = [(r.rows(queries, reward.keep(stage, queries, responses)), 1.0)]
            # prompts: unlabelled queries join once T_mixin of the training is done, with voted answers
            if unlabelled.mixin is not None and t - 1 >= unlabelled.mixin * evolve.iterations:
                name = f"{stage}_unlabelled"
                queries = splits.share(r.unlabelled, evolve.fraction, t, config.seed)
                responses = r.generate(name, policy, queries, r.template, sampled, iteration=t)
                queries, responses, more = reward.pseudo_label(name, queries, responses)
                rows = r.rows(queries, reward.keep(name, queries, responses))
                sources.append((rows, unlabelled.weight))
        elif evolve.data == "answers":  # SFT: the labelled answers themselves, no sampling
            sources = [(r.answer_rows(queries), 1.0)]
        else:  # control: the same steps on what the warm-up had
            sources = [(rationales, 1.0)]

        # improve: pi_t+1 = SFT(pi_t); continuous training inherits the optimizer's moments and the schedule
        start = r.final("warmup" if evolve.start == "initial" else before)
        r.improve(
            stage,
            t,
            start,
            sources,
            evolve,
            moments=not evolve.reset_moments and t > 1,
            schedule=not evolve.reset_schedule and t > 1,
            temperature=temperature,
        )
        # explore: the dynamics, and the temperature that they ask for
        kept = sum(len(row.responses) for rows, _ in sources for row in rows)
        if t % config.eval.every == 0 or dynamics.explores(t) or t == evolve.iterations:
            dynamics.measure("iteration", t, final(stage), kept, more)
        r.forget(t - evolve.keep_checkpoints)

    # ---------------------------------------------------------------------------------- benchmarks
    for stage in ("base", "warmup", *r.stages[3:][-1:]) if config.benchmarks.names else ():
        dynamics.benchmark(stage, final(stage))

    r.checkpoints.wait()
    return r.results.data["stages"]
