"""Self-evolving training (M-STaR, arXiv 2412.17451), from a base policy to an evolved one.

    base       a checkpoint; or a small policy, trained here from scratch on narrow data; or a checkpoint
               that is taught to see first (`base.tune`)
    warm-up    shown the gold answers, the base policy writes rationales (or a file holds them); SFT on the
               correct ones gives pi_1
    reward     R_p, a process reward model, trained once: on Monte-Carlo labels of steps of pi_1's responses,
               or on those of a file
    iteration  generate   y_1..y_K ~ pi_t( . | x, o; T)    for a share of labelled queries x with images o
               select     H( 1(a = a*) R_p(y) )            by default the Top-2 by R_p of the correct ones
               improve    pi_{t+1} = SFT(pi_t, selected)   the optimizer's moments and the schedule carry over
               explore    T = argmax Reward-Pass@2         on validation queries; every 2 iterations, say

The other methods are the same function with other values (configs/variants.py):

    method          evolve.data  evolve.start  moments, schedule  queries an iteration
    M-STaR          rollouts     last          carry over         25 %
    Continuous      rollouts     last          carry over         25 %, without R_p
    Iterative RFT   rollouts     last          reset              100 %, without R_p
    ReST^EM         rollouts     warmup        reset              100 %, without R_p
    SFT             answers      last          carry over         25 %, trains on the gold answers
    control         warmup       last          carry over         trains on the warm-up's rationales again
    RLOO, GRPO      rollouts     last          carry over         25 %, trains on right and wrong responses

The last two do not imitate what is selected: `evolve.objective` says how a response's advantage over the
others to its query pushes it up or down (training/objectives.py).

Restarts: every step below is idempotent. Whatever is in the workdir already is returned, and a step that was
interrupted continues where its files end. A second start runs through this function again and ends with the
same result (bit for bit on a CPU).

Memory: a `Policy` is a handle. It names a stage, and its parameters are read from the stage's checkpoint when
they are first needed, unless they are still in memory. `improve` takes the state of the policy that it starts
from, and R_p is loaded only while it scores, so there is never more than one TrainState.
"""

import pathlib
from collections.abc import Callable, Mapping

import ml_collections

from mstar_jax.data import splits
from mstar_jax.records import Record
from mstar_jax.stages.base import base
from mstar_jax.stages.benchmark import benchmark
from mstar_jax.stages.curriculum import next_queries
from mstar_jax.stages.explore import explore, temperature_after
from mstar_jax.stages.generate import generate
from mstar_jax.stages.given import given_rationales
from mstar_jax.stages.improve import Carry, improve
from mstar_jax.stages.measure import check_measured, measure
from mstar_jax.stages.policy import drop_checkpoints, policy_after
from mstar_jax.stages.reward_model import train_reward_model
from mstar_jax.stages.run import start, superseded
from mstar_jax.stages.select import gold_answers, select, select_rationales, select_unlabelled
from mstar_jax.stages.weigh import weigh
from mstar_jax.structs import Stage
from mstar_jax.training import objectives


def evolve(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    header: Mapping[str, object],
    stop: Callable[[], bool],
) -> list[Record]:
    """Runs all stages, or what is left of them, and returns the records of results.json.

    Args:
      config: see `configs/base.py`.
      workdir: the folder for everything that the run writes; a second start continues from it.
      header: fields of results.json besides the records.
      stop: polled between device batches and training steps; once it returns true, the run saves and raises
        `Stopped`.

    Raises:
      ValueError: a config value is invalid, before anything is compiled.
      Stopped: see `stop`.
    """
    run = start(config, workdir, header, stop)  # data, mesh, stores: values only, none of the state below
    method = config.evolve

    # ---------------------------------------------------------------------------------------- base
    base_policy = base(run)
    measure(run, base_policy)  # `eval`: a greedy response and samples of every validation and test query

    # ------------------------------------------------------------------------------------- warm-up
    if config.warmup.data:
        queries, hinted = given_rationales(run)  # those of a file, judged as ours
    else:
        queries = run.labelled[: config.warmup.queries]  # labelled queries come shuffled
        hinted = generate(
            run, Stage.warmup, base_policy, queries, config.warmup.temperature, config.warmup.k,
            template=config.prompts.hint,
        )  # fmt: skip
    rationales = select_rationales(run, queries, hinted)  # correct ones at random; their prompt has no hint
    warmup = improve(run, Stage.warmup, base_policy, [rationales], sampled_at=config.warmup.temperature)

    # -------------------------------------------------------------------------------- reward model
    # `prm`: the warm-up policy writes responses, and completions of each of their steps to label it; R_p is a
    # copy of this policy with a head; `prm.data` has both already. None where the config has no reward model
    reward = train_reward_model(run, warmup)
    measure(run, warmup, reward, [rationales], sampled_at=config.warmup.temperature)  # by R_p too, so here
    temperature = explore(run, warmup, reward, method.temperature)  # unchanged without R_p or explore.every

    # -------------------------------------------------------------------------------------- evolve
    policy = warmup
    for t in range(1, method.iterations + 1):
        stage = Stage.iteration(t)
        if superseded(run, stage):  # a restart after a later stage has trained: this checkpoint may be gone
            check_measured(run, stage, reward)
            policy = policy_after(run, stage)
            temperature = temperature_after(run, stage, temperature)
            continue

        if method.data == "rollouts":
            queries = next_queries(run, t)  # by evolve.curriculum; uniform: the next ones of an epoch
            gradient = method.objective != "sft"  # a policy gradient, which asks how likely each token was
            responses = generate(run, stage, policy, queries, temperature, method.k, logprobs=gradient)
            if gradient:
                sources = [weigh(run, stage, policy, reward, queries, responses)]
            else:
                sources = [select(run, stage, reward, queries, responses)]
            if unlabelled_join(method, t):  # as above, with the answers that the responses vote for
                queries = splits.share(run.unlabelled, method.fraction, t, config.seed)
                responses = generate(run, stage, policy, queries, temperature, method.k, part="unlabelled")
                sources += [select_unlabelled(run, stage, reward, queries, responses, part="unlabelled")]
        elif method.data == "answers":
            sources = [gold_answers(run, splits.share(run.labelled, method.fraction, t, config.seed))]
        else:  # "warmup"
            sources = [rationales]

        # ReST^EM: pi_t has sampled, but training restarts from the parameters of the warm-up policy
        start_policy = warmup if method.start == "warmup" else policy
        # the rest is pi_t's; iteration 1 has other settings than the warm-up and inherits neither
        carry = Carry(
            policy,
            moments=t > 1 and not method.reset_moments,
            schedule=t > 1 and not method.reset_schedule,
        )
        loss = objectives.loss_of(method, run.processor.forbidden_ids)  # for sft, token_loss
        policy = improve(run, stage, start_policy, sources, carry=carry, sampled_at=temperature, loss=loss)
        measure(run, policy, reward, sources, sampled_at=temperature)  # every eval.every, and the last one
        temperature = explore(run, policy, reward, temperature)  # every explore.every iterations
        drop_checkpoints(run, t)  # but the last evolve.keep_checkpoints, and the best one

    # ---------------------------------------------------------------------------------- benchmarks
    if config.benchmarks.names:
        benchmark(run, [base_policy, warmup, policy], reward)  # R_p votes over samples
    run.checkpoints.wait()
    return run.results.records


def unlabelled_join(method: ml_collections.ConfigDict, t: int) -> bool:
    """Whether unlabelled queries join in iteration t: once the fraction `unlabelled.mixin` of the iterations
    is done; None is never."""
    mixin = method.unlabelled.mixin
    return mixin is not None and t - 1 >= round(mixin * method.iterations, 6)  # 0.55 * 20 is over 11
