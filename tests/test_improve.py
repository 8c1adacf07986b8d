"""What a stage's training starts from, how often it draws which row, and when it ends early."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from mstar_jax import configure, sharding
from mstar_jax.data import loader
from mstar_jax.stages import improve
from mstar_jax.stages.policy import Policy
from mstar_jax.structs import Prompt, Query, Row, Source, Stage
from mstar_jax.training import optimizer

SETTINGS = {"steps": 4, "iterations": 3, "learning_rate": 1e-3, "warmup_steps": 0, "final_fraction": 0.1}


class One(nnx.Module):
    """A model of one parameter."""

    def __init__(self, value):
        self.value = nnx.Param(jnp.full(3, float(value)), axes=(None,))


def policy(stage, value, step, tx):
    """A policy with this parameter, after this many steps; its moments are filled with the step."""

    def state():
        new = optimizer.new_state(One(value), tx, step=step)
        return new._replace(opt_state=jax.tree.map(lambda x: jnp.full_like(x, step), new.opt_state))

    return Policy(stage, state)


@pytest.mark.parametrize("start", ["last", "warmup"])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("schedule", [False, True])
def test_what_a_stage_starts_from(monkeypatch, start, moments, schedule):
    """The parameters are those of `start`; moments and schedule are those of the iteration before."""
    tx, mesh = optimizer.make_optimizer(), sharding.make_mesh(devices=jax.devices()[:1])
    run = types.SimpleNamespace(
        tx=tx, mesh=mesh, config=ConfigDict({"train": {"frozen": (), "lora": {"rank": 0}}})
    )
    warmup, last = policy(Stage.warmup, 1, 90, tx), policy(Stage.iteration(1), 2, 4, tx)
    monkeypatch.setattr(improve, "restore_params", lambda run, stage: {Stage.warmup: One(1)}[stage])
    monkeypatch.setattr(improve, "train", lambda run, stage, begin, sources, sampled_at: begin())
    chosen = warmup if start == "warmup" else last
    carry = improve.Carry(last, moments=moments, schedule=schedule)
    state = improve.improve(run, Stage.iteration(2), chosen, [], carry=carry, sampled_at=1.0)
    assert state.params.value[...].tolist() == [2.0 if start == "last" else 1.0] * 3
    assert state.opt_state[1].mu.value[...].tolist() == [4.0 if moments else 0.0] * 3
    assert int(state.step) == (4 if schedule else 0)
    settings = ConfigDict(SETTINGS | {"reset_schedule": not schedule})
    rates = optimizer.learning_rates(configure.schedule(settings), int(state.step), 4)
    whole = optimizer.make_schedule(1e-3, 12 if schedule else 4, 0, 0.1)
    first = 4 if schedule else 0
    np.testing.assert_allclose(rates, [whole(s) for s in range(first, first + 4)], rtol=1e-6)


def rows(count, name):
    return [Row(Prompt(Query(f"{name}{i}", (), ""), "", 5, 0), ((7,),)) for i in range(count)]


@pytest.mark.parametrize(
    ("sources", "shares"),
    [
        ([(100, 1.0), (4, 1.0)], [100 / 104, 4 / 104]),  # each row alike, not each source
        ([(100, 1.0), (4, 0.5)], [100 / 102, 2 / 102]),
        ([(100, 1.0), (0, 1.0)], [1.0, 0.0]),
        ([(7, 1.0)], [1.0]),
        ([(0, 1.0)], [0.0]),
    ],
)
def test_a_weight_is_of_a_row(sources, shares):
    found = improve.shares([Source(rows(count, "q"), weight) for count, weight in sources])
    assert [source.weight for source in found] == pytest.approx(shares)


def test_rows_of_a_small_source_are_drawn_as_often_as_others():
    sources = improve.shares([Source(rows(100, "l")), Source(rows(4, "p"))])
    parts = [(loader.grain.MapDataset.source(s.rows).seed(0).shuffle().repeat(), s.weight) for s in sources]
    mixed = loader._mix(parts)
    drawn = [mixed[i].prompt.query.id for i in range(1040)]
    counts = [drawn.count(row.prompt.query.id) for source in sources for row in source.rows]
    assert min(counts) >= 9 and max(counts) <= 11
