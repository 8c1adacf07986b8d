"""improve: pi_t+1 = SFT(pi_t) on the selected responses."""

import functools
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mstar_jax import configure, progress, sharding
from mstar_jax.data import loader
from mstar_jax.inference.generate import Stopped, stopping
from mstar_jax.profiling import flops, speed
from mstar_jax.stages.policy import (
    Policy,
    frozen_in,
    policy_after,
    program,
    restore,
    settings_of,
    with_frozen_dtype,
)
from mstar_jax.stages.run import Run
from mstar_jax.structs import EvolveState, Model, Source, Stage, TrainState
from mstar_jax.training import curves, optimizer
from mstar_jax.training.step import Loss, token_loss

log = logging.getLogger(__name__)


class Carry(NamedTuple):
    """What a stage's training inherits from the stage that it starts from, besides the parameters.

    Attributes:
      moments: the optimizer's; otherwise they start from zero.
      schedule: the place in the learning rate's schedule; otherwise it starts at its beginning.
    """

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
      sources: what it learns.
      carry: what of the optimizer is carried on.
      sampled_at: the temperature that the responses were sampled at; only written into the checkpoint.
      loss: what is minimised.
    """

    def begin() -> TrainState:
        return carried(run, stage, start.take(), carry)

    return train(run, stage, begin, sources, sampled_at=sampled_at, loss=loss)


def carried(run: Run, stage: Stage, state: TrainState, carry: Carry) -> TrainState:
    """The first state of a stage's training, from the last one of the stage before."""
    state = state._replace(params=with_frozen_dtype(run, stage, state.params))
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
      sources: what is trained on.
      sampled_at: the temperature that the responses were sampled at; only written into the checkpoint.
      loss: what is minimised.
      until: (parameters, steps done) -> whether to end early; called every `check_every` steps.
    """
    saved = run.checkpoints.run(stage)
    if saved is not None and saved.done:
        return policy_after(run, stage)
    settings = settings_of(run, stage)
    train = run.config.train
    step, plain = program(run, stage, loss)
    state = restore(run, stage) if saved else begin()
    cursor = saved.cursor if saved else 0
    steps = settings.steps if any(len(source.rows) for source in sources) else 0
    if not steps:
        log.warning("%s: no response was kept, so nothing is trained", stage)
    batches: Any = steps and loader.train_batches(
        [(source.rows, source.weight) for source in sources],
        run.processor,
        settings.batch,
        run.data.buckets,
        seed=(run.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31,
        grouped=run.data.grouped,
        workers=run.data.workers,
        share=sharding.share_of(run.mesh),
        state=saved.loader if saved else None,
    )
    rates = optimizer.learning_rates(configure.schedule(settings), int(state.step) - cursor, steps)
    curve = curves.StageLog(run.workdir, stage, cursor, saved.curve if saved else None)

    def save(done: bool, wait: bool = False) -> None:
        where = EvolveState(
            stage=stage.kind,
            iteration=stage.number,
            cursor=cursor,
            done=done,
            temperature=sampled_at,
            seed=run.seed,
            loader=batches.get_state() if batches else {},
            curve=curve.pending(),
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
            curve.add(values)
            bar.update()
            if cursor % train.log_every == 0 or cursor == steps:
                means = curve.write(cursor, float(rate), watch.done)
                bar.set_postfix_str(f"loss {means['loss']:.3f}")
            if stopping(run.stop, cursor, train.log_every):
                save(done=False, wait=True)
                raise Stopped(f"{stage}: stopped and saved after step {cursor} of {steps}")
            if cursor % train.save_every == 0 and cursor < steps:
                watch.apart(save, False)
    curve.close()
    save(done=True, wait=True)
    return policy_after(run, stage, state)
