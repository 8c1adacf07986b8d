"""The optimizer and its schedule, what is trained and what is frozen, and what a stage inherits.

The optimizer sees the trained part of a model only: `tx.init(split(params, frozen).trained)`. It knows no
learning rate. The train step is given the rate of each step, so that stages with different schedules share
one compiled program.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mstar_jax import sharding
from mstar_jax.structs import TrainState

Schedule = Callable[[np.ndarray], np.ndarray]  # optimizer steps -> their learning rates, float32


def make_optimizer(
    *, b1: float = 0.9, b2: float = 0.999, weight_decay: float = 0.0, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW, with gradients clipped by their global norm; the train step multiplies by the learning rate.

    Args:
      b1, b2: decay rates of Adam's first and second moments.
      weight_decay: decoupled weight decay, relative to the learning rate.
      clip: maximum global norm of the gradients; 0 does not clip.

    Raises:
      ValueError: `clip` is negative, which would turn the gradients round.
    """
    if clip < 0:
        raise ValueError(f"train.clip = {clip}: must be 0 (gradients are not clipped) or more")
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(b1, b2),
        optax.add_decayed_weights(weight_decay),
    )


def make_schedule(peak: float, steps: int, warmup_steps: int, final_fraction: float) -> Schedule:
    """Linear warm-up, then a cosine decay to `final_fraction` of the peak (1 keeps the rate constant).

    The first step has a rate of `peak / warmup_steps`, not 0. `steps` is the length of the whole run. It is
    fixed at the start and never recomputed from the data of an iteration.

    The rates are those of optax's `linear_schedule` and `cosine_decay_schedule`, outside of a program, to the
    last bit: there each of a dozen operations is a program of its own, here the cosine alone is one.

    Returns:
      float32 learning rates of optimizer steps; takes an array of steps.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(f"the learning rate warms up over {warmup_steps} steps of a run of {steps}")
    first = peak / max(warmup_steps, 1)
    ramp, decay = max(warmup_steps - 1, 1), max(steps - warmup_steps, 1)
    f32 = np.float32

    def rates(at: np.ndarray) -> np.ndarray:
        left = f32(1) - np.clip(at, 0, ramp).astype(f32) * (f32(1) / f32(ramp))  # as XLA divides
        rising = f32(first - peak) * left + f32(peak)
        along = np.minimum((at - warmup_steps).astype(f32), f32(decay))
        cosine = _cosines(f32(np.pi) * along * (f32(1) / f32(decay)))
        share = f32(1 - final_fraction) * (f32(0.5) * (f32(1) + cosine)) + f32(final_fraction)
        return np.where(at < warmup_steps, rising, f32(peak) * share)

    return rates


BLOCK = 512  # cosines that are computed together: stages of any length then share one program


def _cosines(x: np.ndarray) -> np.ndarray:
    """float32[N]: the cosines of float32[N] as XLA computes them."""
    if not len(x):
        return x
    padded = np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK)
    return np.concatenate([np.asarray(jnp.cos(block)) for block in padded])[: len(x)]


def learning_rates(schedule: Schedule, first: int, steps: int) -> np.ndarray:
    """float32[steps], on the host: the rates of optimizer steps `first`, `first + 1`, ..."""
    return schedule(np.arange(first, first + steps))


class Parts(NamedTuple):
    """A model in two parts: the same tree twice, with `optax.MaskedNode` where the other has a parameter."""

    trained: nnx.Module
    frozen: nnx.Module


TRUNK = "trunk."  # a reward model's: the parameters of the policy, under their names behind this one


def frozen_names(params: nnx.Module, frozen: Sequence[str]) -> set[str]:
    """The dotted names of the parameters that are frozen.

    Args:
      params: the policy, or a reward model: its trunk is frozen as the policy is, its own head never is.
      frozen: regular expressions; a parameter is frozen if its name in the policy contains a match of any.
    """
    names = list(sharding.named(params))
    start = TRUNK if any(name.startswith(TRUNK) for name in names) else ""
    return {
        name
        for name in names
        if name.startswith(start) and any(re.search(p, name.removeprefix(start)) for p in frozen)
    }


def split(params: nnx.Module, frozen: Sequence[str]) -> Parts:
    """Splits a model into what is trained and what is frozen; see `frozen_names`."""
    fixed = frozen_names(params, frozen)

    def part(wanted: bool) -> nnx.Module:
        def keep(path, leaf):
            is_frozen = sharding.parameter_name(path) in fixed
            return leaf if is_frozen == wanted else optax.MaskedNode()

        return jax.tree_util.tree_map_with_path(keep, params)

    return Parts(trained=part(False), frozen=part(True))


def join(parts: Parts) -> nnx.Module:
    """The model whose parts `split` returned."""

    def is_masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def pick(trained, frozen):
        return frozen if is_masked(trained) else trained

    return jax.tree.map(pick, parts.trained, parts.frozen, is_leaf=is_masked)


def cast_frozen(params: nnx.Module, frozen: Sequence[str], dtype: jax.typing.DTypeLike) -> nnx.Module:
    """The model with its frozen parameters in another dtype."""
    parts = split(params, frozen)
    return join(parts._replace(frozen=sharding.cast(parts.frozen, dtype)))


def check_frozen(params: nnx.Module, frozen: Sequence[str]) -> None:
    """Refuses a pattern that freezes nothing.

    Raises:
      ValueError: with the pattern and the names of all parameters.
    """
    for pattern in frozen:
        if not frozen_names(params, [pattern]):
            names = sharding.named(params)
            raise ValueError(f"train.frozen: {pattern!r} matches no parameter; there are {', '.join(names)}")


def new_state(
    params: nnx.Module,
    tx: optax.GradientTransformation,
    frozen: Sequence[str] = (),
    step: jax.typing.ArrayLike = 0,
) -> TrainState:
    """A TrainState whose optimizer state is new; frozen parameters have no entry in it."""
    return TrainState(jnp.asarray(step, jnp.int32), params, tx.init(split(params, frozen).trained))


def moments_in(state: TrainState, memory: str) -> TrainState:
    """The state with the optimizer's in a memory of its devices: `device`, or the host's `pinned_host`.

    Where the devices reach no such memory, the optimizer's state stays where it is.
    """

    def move(x: jax.Array) -> jax.Array:
        device: jax.Device = next(iter(x.sharding.device_set))
        if memory not in {each.kind for each in device.addressable_memories()}:
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(memory))

    return state._replace(opt_state=jax.tree.map(move, state.opt_state))


def carry_on(
    state: TrainState,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    frozen: Sequence[str] = (),
    moments: bool,
    schedule: bool,
) -> TrainState:
    """The first state of a stage, from the last state of the stage before.

    Args:
      state: the last state; without `moments` its `opt_state` is not read, and may be empty.
      tx: the optimizer.
      mesh: the device mesh.
      frozen: see `split`.
      moments: keep Adam's moments and the count that corrects their bias. Otherwise they are initialised and
        the parameters are copied, so that the train step does not donate those of `state`.
      schedule: keep the position in the learning rate schedule. Otherwise it starts from step 0.
    """
    step = state.step if schedule else np.int32(0)
    if not moments:
        return _restart(state.params, step, tx, mesh, tuple(frozen))
    if not schedule:
        step = jax.device_put(step, NamedSharding(mesh, PartitionSpec()))
    return state._replace(step=step)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _restart(params, step, tx, mesh, frozen):
    new = new_state(jax.tree.map(jnp.copy, params), tx, frozen, step)
    # All of the state is pinned: left alone, the compiler replicates the moments.
    return jax.lax.with_sharding_constraint(new, sharding.shardings(new, sharding.TRAIN, mesh))
