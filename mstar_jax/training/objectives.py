"""Objectives that learn from right and wrong responses: a response's advantage over the others, and the loss.

    reinforce   A_i = r_i - mean of the other r          loss of a token = -min(rho, c) A log p
    grpo        A_i = (r_i - mean of r) / std of r       loss of a token = -min(rho A, clip(rho) A)

r is a response's reward among the K responses to one query, p the policy's probability of the token, and rho
= p / p_old, where p_old is that of the policy that the stage began with. All of them are probabilities at the
temperature that was sampled at, and among the ids that were: the policy that is improved is the one that was
sampled.

Advantages are numpy's and are made once, on the host; a row carries them as the weights of its tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax.structs import Batch, Remat
from mstar_jax.training.step import Loss, Metrics, token_loss

LIMIT = 20.0  # nats; log ratios are cut here, so that no exponential overflows and turns a gradient into NaN
SAME = 1e-6  # of rewards in 0..1: those that differ by less are equal

# ---- 1. advantages ------------------------------------------------------------------------------------


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean of the others: float64[K] of float64[K]; zeros if all are equal.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; RLOO, arXiv 2402.14740.
    """
    if not _differ(rewards):
        return np.zeros(len(rewards))
    return (len(rewards) * rewards - rewards.sum()) / (len(rewards) - 1)


def group_normalised(rewards: np.ndarray) -> np.ndarray:
    """A_i = (r_i - mean) / std, with the standard deviation of the group itself: float64[K] of float64[K];
    zeros if all are equal.

    Source: GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2).
    """
    if not _differ(rewards):
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / rewards.std()


def _differ(rewards: np.ndarray) -> bool:
    """Whether there is a direction: 0.1 + 0.2 and 0.3 are equal rewards, and rounding must not make one."""
    return len(rewards) > 1 and bool(rewards.max() - rewards.min() > SAME)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # by `evolve.objective`
    "reinforce": leave_one_out,
    "grpo": group_normalised,
}


def dense(
    advantage: Callable[[np.ndarray], np.ndarray],
    scores: Sequence[Sequence[float]],
    ends: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> list[np.ndarray]:
    """The process reward's part of the advantages, for every token of a query's responses.

        A_it = sum over the steps j of response i that end at t or later  of  a_ij

    a_ij is the `advantage` of the step's score among the scores of all steps of all responses. So a token
    answers for its own step and for what follows from it.

    Source: process supervision in GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

    Args:
      advantage: one of ADVANTAGES.
      scores: each response's step scores.
      ends: the index of each step's last token, see `rewards.steps.ends`.
      lengths: tokens of each response.

    Returns:
      For each response float64[its length]; zeros where its steps are unknown (no scores, or not as many as
      ends).
    """
    known = [each if len(each) == len(at) else () for each, at in zip(scores, ends, strict=True)]
    values = iter(advantage(np.array([score for each in known for score in each], np.float64)))
    out = []
    for each, at, length in zip(known, ends, lengths, strict=True):
        own = np.array([next(values) for _ in each])
        found = np.zeros(length)
        if len(own):
            to_go = np.cumsum(own[::-1])[::-1]
            found[: at[-1] + 1] = np.repeat(to_go, np.diff([-1, *at]))
        out.append(found)
    return out


def importance(trainer: np.ndarray, sampler: np.ndarray, most: float) -> np.ndarray:
    """min(p_trainer / p_sampler, most), token by token: what corrects for a sampler that computes otherwise
    than the trainer (another dtype, a cache in 8 bits, a truncated distribution).

    Source: truncated importance sampling (Ionides 2008).

    Args:
      trainer, sampler: log probabilities (nats) of the same tokens, of the same shape.
      most: where weights are cut.
    """
    return np.minimum(np.exp(np.clip(trainer - sampler, -LIMIT, LIMIT)), most)


# ---- 2. losses ----------------------------------------------------------------------------------------


def reinforce(logprob: jax.Array, weight: jax.Array, old: jax.Array, truncate: float) -> jax.Array:
    """-min(rho, truncate) A log p of every token [B, T]; the factor min(rho, truncate) has no gradient. It is
    1 if `truncate` is 0.

    On the data's own policy this is REINFORCE (Williams 1992). The factor corrects for the steps since then,
    as in V-trace (arXiv 1802.01561): without it wrong responses would be pushed down without end.
    """
    if not truncate:
        return -weight * logprob
    return -jax.lax.stop_gradient(jnp.minimum(_ratio(logprob, old), truncate)) * weight * logprob


def grpo(logprob: jax.Array, weight: jax.Array, old: jax.Array, low: float, high: float) -> jax.Array:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) of every token [B, T].

    Source: PPO (arXiv 1707.06347, equation 7), token by token as in GRPO (arXiv 2402.03300); two bounds as in
    DAPO (arXiv 2503.14476).
    """
    ratio = _ratio(logprob, old)
    return -jnp.minimum(ratio * weight, jnp.clip(ratio, 1.0 - low, 1.0 + high) * weight)


def divergence(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """q / p - log(q / p) - 1 of every token [B, T]: an estimate of KL(p || q) on samples of p that is never
    negative, "k3".

    Source: Schulman 2020, "Approximating KL divergence"; the penalty of GRPO.
    """
    ratio = jnp.clip(reference - logprob, -LIMIT, LIMIT)
    return jnp.exp(ratio) - ratio - 1.0


def _ratio(logprob: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(logprob - old, -LIMIT, LIMIT))


def response_shares(branch: jax.Array) -> jax.Array:
    """float32[B, T]: 1 / (tokens of the own response), and 0 outside of responses."""
    own = jnp.maximum(branch, 0)
    lengths = jax.vmap(lambda row: jnp.zeros_like(row).at[row].add(1)[row])(own)
    return jnp.where(branch > 0, 1.0 / lengths, 0.0)


@functools.cache  # the same function for the same values, so that one program trains all iterations
def make_loss(
    objective: str,
    *,
    clip_low: float,
    clip_high: float,
    truncate: float,
    kl: float,
    token_mean: bool,
    forbidden: tuple[int, ...] = (),
) -> Loss:
    """The loss of an objective, to train with (see `step.Loss`).

    Args:
      objective: sft, reinforce or grpo.
      clip_low, clip_high: of grpo, how far below and above 1 the ratio counts.
      truncate: of reinforce, the greatest ratio; 0 for no ratio.
      kl: weight of the divergence from `Batch.reference`.
      token_mean: all tokens of a step's batch weigh the same (DAPO); otherwise all its responses do (GRPO).
      forbidden: ids that are never sampled.
    """
    if objective == "sft":
        return token_loss

    def loss(model: Any, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, Metrics]:
        own = batch.branch > 0
        outputs = model(batch, remat)
        logprob, right = model.token_logprobs(outputs, batch.tokens, own, batch.temperature, forbidden)
        logprob = jnp.where(own, logprob, 0.0)
        if objective == "grpo":
            lost = grpo(logprob, batch.loss_mask, batch.old, clip_low, clip_high)
        else:
            lost = reinforce(logprob, batch.loss_mask, batch.old, truncate)
        if kl:
            lost += kl * divergence(logprob, batch.reference)
        share = own.astype(jnp.float32) if token_mean else response_shares(batch.branch)
        return (lost * share).sum(), {"tokens": share.sum(), "right": (right * share).sum()}

    return loss


def loss_of(values: Mapping[str, Any], forbidden: Sequence[int]) -> Loss:
    """The loss of `config.evolve`, for a processor with these `forbidden_ids`."""
    return make_loss(
        values["objective"],
        clip_low=values["clip_low"],
        clip_high=values["clip_high"],
        truncate=values["truncate"],
        kl=values["kl"],
        token_mean=values["token_mean"],
        forbidden=tuple(forbidden),
    )
