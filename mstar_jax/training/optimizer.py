"""The optimizer: its schedule, what it trains, and what of it a stage carries on."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mstar_jax import sharding
from mstar_jax.structs import TrainState


class Schedule(NamedTuple):
    """A learning rate by optimizer step; its numbers are arguments of the train step: none recompiles it."""

    peak: Any
    steps: Any
    warmup_steps: Any
    final_fraction: Any

    def __call__(self, step: Any) -> jax.Array:
        """float32[]."""
        warm = jnp.minimum((step + 1) / jnp.maximum(self.warmup_steps, 1), 1.0)
        after = (step - self.warmup_steps) / jnp.maximum(self.steps - self.warmup_steps, 1)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(after, 0.0, 1.0)))
        return self.peak * warm * ((1.0 - self.final_fraction) * cosine + self.final_fraction)


def make_schedule(peak: float, steps: int, warmup_steps: int, final_fraction: float) -> Schedule:
    """Linear warm-up, then a cosine to `final_fraction` of the peak (1 keeps it constant).

    `steps` is the length of the whole run, fixed at its start; it is never recomputed from the data of
    an iteration.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"the learning rate warms up over {warmup_steps} steps of a run of {steps}")
    return Schedule(*map(float, (peak, steps, warmup_steps, final_fraction)))


def _scale_by_schedule(own: optax.Schedule) -> optax.GradientTransformation:
    """optax's, downhill; by another schedule than its own where `update` is given one."""

    def update(updates, state, params=None, schedule=None, **_):
        rate = schedule or own
        return optax.scale_by_schedule(lambda count: -rate(count)).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.scale_by_schedule(own).init, update)


def split(params: Any, frozen: Sequence[str]) -> tuple[Any, Any]:
    """What is trained and what is frozen: the same tree twice, each empty where the other has a parameter.

    Args:
      params: a model.
      frozen: see `make_optimizer`.
    """

    def part(wanted: bool) -> Any:
        def keep(path, leaf):
            return leaf if _matches(path, frozen) == wanted else optax.MaskedNode()

        return jax.tree_util.tree_map_with_path(keep, params)

    return part(False), part(True)


def join(trained: Any, fixed: Any) -> Any:
    """The model whose parts `split` returned."""

    def empty(leaf):
        return isinstance(leaf, optax.MaskedNode)

    return jax.tree.map(lambda a, b: b if empty(a) else a, trained, fixed, is_leaf=empty)


def store(params: Any, frozen: Sequence[str], dtype: Any) -> Any:
    """The model with what is frozen in another dtype."""
    trained, fixed = split(params, frozen)
    return join(trained, sharding.cast(fixed, dtype))


def _matches(path: Any, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, sharding.parameter_name(path)) for pattern in patterns)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    frozen: Sequence[str] = (),
) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm of what is trained.

    Args:
      schedule: learning rate by optimizer step, where an update is given no other one.
      b1, b2, weight_decay: AdamW's.
      clip: greatest global gradient norm.
      frozen: regular expressions; a parameter whose dotted name contains a match is not trained and has
        no optimizer moments.
    """

    def labels(params):
        def label(path, _):
            return "frozen" if _matches(path, frozen) else "trained"

        # a function, not a tree: with a tree, multi_transform let raw gradients through to frozen weights
        return jax.tree_util.tree_map_with_path(label, params)

    adamw = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.chain(  # optax.adamw
            optax.scale_by_adam(b1, b2), optax.add_decayed_weights(weight_decay), _scale_by_schedule(schedule)
        ),
    )
    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, labels)


def check_frozen(model: Any, frozen: Sequence[str]) -> None:
    """Refuses a pattern that freezes nothing.

    Raises:
      ValueError: with the pattern and the parameters that there are.
    """
    names = [sharding.parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    for pattern in frozen:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"train.frozen: {pattern!r} matches no parameter; there are {', '.join(names)}")


def carry_on(
    state: TrainState, tx: optax.GradientTransformation, mesh: Any, *, moments: bool, schedule: bool
) -> TrainState:
    """A stage's first state, from the last one of the stage before.

    Args:
      state: parameters and, where something is kept, the optimizer state of the same optimizer.
      tx: the stage's optimizer.
      mesh: the device mesh.
      moments: keep Adam's moments (and their bias correction); new ones start from copies of the parameters.
      schedule: keep the place in the learning rate's schedule, instead of its beginning.
    """
    return state if moments and schedule else _carried(tx, mesh, moments, schedule)(state)


@functools.lru_cache(maxsize=8)  # one program, however many stages carry on alike
def _carried(
    tx: optax.GradientTransformation, mesh: Any, moments: bool, schedule: bool
) -> Callable[..., Any]:
    def place(leaf):
        return isinstance(leaf, optax.ScaleByScheduleState)

    def init(state):
        params = jax.tree.map(jnp.copy, state.params)
        new = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        if moments or schedule:
            kept = jax.tree.map(
                lambda old, fresh: old if (schedule if place(old) else moments) else fresh,
                state.opt_state,
                new.opt_state,
                is_leaf=place,
            )
            new = new._replace(step=state.step if schedule else new.step, opt_state=kept)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(new, sharding.TRAIN, mesh))

    return jax.jit(init)
