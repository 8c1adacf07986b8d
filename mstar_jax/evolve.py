"""Self-evolving training (M-STaR, arXiv 2412.17451), from a base model to an evolved one.

    base       pi_0: a checkpoint; of the embedded data set a small policy, trained here on narrow data
    warm-up    shown the answers, pi_0 writes rationales; SFT on correct ones teaches it to reason in steps
    reward     R_p: a process reward model, trained once, on Monte-Carlo labels of the warm-up policy's steps
    iteration  generate   y_1..y_K ~ pi_t( . | x, o; T)     for a share of the labelled queries x, images o
               select     H( 1(a = a*) R_p(y) )             Top-2 by R_p of the correct responses
               improve    pi_t+1 = SFT(pi_t)                Adam's moments and the schedule are carried on
               explore    T = argmax Reward-Pass@2          on validation queries, every two iterations

Iterative RFT, ReST^EM, SFT and the control are the same loop with other values of the config.

Restarts: every verb is idempotent. What the workdir holds already is returned without computing it again,
and a verb that was interrupted continues where its files end. So a second start walks down this page once
more and ends with the same result, to the last bit.

Memory: a policy is a handle. It names a stage, and its parameters are read from the stage's checkpoint when a
verb first needs them, unless they are in memory still. `improve` takes the state of the policy it starts from
and donates it to the training, and R_p is loaded only while it scores: there is one TrainState at a time.
"""

import pathlib
from collections.abc import Callable, Mapping

import ml_collections

from mstar_jax.data import splits
from mstar_jax.records import Record
from mstar_jax.stages.base import base
from mstar_jax.stages.benchmark import benchmark
from mstar_jax.stages.explore import chosen_after, explore
from mstar_jax.stages.generate import generate
from mstar_jax.stages.improve import Carry, improve
from mstar_jax.stages.measure import measure
from mstar_jax.stages.policy import outcome
from mstar_jax.stages.reward_model import train_reward_model
from mstar_jax.stages.run import passed, start
from mstar_jax.stages.select import gold_answers, rationales, select, select_unlabelled
from mstar_jax.structs import Stage


def run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    head: Mapping[str, object],
    stop: Callable[[], bool],
) -> list[Record]:
    """Runs all stages, or what is left of them, and returns the records of results.json.

    Args:
      config: see `configs/`.
      workdir: everything that the run writes; a second start with the same config continues from it.
      head: what results.json says above its stages.
      stop: asked between device batches and steps; once true, the run saves and raises `Stopped`.

    Raises:
      ValueError: a config value is impossible, before anything is compiled.
      Stopped: see `stop`.
    """
    run = start(config, workdir, head, stop)
    warm, evolve = config.warmup, config.evolve

    # ---------------------------------------------------------------------------------------- base
    initial = base(run)
    measure(run, initial)  # greedy responses, and samples at eval.temperature, on validation and test queries

    # ------------------------------------------------------------------------------------- warm-up
    queries = run.labelled[: warm.queries]
    hinted = generate(
        run, Stage.warmup, initial, queries, warm.temperature, warm.k, template=config.prompts.hint
    )
    reasons = rationales(run, queries, hinted)  # correct ones, at random; trained on without the hint
    warmup = improve(run, Stage.warmup, initial, [reasons], temperature=warm.temperature)

    # -------------------------------------------------------------------------------- reward model
    # the warm-up policy writes responses, and completions of their steps, at prm.temperature; it is the trunk
    reward = train_reward_model(run, warmup)  # R_p, which never changes again; None where the config has none
    measure(run, warmup, reward, [reasons], warm.temperature)
    temperature = explore(run, warmup, reward, evolve.temperature)  # T; without R_p it stays as it is

    # -------------------------------------------------------------------------------------- evolve
    policy = warmup
    for t in range(1, evolve.iterations + 1):
        stage = Stage.iteration(t)
        if passed(run, stage):  # a restart, and iteration t + 1 has begun to train: t has nothing left to do
            policy = outcome(run, stage)
            temperature = chosen_after(run, stage, temperature)
            continue
        queries = splits.share(run.labelled, evolve.fraction, t, config.seed)

        if evolve.data == "rollouts":
            responses = generate(run, stage, policy, queries, temperature, evolve.k)
            sources = [select(run, stage, reward, queries, responses)]
            if joins(evolve, t):  # unlabelled queries: the same, with the answers that the responses vote for
                queries = splits.share(run.unlabelled, evolve.fraction, t, config.seed)
                responses = generate(run, stage, policy, queries, temperature, evolve.k, part="unlabelled")
                sources += [select_unlabelled(run, stage, reward, queries, responses, part="unlabelled")]
        elif evolve.data == "answers":  # SFT: the labelled answers themselves, nothing is sampled
            sources = [gold_answers(run, queries)]
        else:  # control: as many steps on what the warm-up was trained on
            sources = [reasons]

        if evolve.start == "initial":  # ReST^EM: pi_t has sampled, but the warm-up policy is trained again
            policy = warmup
        # besides the parameters; iteration 1 has other settings than the warm-up, so both are reset
        carry = Carry(
            moments=t > 1 and not evolve.reset_moments,
            schedule=t > 1 and not evolve.reset_schedule,
        )
        policy = improve(run, stage, policy, sources, carry=carry, temperature=temperature)
        measure(run, policy, reward, sources, temperature)  # every eval.every iterations, and at the end
        temperature = explore(run, policy, reward, temperature)  # every explore.every iterations
        if t > evolve.keep_checkpoints:
            run.checkpoints.drop(Stage.iteration(t - evolve.keep_checkpoints))

    # ---------------------------------------------------------------------------------- benchmarks
    if config.benchmarks.names:
        benchmark(run, [initial, warmup, policy], reward)
    run.checkpoints.wait()
    return run.results.records


def joins(evolve: ml_collections.ConfigDict, t: int) -> bool:
    """Whether unlabelled queries join in iteration t: once a share `unlabelled.mixin` of the run is done."""
    mixin = evolve.unlabelled.mixin
    return mixin is not None and t - 1 >= mixin * evolve.iterations
