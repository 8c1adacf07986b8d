"""A policy as a handle: which stage it is the outcome of, and its state, restored when first asked for."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mstar_jax import configure, models, sharding
from mstar_jax.models import vlm
from mstar_jax.ranges import flat
from mstar_jax.stages.run import Program, Run
from mstar_jax.structs import Model, Stage, TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.checkpoint import EvolveState
from mstar_jax.training.step import Loss, Step, abstract_state, make_train_step
from mstar_jax.workdir import FREE


@dataclasses.dataclass
class Policy:
    """The outcome of a stage's training: parameters, the optimizer's moments, the place in the schedule.

    Attributes:
      stage: which stage's.
      restore: reads the state back.
      state: while it is in memory.
    """

    stage: Stage
    restore: Callable[[], TrainState]
    state: TrainState | None = None

    @property
    def params(self) -> Model:
        """The parameters."""
        self.state = self.state or self.restore()
        return self.state.params

    def take(self) -> TrainState:
        """Hands the state over to a training that donates it; asked again, the policy is restored."""
        state = self.state or self.restore()
        self.release()
        return state

    def release(self) -> None:
        """Makes room on the device; asked again, the policy is restored."""
        self.state = None


def policy_after(run: Run, stage: Stage, state: TrainState | None = None) -> Policy:
    """The handle of a finished stage's policy; nothing is read yet."""
    return Policy(stage, lambda: at_rest(run, restore(run, stage)), state and at_rest(run, state))


def at_rest(run: Run, state: TrainState) -> TrainState:
    """A state that does not train: with `train.offload_optimizer` its moments make room on the devices."""
    return optimizer.moments_in(state, "pinned_host") if run.config.train.offload_optimizer else state


def drop_checkpoints(run: Run, t: int) -> None:
    """After iteration t, drops the checkpoints of iterations, but not the last `evolve.keep_checkpoints` ones
    nor that of the best one so far."""
    best = run.results.best()
    for number in range(1, t - run.config.evolve.keep_checkpoints + 1):
        if (stage := Stage.iteration(number)) != best:
            run.checkpoints.drop(stage)


def restore(run: Run, stage: Stage) -> TrainState:
    """The newest state of a stage, from its checkpoint; of a pretrained base, from the files it came in."""
    if stage == Stage.base and not configure.trains_base(run.config):
        return given(run, configure.base_dtype(run.config.train))
    abstract = abstract_state(builder(run, stage), run.tx, run.mesh, frozen=frozen_in(run, stage))
    return run.checkpoints.restore(stage, abstract)


def given(run: Run, dtype: jnp.dtype) -> TrainState:
    """A checkpoint's policy, as it came; there is no optimizer yet."""
    assert isinstance(run.source, models.Pretrained)
    return TrainState(0, run.source.load(dtype, mesh=run.mesh, seed=run.seed), ())


def restore_params(run: Run, stage: Stage) -> Any:
    """The parameters of a stage alone (a `Model`, or the reward model), without the optimizer's moments.

    No handle keeps them: they are freed as soon as the caller drops them.
    """
    abstract = jax.eval_shape(builder(run, stage))
    layout = sharding.shardings(abstract, sharding.TRAIN, run.mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    return run.checkpoints.params(stage, abstract)


def builder(run: Run, stage: Stage) -> Callable[[], Any]:
    """Builds what a stage trains, with random parameters: the policy, or the reward model around one."""

    def build() -> Any:
        model: Any = run.source.build(run.seed)
        return with_frozen_dtype(run, stage, vlm.RewardModel(model) if stage == Stage.reward_model else model)

    return build


def with_frozen_dtype(run: Run, stage: Stage, params: Any) -> Any:
    """With LoRA, the frozen parameters in their own dtype; up to the base stage nothing is adapted yet."""
    train = run.config.train
    if stage <= Stage.base or not train.lora.rank:
        return params
    return optimizer.cast_frozen(params, frozen_in(run, stage), configure.base_dtype(train))


def frozen_in(run: Run, stage: Stage) -> tuple[str, ...]:
    """Patterns of the parameters that a stage does not train."""
    return configure.frozen(run.config.train, stage)


def settings_of(run: Run, stage: Stage) -> ml_collections.ConfigDict:
    """The part of the config with a stage's steps, batch and learning rate."""
    return run.config.evolve if stage.number else run.config[stage.kind]


def values_of(run: Run, stage: Stage) -> dict[str, object]:
    """The values of the config that a stage's training depends on by dotted key, for its checkpoints."""
    c = run.config.to_dict()
    section = "evolve" if stage.number else stage.kind
    found = flat({name: c[name] for name in ("policy", "data", "train", section)})
    kept = {key: value for key, value in found.items() if key not in FREE}
    return json.loads(json.dumps({"seed": run.seed, **kept}))  # as a checkpoint gives them back


def check_values(run: Run, stage: Stage, saved: EvolveState) -> None:
    """Checks that a checkpoint is of this run, or of one with the same values.

    Raises:
      ValueError: it is not.
    """
    there, now = saved.values, values_of(run, stage)
    told = [f"{key}: {there.get(key)} there, {now.get(key)} now" for key in there | now]
    changed = [text for key, text in zip(there | now, told) if there.get(key) != now.get(key)]
    if changed:
        folder = run.checkpoints.folder / stage.name
        raise ValueError(
            f"{folder}: trained with other values ({'; '.join(changed)}); remove it to train the stage again"
        )


def program(run: Run, stage: Stage, loss: Loss) -> Program:
    """The training step of a stage: one program for all that train the same parameters by the same loss."""
    train = run.config.train
    frozen = frozen_in(run, stage)
    if (loss, frozen) not in run.programs:

        def make(accumulate: int, remat: str) -> Step:
            return make_train_step(
                run.tx,
                run.mesh,
                loss=loss,
                frozen=frozen,
                accumulate=accumulate,
                dtype=jnp.dtype(train.dtype),
                remat=remat,
            )

        step = make(train.accumulate, train.remat)
        traced = train.accumulate == 1 and train.remat == "none"  # the step itself is the plain one
        run.programs[loss, frozen] = Program(step, step if traced else make(1, "none"))
    return run.programs[loss, frozen]
