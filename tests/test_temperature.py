"""The choice of the temperature, and the smoothing of its curves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstar_jax.rewards import temperature

GRID = [round(0.3 + 0.1 * i, 1) for i in range(14)]  # the paper's: 0.3 to 1.6


def records(values, temperatures=GRID, criterion="reward_pass_at_2"):
    return [{"temperature": t, criterion: value} for t, value in zip(temperatures, values)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=14, max_size=14), st.sampled_from(GRID), st.randoms())
def test_best_then_nearest_then_lower(values, present, rng):
    grid = records(values, criterion="balance_score")
    best = [round(10 * r["temperature"]) for r in grid if r["balance_score"] == max(values)]
    for distance in range(14):  # in tenths: outwards, the lower one first
        near = [t for t in (round(10 * present) - distance, round(10 * present) + distance) if t in best]
        if near:
            break
    rng.shuffle(grid)
    assert temperature.choose(grid, "balance_score", present) == pytest.approx(near[0] / 10)


@pytest.mark.parametrize("present", GRID[1:-1])
def test_neighbours_are_equally_near_whatever_their_last_bits(present):
    at = GRID.index(present)
    values = [1.0 if abs(i - at) == 1 else 0.5 for i in range(14)]
    assert temperature.choose(records(values), "reward_pass_at_2", present) == GRID[at - 1]


def test_a_flat_criterion_moves_nothing():
    assert temperature.choose(records([0.5] * 14), "reward_pass_at_2", 0.7) == 0.7


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        ([], "the grid is empty"),
        (
            [{"temperature": 0.3, "reward_pass_at_2": 0.5}, {"temperature": 0.4}],
            "0.4 has no reward_pass_at_2",
        ),
        (records([0.5, None]), "0.4 has no reward_pass_at_2"),
        (records([0.5, float("nan")]), "0.4 has no reward_pass_at_2.*nan"),
    ],
)
def test_refuses_a_grid_that_says_nothing(grid, complaint):
    with pytest.raises(ValueError, match=complaint):
        temperature.choose(grid, "reward_pass_at_2", 0.3)


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), max_size=20), st.sampled_from([1, 3, 5, 7]))
def test_smoothed(values, window):
    found = temperature.smoothed(values, window)
    assert len(found) == len(values)
    for at, value in enumerate(found):
        reach = min(window // 2, at, len(values) - 1 - at)
        assert value == pytest.approx(np.mean([values[at + d] for d in range(-reach, reach + 1)]))


def test_smoothed_by_hand():
    assert temperature.smoothed([1, 4, 1, 4]) == [1.0, 2.0, 3.0, 4.0]
    assert temperature.smoothed([3 * i for i in range(6)], 5) == [3 * i for i in range(6)]  # a trend stays
    for window in (0, -1, 2):
        with pytest.raises(ValueError, match=f"odd width, got {window}"):
            temperature.smoothed([1.0], window)
