"""How diverse responses are, and how far two computations agree, by hand."""

import math

import numpy as np
import pytest

from mstar_jax.rewards.diversity import agreement, divergence, diversity
from mstar_jax.structs import Response


def response(text, tokens, logprob, verdict, temperature=1.0, truncated=False):
    return Response("q", 0, text, range(tokens), logprob, truncated, "1", verdict, temperature=temperature)


GROUPS = [
    [
        response("greedy", 9, -9.0, "correct", temperature=0.0),
        response("a", 2, -1.0, "correct"),
        response("a", 2, -1.0, "correct"),
        response("b", 4, -2.0, "correct"),
    ],
    [response("c", 6, -3.0, "wrong"), response("d", 2, -2.0, "correct", truncated=True)],
    [response("e", 4, -4.0, "correct"), response("f", 2, -1.0, "wrong")],
    [response("greedy", 3, -1.0, "wrong", temperature=0.0)],  # nothing was sampled
]


def test_diversity_by_hand():
    found = diversity(GROUPS)
    assert found == pytest.approx(
        {
            "entropy": 14 / 22,  # of 14 nats over 22 tokens
            "groups_all_right": 1 / 3,
            "groups_all_wrong": 1 / 3,  # what was cut off is not correct
            "distinct_correct": (2 + 0 + 1) / 3,
            "length_right": (2 + 2 + 4 + 4) / 4,
            "length_wrong": (6 + 2 + 2) / 3,
        }
    )


def test_what_is_undefined_is_left_out():
    assert diversity([]) == diversity(GROUPS[-1:]) == {}
    assert set(diversity(GROUPS[:1])) == {
        *("entropy", "groups_all_right", "groups_all_wrong", "distinct_correct", "length_right")
    }


def test_the_entropy_of_a_known_distribution():
    """The mean of -log p over as many samples of each token as it has probability."""
    counts = {0.5: 4, 0.25: 2, 0.125: 1}
    drawn = [response("x", 1, math.log(p), "wrong") for p, n in counts.items() for _ in range(n)]
    drawn.append(response("x", 1, math.log(0.125), "wrong"))
    assert diversity([drawn])["entropy"] == pytest.approx(1.75 * math.log(2))  # bits to nats


def test_agreement_by_hand():
    sampler = [np.log([0.5, 0.2]), np.log([0.1])]
    trainer = [np.log([0.5, 0.4]), np.log([0.1])]
    found = agreement(zip(trainer, sampler))
    want = {"sampler_mean": math.log(2) / 3, "sampler_greatest": math.log(2), "sampler_ess": 16 / 6 / 3}
    assert found == pytest.approx(want)
    assert agreement([]) == {}


def test_divergence_by_hand():
    policy, reference = np.log([0.5, 0.2]), np.log([0.25, 0.2])
    assert divergence([(policy, reference)]) == pytest.approx((0.5 - math.log(0.5) - 1) / 2)
    assert divergence([(policy, policy)]) == 0.0 and divergence([]) is None
