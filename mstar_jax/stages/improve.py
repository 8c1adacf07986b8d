"""improve: pi_t+1 = SFT(pi_t) on the selected responses, or a policy gradient on all of them."""

import functools
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax

from mstar_jax import configure, progress, sharding
from mstar_jax.data import loader
from mstar_jax.inference.generate import Stopped, stopping
from mstar_jax.profiling import flops, speed
from mstar_jax.stages.policy import (
    Policy,
    check_values,
    frozen_in,
    policy_after,
    program,
    restore,
    restore_params,
    settings_of,
    values_of,
    with_frozen_dtype,
)
from mstar_jax.stages.run import Run
from mstar_jax.structs import Model, Source, Stage, TrainState
from mstar_jax.training import curves, optimizer
from mstar_jax.training.checkpoint import EvolveState
from mstar_jax.training.step import Loss, Metrics, check_finite, token_loss

log = logging.getLogger(__name__)

AHEAD = 2  # steps that the device is given beyond the one that it is at; a stop waits for all of them
EXPLODED = 10  # times the loss that a stage begins with: is warned of


class Carry(NamedTuple):
    """What a stage's training inherits besides the parameters that it starts from.

    Attributes:
      policy: whose training is carried on; its state is donated. None for that of the policy to start from.
      moments: the optimizer's; otherwise they start from zero.
      schedule: the place in the learning rate's schedule; otherwise it starts at its beginning.
    """

    policy: Policy | None = None
    moments: bool = False
    schedule: bool = False


NOTHING = Carry()


def improve(
    run: Run,
    stage: Stage,
    start: Policy,
    sources: Sequence[Source],
    *,
    carry: Carry = NOTHING,
    sampled_at: float,
    loss: Loss = token_loss,
) -> Policy:
    """Trains a policy on responses.

    Args:
      run: see `Run`.
      stage: the stage whose outcome is returned.
      start: the policy to start from; its state is donated.
      sources: what it learns; a weight is that of each of a source's rows.
      carry: what of the optimizer is carried on.
      sampled_at: the temperature that the responses were sampled at; only written into the checkpoint.
      loss: what is minimised.
    """

    def begin() -> TrainState:
        policy = carry.policy or start
        if policy.stage == start.stage or not (carry.moments or carry.schedule):
            if policy is not start:
                policy.release()  # it has sampled, and nothing of it is carried on
            return carried(run, stage, start.take(), carry)
        start.release()
        state = policy.take()._replace(params=())  # makes room for the other parameters
        return carried(run, stage, state._replace(params=restore_params(run, start.stage)), carry)

    return train(run, stage, begin, shares(sources), sampled_at=sampled_at, loss=loss)


def shares(sources: Sequence[Source]) -> list[Source]:
    """The sources with their shares of the rows drawn as weights, from the weights of their rows: of two rows
    with the same weight neither is drawn more often, whatever the sizes of their sources."""
    weights = [source.weight * len(source.rows) for source in sources]
    total = sum(weights) or 1.0
    return [source._replace(weight=weight / total) for source, weight in zip(sources, weights)]


def carried(run: Run, stage: Stage, state: TrainState, carry: Carry) -> TrainState:
    """The first state of a stage's training, from the last one of the stage before."""
    state = state._replace(params=with_frozen_dtype(run, stage, state.params))
    if carry.moments:
        state = optimizer.moments_in(state, "device")
    return optimizer.carry_on(
        state,
        run.tx,
        run.mesh,
        frozen=frozen_in(run, stage),
        moments=carry.moments,
        schedule=carry.schedule,
    )


def train(
    run: Run,
    stage: Stage,
    begin: Callable[[], TrainState],
    sources: Sequence[Source],
    *,
    sampled_at: float = 0.0,
    loss: Loss = token_loss,
    until: Callable[[Model, int], bool] | None = None,
) -> Policy:
    """Trains for the stage's number of steps, or for those that remain after its checkpoint; the policy of a
    finished stage is returned at once.

    Args:
      run: see `Run`.
      stage: which stage.
      begin: returns the first state; called only if the stage has no checkpoint.
      sources: what is trained on; a weight is a source's share of the rows drawn, relative to the others.
      sampled_at: the temperature that the responses were sampled at; only written into the checkpoint.
      loss: what is minimised.
      until: (parameters, steps done) -> whether to end early; called every `check_every` steps.
    """
    saved = run.checkpoints.run(stage)
    if saved is not None:
        check_values(run, stage, saved)
        if saved.done:
            return policy_after(run, stage)
    settings = settings_of(run, stage)
    train = run.config.train
    step, plain = program(run, stage, loss)
    state = restore(run, stage) if saved else begin()
    cursor = saved.cursor if saved else 0
    steps = settings.steps if any(len(source.rows) for source in sources) else 0
    if not steps and settings.steps:
        log.warning("%s: no response can teach, so nothing is trained", stage)
    batches: Any = steps and batches_of(run, stage, sources, saved.loader if saved else None)
    rates = optimizer.learning_rates(configure.schedule(settings), int(state.step) - cursor, steps)
    curve = curves.StageLog(run.workdir, stage, cursor, saved.curve if saved else None)
    unread: list[tuple[int, Metrics]] = []  # steps whose loss and gradient have not been looked at
    first_loss = 0.0  # in the curve
    likelihood = settings.get("objective", "sft") == "sft"  # the size of other losses says nothing

    def save(done: bool, wait: bool = False) -> None:
        check_losses(run, stage, unread)
        where = EvolveState(
            stage=stage.kind,
            iteration=stage.number,
            cursor=cursor,
            done=done,
            temperature=sampled_at,
            seed=run.seed,
            loader=batches.get_state() if batches else {},
            curve=curve.pending(),
            values=values_of(run, stage),
        )
        run.checkpoints.save(stage, state, where, wait)

    watch = run.speeds.of("train prm" if stage == Stage.reward_model else "train", stage.name)
    bar = progress.bar(steps, f"{stage}: train", cursor, "step")
    with bar, speed.profiler(run.workdir / "profile" / stage.name, train.profile) as profile:
        while cursor < steps:
            if until and cursor % settings.check_every == 0 and watch.apart(until, state.params, cursor):
                break
            if profile(cursor, state):
                watch.skip()
            batch = next(batches)
            rate = rates[cursor]
            state, values = step(state, sharding.put_batch(batch, run.mesh), rate)
            watch.begin(batch, functools.partial(flops.count, plain, state, batch, rate))
            cursor += 1
            unread.append((cursor, values))
            jax.block_until_ready(unread[-1 - AHEAD : -AHEAD])
            curve.add(values)
            bar.update()
            if cursor % train.log_every == 0 or cursor == steps:
                check_losses(run, stage, unread)
                mean = curve.write(cursor, float(rate), watch.done)["loss"]
                bar.set_postfix_str(f"loss {mean:.3f}")
                first_loss = first_loss or mean
                if likelihood and mean > EXPLODED * first_loss:
                    text = "%s: the loss explodes: %.3g at step %d, %.3g at first; the learning rate is %.3g"
                    log.warning(text, stage, mean, cursor, first_loss, rate)
                    first_loss = float("inf")  # said once
            if stopping(run.stop, cursor, train.log_every):
                save(done=False, wait=True)
                raise Stopped(f"{stage}: stopped and saved after step {cursor} of {steps}")
            first = not run.checkpoints.saved  # after a start: the next kill may come soon
            due = first or cursor % train.save_every == 0
            if cursor < steps and (due or stopping(run.checkpoints.old, cursor, train.log_every)):
                watch.apart(save, False, first)
    if until and 0 < steps == cursor:
        log.warning(
            "%s: took all of its %d steps, and was not seen to reach %s.target", stage, steps, stage.kind
        )
    curve.close()
    save(done=True, wait=True)
    return policy_after(run, stage, state)


def batches_of(
    run: Run, stage: Stage, sources: Sequence[Source], state: dict[str, Any] | None
) -> grain.DatasetIterator:
    """The endless batches of a stage's rows, from where a checkpoint's `state` of them stands."""
    return loader.train_batches(
        [(source.rows, source.weight) for source in sources],
        run.processor,
        settings_of(run, stage).batch,
        run.data.buckets,
        seed=(run.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31,
        grouped=run.data.grouped,
        workers=run.data.workers,
        share=sharding.share_of(run.mesh),
        state=state,
    )


def check_losses(run: Run, stage: Stage, unread: list[tuple[int, Metrics]]) -> None:
    """Looks at the losses and gradients of (step, metrics) pairs, and empties their list.

    Raises:
      ValueError: one is not finite; says what to change.
    """
    try:
        check_finite(unread)
    except ValueError as error:
        section = "evolve" if stage.number else stage.kind
        rate, clip = settings_of(run, stage).learning_rate, run.config.train.clip
        raise ValueError(
            f"{stage}: {error}; it is not saved, and the checkpoints before it stay. Start another workdir "
            f"with a lower {section}.learning_rate than {rate:g}, or clip gradients at less "
            f"(train.clip = {clip:g}; 0 is no limit)"
        ) from error
    unread.clear()
