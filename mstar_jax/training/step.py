"""The training step: losses over the branches of shared-prefix rows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mstar_jax import sharding
from mstar_jax.structs import Batch, Remat, TrainState
from mstar_jax.training.optimizer import Parts, join, new_state, split


def _attention(primitive: jax.extend.core.Primitive, *args: Any, **params: Any) -> bool:
    """Saves the attention of rows: the results of cuDNN's kernel, and what the others name `attention`."""
    named = jax.checkpoint_policies.save_only_these_names("attention")
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or named(primitive, *args, **params)


REMAT: dict[str, Remat | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _attention,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention
    ),
}
Metrics = dict[str, jax.Array]
LearningRate = np.float32 | jax.Array  # float32[]


class Loss(Protocol):
    """A loss to train with: of a batch, summed over what `tokens` counts.

    Returns the sum, and `tokens` (the weight that the sum is divided by), `right` (how much of it was
    predicted correctly) and, where `right` counts something else than tokens, `counted` (out of how much).
    """

    def __call__(self, model: Any, batch: Batch, remat: Remat | None) -> tuple[jax.Array, Metrics]: ...


class Step(Protocol):
    """A jitted train step; the state is donated."""

    def __call__(
        self, state: TrainState, batch: Batch, learning_rate: LearningRate
    ) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState, batch: Batch, learning_rate: LearningRate) -> jax.stages.Lowered: ...


def token_loss(model: Any, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, Metrics]:
    """Negative log-likelihood (nats) of the branch tokens, weighted by `loss_mask` and summed.

    It is a sum and not a mean, so that microbatches and devices are averaged over tokens afterwards: by the
    weights without their signs, so that weights of -1 give minus the gradient of weights of 1.
    """
    logprob, right = model.token_logprobs(model(batch, remat), batch.tokens, batch.loss_mask != 0)
    loss = -(logprob * batch.loss_mask).sum()
    weight = jnp.abs(batch.loss_mask)
    return loss, {"tokens": weight.sum(), "right": (right * weight).sum()}


def check_finite(steps: Sequence[tuple[int, Metrics]]) -> None:
    """Looks for the first step whose loss or gradient is not finite, and with it everything after.

    Args:
      steps: (number of the step, its metrics); they are read from the device together.

    Raises:
      ValueError: with the step, and what is not finite.
    """
    for number, values in jax.device_get(list(steps)):
        for key, name in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            if not np.isfinite(values[key]):
                raise ValueError(f"the {name} of step {number} is {float(values[key])}")


def init_state(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    frozen: Sequence[str] = (),
) -> TrainState:
    """Initialises a state directly in the TRAIN layout; no device holds a full copy of a sharded array."""

    def init():
        return new_state(make_model(), tx, frozen)

    layout = sharding.shardings(jax.eval_shape(init), sharding.TRAIN, mesh)
    return jax.jit(init, out_shardings=layout)()


def abstract_state(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    frozen: Sequence[str] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of a state, without its arrays: what a restore fills."""
    abstract = jax.eval_shape(lambda: new_state(make_model(), tx, frozen))
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)


def make_train_step(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    loss: Loss = token_loss,
    frozen: Sequence[str] = (),
    accumulate: int = 1,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "none",
) -> Step:
    """Returns the jitted step `(state, batch, learning_rate) -> (state, metrics)`; the state is donated.

    The learning rate is a float32 scalar from the host (see `optimizer.learning_rates`): an argument of the
    program, so that stages with other schedules do not recompile it.

    Args:
      tx: the optimizer, without a learning rate.
      mesh: the device mesh.
      loss: what is minimised.
      frozen: see `optimizer.split`; frozen parameters have no gradient, and keep their values and dtype.
      accumulate: microbatches of a step. Their gradients are summed and divided by the tokens of all of
        them, so that the result is that of one large batch, however its tokens are distributed.
      dtype: of the computation; trained parameters and the optimizer state stay float32.
      remat: what the backward pass recomputes, see `REMAT`.

    Metrics: loss (nats per token), accuracy (share of the tokens, or of the reward model's steps, that are
    predicted correctly), grad_norm (of the trained parameters, before clipping) and tokens.
    """
    policy = REMAT[remat]

    def summed(trained: nnx.Module, fixed: nnx.Module, batch: Batch) -> tuple[jax.Array, Metrics]:
        return loss(sharding.cast(join(Parts(trained, fixed)), dtype), batch, policy)

    differentiated = jax.value_and_grad(summed, has_aux=True)

    def gradient(
        trained: nnx.Module, fixed: nnx.Module, batch: Batch
    ) -> tuple[tuple[jax.Array, Metrics], nnx.Module]:
        # scattered at once: with several replicas the compiler would sum whole gradients in each microbatch
        value, grads = differentiated(trained, fixed, batch)
        return value, jax.lax.with_sharding_constraint(grads, sharding.shardings(grads, sharding.TRAIN, mesh))

    def step(state: TrainState, batch: Batch, learning_rate: LearningRate) -> tuple[TrainState, Metrics]:
        trained, fixed = split(state.params, frozen)
        size = batch.tokens.shape[0] // accumulate  # not -1 in reshape: a text-only batch has empty pixels

        def cut(x):  # every accumulate-th row, so that rows stay on their device
            x = jnp.swapaxes(x.reshape(size, accumulate, *x.shape[1:]), 0, 1)
            return sharding.constrain(x, (None, "batch", *(None,) * (x.ndim - 2)), sharding.TRAIN)

        def add(total, microbatch):
            (value, extra), grads = gradient(trained, fixed, microbatch)
            return jax.tree.map(jnp.add, total, (value, extra, grads)), None

        if accumulate == 1:
            (value, extra), grads = gradient(trained, fixed, batch)
        else:
            microbatches = jax.tree.map(cut, batch)
            shapes = jax.eval_shape(gradient, trained, fixed, jax.tree.map(lambda x: x[0], microbatches))
            (value, extra), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (value, extra, grads), _ = jax.lax.scan(add, (value, extra, grads), microbatches)
        tokens = jnp.maximum(extra["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, optax.tree.scale(-learning_rate, updates))
        metrics = {
            "loss": value / tokens,
            "accuracy": extra["right"] / jnp.maximum(extra.get("counted", extra["tokens"]), 1e-6),
            "grad_norm": optax.global_norm(grads),
            "tokens": extra["tokens"],
        }
        new = TrainState(state.step + 1, join(Parts(trained, fixed)), opt_state)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(new, sharding.TRAIN, mesh)), metrics

    return jax.jit(step, donate_argnums=0)
