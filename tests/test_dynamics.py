"""What the dynamics say, and which temperature they ask for."""

import types

import pytest
from ml_collections import ConfigDict

from mstar_jax.data.truth import Truth
from mstar_jax.stages.measure import Dynamics
from mstar_jax.structs import Response


def made(records, truths=()):
    out = object.__new__(Dynamics)
    config = ConfigDict({"evolve": {"temperature": 1.0}})
    out.run = types.SimpleNamespace(config=config, results=types.SimpleNamespace(data={"stages": records}))
    out.reward = types.SimpleNamespace(truth={t.id: t for t in truths})
    return out


def test_the_temperature_is_the_last_one_chosen_before():
    records = [
        {"stage": "base", "iteration": 0},
        {"stage": "warmup", "iteration": 0, "chosen": 0.6},
        {"stage": "iteration", "iteration": 1},
        {"stage": "iteration", "iteration": 2, "chosen": 0.8},
        {"stage": "iteration", "iteration": 4, "chosen": None},  # measured, not chosen
    ]
    assert [made(records).temperature(t) for t in (1, 2, 3, 4, 5)] == [0.6, 0.6, 0.8, 0.8, 0.8]
    assert [made(records[:1]).temperature(t) for t in (1, 2)] == [1.0, 1.0]


def test_steps_by_the_generators_truth():
    lines = ("Bars red 4 blue 2", "Sum 4 + 2 = 6")
    truth = Truth("q", "test", "total", (("red", 4), ("blue", 2)), (lines,), "6")
    texts = [
        ("Bars red 4 blue 2\nSum 4 + 2 = 6\nThe answer is 6", "correct", 0.0),
        ("Bars red 5 blue 1\nSum 5 + 1 = 6\nThe answer is 6", "correct", 0.0),
        ("Bars red 4 blue 2\nSum 4 + 2 = 7\nThe answer is 7", "wrong", 0.0),
        ("Bars red 4 blue 2\nSum 4 + 2 = 6\nThe answer is 6", "correct", 1.0),  # a sample: does not count
        ("The answer is 6", "correct", 0.0),
    ]
    groups = [
        [Response("q", i, text, (), 0.0, False, verdict=verdict, temperature=t)]
        for i, (text, verdict, t) in enumerate(texts)
    ]
    assert made([], [truth]).steps(groups) == {"all_right": 1 / 4, "unfaithful": pytest.approx(2 / 3)}
    assert made([]).steps(groups) == {}  # no embedded data
