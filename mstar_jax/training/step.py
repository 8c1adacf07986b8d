"""The training step: losses over the branches of shared-prefix rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mstar_jax import sharding
from mstar_jax.structs import Batch, TrainState
from mstar_jax.training.optimizer import Schedule, join, split

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


def init_state(make_model: Callable[[], Any], tx: optax.GradientTransformation, mesh: Any) -> TrainState:
    """Initialises straight into the TRAIN layout; no device holds a full copy of a sharded array."""

    def init():
        model = make_model()
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model))

    layout = sharding.shardings(jax.eval_shape(init), sharding.TRAIN, mesh)
    return jax.jit(init, out_shardings=layout)()


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
