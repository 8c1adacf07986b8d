"""Numbers that tell how a policy narrows while it improves, and how far two of its computations agree."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mstar_jax.rewards import selection
from mstar_jax.structs import Response


def diversity(groups: Sequence[Sequence[Response]]) -> dict[str, float]:
    """How diverse the samples of a split are; all of it from what is stored of them.

    Args:
      groups: for each query its samples; greedy responses (temperature 0) among them are not looked at.

    Returns:
      entropy: of the distribution that is sampled from, in nats per token, estimated without bias as the mean
        of -log p over all sampled tokens (so long responses weigh more).
      groups_all_right, groups_all_wrong: the share of the queries whose samples are all correct, or all not.
        They teach nothing where advantages are differences within a query.
      distinct_correct: different correct texts per query.
      length_right, length_wrong: mean tokens of correct responses, and of the others.
      What is undefined (no samples, no correct one, ...) is left out.
    """
    samples = [[r for r in group if r.temperature > 0] for group in groups]
    samples = [group for group in samples if group]
    everything = [r for group in samples for r in group]
    tokens = sum(len(r.tokens) for r in everything)
    out: dict[str, float] = {}
    if tokens:
        out["entropy"] = -math.fsum(r.logprob for r in everything) / tokens
    if samples:
        right = [[selection.is_correct(r) for r in group] for group in samples]
        out["groups_all_right"] = sum(all(each) for each in right) / len(right)
        out["groups_all_wrong"] = sum(not any(each) for each in right) / len(right)
        texts = [{r.text for r in group if selection.is_correct(r)} for group in samples]
        out["distinct_correct"] = sum(map(len, texts)) / len(texts)
    for name, wanted in (("length_right", True), ("length_wrong", False)):
        lengths = [len(r.tokens) for r in everything if selection.is_correct(r) == wanted]
        if lengths:
            out[name] = sum(lengths) / len(lengths)
    return out


Pair = tuple[Sequence[float], Sequence[float]]  # log probabilities of the same tokens


def agreement(pairs: Iterable[Pair]) -> dict[str, float]:
    """How far sampler and trainer agree on the tokens that were sampled.

    Both are log probabilities at the temperature that was sampled at, among the ids that a response may hold:
    the difference is what dtype and cache make of the same policy. Only what `top_k`, `top_p` and `min_p` cut
    is not part of the trainer's distribution: with them the difference holds the log of the mass that they
    kept too, and the importance weight is that mass.

    Args:
      pairs: for each response (trainer, sampler), in nats.

    Returns:
      sampler_mean and sampler_greatest, of the absolute difference (nats), and sampler_ess, the effective
      sample size (sum w)^2 / sum w^2 of w = p_trainer / p_sampler as a share of the tokens: 1 where they
      agree. Empty without tokens.
    """
    count, total, greatest, weight, square = 0, 0.0, 0.0, 0.0, 0.0
    for trainer, sampler in pairs:
        gap = np.asarray(trainer, np.float64) - np.asarray(sampler, np.float64)
        each = np.exp(np.clip(gap, -50.0, 50.0))
        count += len(gap)
        total += float(np.abs(gap).sum())
        greatest = max(greatest, float(np.abs(gap).max(initial=0.0)))
        weight += float(each.sum())
        square += float((each**2).sum())
    if not count:
        return {}
    ess = weight**2 / square / count
    return {"sampler_mean": total / count, "sampler_greatest": greatest, "sampler_ess": ess}


def divergence(pairs: Iterable[Pair]) -> float | None:
    """KL(policy || reference) in nats per token, estimated on the policy's own samples: the mean of
    q / p - log(q / p) - 1, which is never negative ("k3", Schulman 2020). None without tokens.

    Args:
      pairs: for each response (policy, reference), in nats.
    """
    count, total = 0, 0.0
    for policy, reference in pairs:
        ratio = np.asarray(reference, np.float64) - np.asarray(policy, np.float64)
        count += len(ratio)
        total += float((np.exp(np.clip(ratio, -50.0, 50.0)) - ratio - 1.0).sum())
    return total / count if count else None
