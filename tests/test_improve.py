"""What a stage's training starts from, how often it draws which row, and when it ends early."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import tiny as tiny_config
from mstar_jax import configure, sharding
from mstar_jax.data import loader
from mstar_jax.stages import base, improve
from mstar_jax.stages.policy import Policy, at_rest, check_values, policy_after, values_of
from mstar_jax.structs import Prompt, Query, Response, Row, Source, Stage
from mstar_jax.training import optimizer
from mstar_jax.training.checkpoint import EvolveState

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
    """The parameters are those of `start`; moments and schedule are those of the iteration before. Neither's
    state stays in memory beside the one that trains."""
    tx, mesh = optimizer.make_optimizer(), sharding.make_mesh(devices=jax.devices()[:1])
    run = types.SimpleNamespace(
        tx=tx,
        mesh=mesh,
        config=ConfigDict({"train": {"frozen": (), "lora": {"rank": 0}, "offload_optimizer": False}}),
    )
    warmup, last = policy(Stage.warmup, 1, 90, tx), policy(Stage.iteration(1), 2, 4, tx)
    monkeypatch.setattr(improve, "restore_params", lambda run, stage: {Stage.warmup: One(1)}[stage])
    monkeypatch.setattr(improve, "train", lambda run, stage, begin, sources, **_: begin())
    chosen = warmup if start == "warmup" else last
    carry = improve.Carry(last, moments=moments, schedule=schedule)
    assert last.params and warmup.params  # they have sampled
    state = improve.improve(run, Stage.iteration(2), chosen, [], carry=carry, sampled_at=1.0)
    assert last.state is None and chosen.state is None
    assert state.params.value[...].tolist() == [2.0 if start == "last" else 1.0] * 3
    assert state.opt_state[1].mu.value[...].tolist() == [4.0 if moments else 0.0] * 3
    assert int(state.step) == (4 if schedule else 0)
    settings = ConfigDict(SETTINGS | {"reset_schedule": not schedule})
    rates = optimizer.learning_rates(configure.schedule(settings), int(state.step), 4)
    whole = optimizer.make_schedule(1e-3, 12 if schedule else 4, 0, 0.1)
    first = 4 if schedule else 0
    np.testing.assert_allclose(rates, whole(np.arange(first, first + 4)), rtol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_moments_rest_in_the_hosts_memory(offload):
    """Between two trainings, if asked; the next one has them on the devices, unchanged to the last bit."""
    tx, mesh = optimizer.make_optimizer(), sharding.make_mesh(devices=jax.devices()[:1])
    train = {"frozen": (), "lora": {"rank": 0}, "offload_optimizer": offload}
    run = types.SimpleNamespace(tx=tx, mesh=mesh, config=ConfigDict({"train": train}))
    state = policy(Stage.warmup, 1, 3, tx).take()
    layout = sharding.shardings(state, sharding.TRAIN, mesh)
    state = jax.device_put(state, layout)
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    handle = policy_after(run, Stage.iteration(1), state)
    del state

    def memories(tree):
        return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}

    resting = memories(handle.state.opt_state)
    assert resting == ({"pinned_host"} if offload else {"device"})
    assert memories(handle.params) == {"device"}
    state = improve.carried(
        run, Stage.iteration(2), handle.take(), improve.Carry(moments=True, schedule=True)
    )
    assert memories(state) == {"device"}
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state)] == before
    again = policy_after(run, Stage.iteration(1))
    again.restore = lambda: at_rest(run, state)  # as after a restart
    assert memories(again.take().opt_state) == resting


def test_moments_stay_where_there_is_no_other_memory():
    state = policy(Stage.warmup, 1, 3, optimizer.make_optimizer()).take()
    moved = optimizer.moments_in(state, "no_such_memory")
    assert all(a is b for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True))


class Checkpoints:
    """Remembers the steps that are saved, and which of them were waited for."""

    def __init__(self, old=()):
        self.steps, self.waited, self.saved, self.when_old = [], [], False, old

    def run(self, stage):
        return None

    def old(self):
        """The tests' clock: whether the newest one is old after so many steps."""
        return self.at in self.when_old

    def save(self, stage, state, where, wait):
        self.steps.append(where.cursor)
        self.waited += [where.cursor] * wait
        self.saved = True


def training(
    monkeypatch, tmp_path, losses, *, norms=None, log_every=2, save_every=3, checkpoints=None, until=None
):
    """Trains iteration 2 for as many steps as there are losses; returns the steps that were saved."""
    tx = optimizer.make_optimizer()
    checkpoints = checkpoints or Checkpoints()
    (tmp_path / "metrics").mkdir()
    norms = norms or [1.0] * len(losses)

    def step(state, batch, rate):
        at = int(state.step)
        checkpoints.at = at + 1
        values = {"loss": losses[at], "accuracy": 0.5, "grad_norm": norms[at], "tokens": 4.0}
        return state._replace(step=state.step + 1), {k: jnp.float32(v) for k, v in values.items()}

    watch = types.SimpleNamespace(
        begin=lambda *_: None, skip=lambda: None, apart=lambda run, *args: run(*args), done=dict
    )
    section = SETTINGS | {"steps": len(losses), "batch": 1, "reset_schedule": True, "learning_rate": 1e6}
    section["check_every"] = 2
    train = {"profile": (), "log_every": log_every, "save_every": save_every, "clip": 1.0}
    train["offload_optimizer"] = False
    run = types.SimpleNamespace(
        checkpoints=checkpoints,
        config=ConfigDict({"evolve": section, "train": train, "policy": {}, "data": {}}),
        speeds=types.SimpleNamespace(of=lambda *_: watch),
        data=types.SimpleNamespace(buckets=(8,), grouped=False, workers=0),
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        workdir=tmp_path,
        processor=None,
        seed=0,
        stop=lambda: False,
    )
    monkeypatch.setattr(improve, "program", lambda *_: (step, step))
    monkeypatch.setattr(sharding, "put_batch", lambda batch, mesh: batch)
    batches = type("Batches", (), {"get_state": lambda self: {}, "__next__": lambda self: None})()
    monkeypatch.setattr(loader, "train_batches", lambda *_, **__: batches)
    begin = lambda: optimizer.new_state(One(1), tx)  # noqa: E731
    improve.train(run, Stage.iteration(2), begin, [Source(rows(3, "q"))], until=until)
    return checkpoints.steps


@pytest.mark.parametrize(("old", "steps"), [((), [1, 3, 6, 7]), ((2, 4, 5), [1, 2, 3, 4, 5, 6, 7])])
def test_when_a_stage_saves(monkeypatch, tmp_path, old, steps):
    """The first step after a start before the next one, then at its steps and when the last one is old."""
    checkpoints = Checkpoints(old)
    assert training(monkeypatch, tmp_path, [1.0] * 7, checkpoints=checkpoints) == steps
    assert checkpoints.waited == [1, 7]


def test_a_later_stage_of_the_same_process_saves_no_first_step(monkeypatch, tmp_path):
    """So an ordinary run saves one step more in all: a restart after a kill saves its own first step."""
    checkpoints = Checkpoints()
    checkpoints.saved = True
    assert training(monkeypatch, tmp_path, [1.0] * 4, checkpoints=checkpoints) == [3, 4]


@pytest.mark.parametrize(("reached", "ends", "told"), [(2, 2, False), (3, 4, True)])
def test_a_target_that_is_not_reached_is_told(monkeypatch, tmp_path, caplog, reached, ends, told):
    """It is looked for every other step, and not after the last one."""
    steps = training(monkeypatch, tmp_path, [1.0] * 4, until=lambda _, cursor: cursor == reached)
    assert steps[-1] == ends
    assert ("took all of its 4 steps, and was not seen to reach" in caplog.text) == told


def test_the_host_does_not_run_ahead(monkeypatch, tmp_path):
    """A stop has to wait for the steps that were given to the device, each of which may take many seconds."""
    waited = []

    def wait(values):
        waited.extend((number, float(each["loss"])) for number, each in values)
        return values

    monkeypatch.setattr(jax, "block_until_ready", wait)
    training(monkeypatch, tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], log_every=6, save_every=100)
    # at steps 4 to 6: the first is read as it is saved, and all are at step 6
    assert waited == [(2, 2.0), (3, 3.0), (4, 4.0)]


@pytest.mark.parametrize(("log_every", "save_every"), [(2, 3), (5, 2), (10, 10), (1, 100)])
@pytest.mark.parametrize("bad", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_training_stops_at_what_is_not_finite(monkeypatch, tmp_path, log_every, save_every, bad, what, value):
    """Nothing that the step has touched is saved, whenever curves and checkpoints are written."""
    losses, norms, saved = [1.0] * 6, [1.0] * 6, []
    for at in range(bad - 1, 6):  # and everything after
        (losses if what == "loss" else norms)[at] = value
    monkeypatch.setattr(improve, "EvolveState", lambda **k: saved.append(k) or types.SimpleNamespace(**k))
    text = f"iteration_02: the {what} of step {bad} is {value}; .* lower evolve.learning_rate than 1e.06, or"
    with pytest.raises(ValueError, match=text):
        training(monkeypatch, tmp_path, losses, norms=norms, log_every=log_every, save_every=save_every)
    assert all(state["cursor"] < bad and not state["done"] for state in saved)


@pytest.mark.parametrize(
    ("key", "value", "stage", "refused"),
    [
        ("seed", 1, Stage.warmup, True),  # a checkpoint of another run
        ("data.seed", 1, Stage.base, True),
        ("train.lora.rank", 4, Stage.warmup, True),
        ("warmup.learning_rate", 1e-4, Stage.warmup, True),
        ("evolve.steps", 7, Stage.iteration(2), True),
        ("evolve.steps", 7, Stage.warmup, False),  # as of runs that share a warm-up
        ("prm.mc_weight", 0.5, Stage.base, False),
        ("train.save_every", 7, Stage.warmup, False),
        ("data.workers", 7, Stage.warmup, False),
    ],
)
def test_a_checkpoint_of_other_values_is_refused(tmp_path, key, value, stage, refused):
    config = tiny_config.get_config("smoke")
    host = types.SimpleNamespace(config=config, seed=config.seed, checkpoints=Checkpoints())
    host.checkpoints.folder = tmp_path
    saved = EvolveState(stage.kind, stage.number, 2, False, 1.0, 0, values=values_of(host, stage))
    check_values(host, stage, saved)
    config.update_from_flattened_dict({key: value})
    host.seed = config.seed
    if not refused:
        return check_values(host, stage, saved)
    with pytest.raises(
        ValueError, match=f"{tmp_path}/{stage}: trained with other values .{key}: .* {value} now"
    ):
        check_values(host, stage, saved)


@pytest.mark.parametrize(("losses", "said"), [([1.0, 2, 30, 400, 3, 500], 1), ([1.0, 2, 3, 9, 4, 5], 0)])
def test_a_loss_that_explodes_is_warned_of_once(monkeypatch, tmp_path, losses, said):
    found = []
    monkeypatch.setattr(improve.log, "warning", lambda text, *args: found.append(text % args))
    assert training(monkeypatch, tmp_path, losses, log_every=1) == [1, 3, 6]
    assert len(found) == said
    assert not said or found[0].startswith("iteration_02: the loss explodes: 30 at step 3, 1 at first;")


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


@pytest.mark.parametrize(("fits", "expected"), [("ab", True), ("b", False), ("", False)])
def test_a_base_is_measured_on_what_fits(monkeypatch, fits, expected):
    """A validation prompt over data.max_prompt is left out there too."""
    answers = {"a": "correct", "b": "wrong"}
    given = {q: [Response(q, 0, "x", (1,), 0.0, False, "x", answers[q], temperature=0.0)] for q in fits}
    monkeypatch.setattr(base, "sample", lambda *_, **__: given)
    config = ConfigDict({"base": {"check_from": 0, "target": 0.5}, "prompts": {"cot": "{question}{choices}"}})
    run = types.SimpleNamespace(config=config, base_validation=[Query(q, (), "?", answer="x") for q in "ab"])
    assert base.good_enough(run, None, 10) is expected
