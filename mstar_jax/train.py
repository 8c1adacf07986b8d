"""The training step: losses over the branches of shared-prefix rows, and the optimizer."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mstar_jax import sharding
from mstar_jax.structs import Batch, TrainState

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def token_loss(model: Any, batch: Batch, remat: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed negative log likelihood (nats) of the branch tokens, weighted by `loss_mask`.

    A sum, not a mean: microbatches and devices are averaged by tokens afterwards.
    """
    logprob, right = model.token_logprobs(model(batch, remat), batch.tokens, batch.loss_mask > 0)
    loss = -(logprob * batch.loss_mask).sum()
    return loss, {"tokens": batch.loss_mask.sum(), "right": (right * batch.loss_mask).sum()}


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


def init_state(make_model: Callable[[], Any], tx: optax.GradientTransformation, mesh: Any) -> TrainState:
    """Initialises straight into the TRAIN layout; no device holds a full copy of a sharded array."""

    def init():
        model = make_model()
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model))

    layout = sharding.shardings(jax.eval_shape(init), sharding.TRAIN, mesh)
    return jax.jit(init, out_shardings=layout)()


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


def abstract_state(make_model: Callable[[], Any], tx: optax.GradientTransformation, mesh: Any) -> TrainState:
    """Shapes and shardings of the state, without its arrays: what a restore fills."""

    def init():
        model = make_model()
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model))

    abstract = jax.eval_shape(init)
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)


def make_train_step(
    tx: optax.GradientTransformation,
    mesh: Any,
    *,
    loss: Callable[..., Any] = token_loss,
    frozen: Sequence[str] = (),
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted step `(state, batch, schedule) -> (state, metrics)`; the state is donated. Without a
    schedule it is the optimizer's own.

    Args:
      tx: the optimizer.
      mesh: the device mesh.
      loss: `(model, batch, remat) -> (summed loss, {"tokens": weight, ...})`.
      frozen: the optimizer's; what matches has no gradient, and stays as it is, its dtype too.
      accumulate: microbatches per step; gradients are summed and divided by all their tokens, so the
        result is that of one large batch however the tokens fall.
      dtype: compute dtype; what is trained and the optimizer state stay float32.
      remat: `none`, `full` or `dots`: what the backward pass recomputes.

    Metrics: loss (nats per token), accuracy (share of tokens predicted), grad_norm (of what is trained),
    tokens.
    """
    policy, tx = REMAT[remat], optax.with_extra_args_support(tx)

    def summed(trained, fixed, batch):
        return loss(sharding.cast(join(trained, fixed), dtype), batch, policy)

    gradient = jax.value_and_grad(summed, has_aux=True)

    def step(state: TrainState, batch: Batch, schedule: Schedule | None = None):
        trained, fixed = split(state.params, frozen)
        size = batch.tokens.shape[0] // accumulate  # said outright: a text-only batch has empty pixels

        def cut(x):  # every accumulate-th row, so that a device's rows stay its own
            x = jnp.swapaxes(x.reshape(size, accumulate, *x.shape[1:]), 0, 1)
            return sharding.constrain(x, (None, "batch", *(None,) * (x.ndim - 2)), sharding.TRAIN)

        micro = jax.tree.map(cut, batch)

        def add(total, part):
            (value, extra), grads = gradient(trained, fixed, part)
            return jax.tree.map(jnp.add, total, (value, extra, grads)), None

        if accumulate == 1:
            (value, extra), grads = gradient(trained, fixed, batch)
        else:
            shapes = jax.eval_shape(gradient, trained, fixed, jax.tree.map(lambda x: x[0], micro))
            (value, extra), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (value, extra, grads), _ = jax.lax.scan(add, (value, extra, grads), micro)
        tokens = jnp.maximum(extra["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        grads = jax.lax.with_sharding_constraint(grads, sharding.shardings(grads, sharding.TRAIN, mesh))
        updates, opt_state = tx.update(grads, state.opt_state, trained, schedule=schedule)
        params = join(optax.apply_updates(trained, updates), fixed)
        metrics = {
            "loss": value / tokens,
            "accuracy": extra["right"] / tokens,
            "grad_norm": optax.global_norm(grads),
            "tokens": extra["tokens"],
        }
        new = TrainState(state.step + 1, params, opt_state)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(new, sharding.TRAIN, mesh)), metrics

    return jax.jit(step, donate_argnums=0)


def for_sampling(params: Any, mesh: Any, dtype: Any) -> nnx.Module:
    """The plain policy's weights in the SAMPLE layout and dtype; one transfer, no second master copy."""
    lower = params.merged(dtype)
    return jax.device_put(lower, sharding.shardings(lower, sharding.SAMPLE, mesh))
