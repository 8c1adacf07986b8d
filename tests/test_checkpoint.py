"""Checkpoints: a restored state is the saved one, bit for bit, and training continues as if never stopped."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mstar_jax import sharding
from mstar_jax.data import loader
from mstar_jax.structs import Query, Row, Stage, TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.checkpoint import Checkpoints, Damaged, EvolveState
from mstar_jax.training.step import abstract_state, make_train_step
from tests import tiny


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def tx():
    return optimizer.make_optimizer(weight_decay=0.01)


FROZEN = ("tower",)
RATES = optimizer.learning_rates(optimizer.make_schedule(1e-2, 20, 2, 0.1), 0, 4)


def abstract(tx, mesh, **decoder):
    return abstract_state(functools.partial(tiny_policy, **decoder), tx, mesh, frozen=FROZEN)


def tiny_policy(**decoder):
    cfg = tiny.config(**decoder)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tiny.abstract(cfg))


@pytest.fixture(scope="module")
def state(tx, mesh):
    """A state with no two numbers alike, moments too, in the TRAIN layout; compiles nothing."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.device_put(np.asarray(rng.integers(1, 9, leaf.shape), leaf.dtype), leaf.sharding)
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract(tx, mesh))


def where(cursor, done=False, **changes):
    return EvolveState("iteration", 3, cursor, done, 0.7, 11, **changes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim), name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def test_round_trip(tmp_path, state, tx, mesh):
    run = where(7, loader={"next_index": 28}, curve={"loss": [0.1, 3]})
    Checkpoints(tmp_path).save(Stage.iteration(3), state, run, wait=True)
    fresh = Checkpoints(tmp_path)
    found = fresh.restore(Stage.iteration(3), abstract(tx, mesh))
    assert_same(found, state)
    assert fresh.run(Stage.iteration(3)) == run
    moments = [x for x in jax.tree.leaves(found.opt_state) if x.ndim > 1]
    assert moments and any(not x.sharding.is_fully_replicated for x in moments)
    alone = sharding.make_mesh(devices=jax.devices()[:1])  # another machine goes on
    moved = fresh.restore(Stage.iteration(3), abstract(tx, alone))
    jax.tree.map(np.testing.assert_array_equal, moved, state)


def test_latest_wins_and_old_ones_go(tmp_path, state, tx, mesh):
    checkpoints = Checkpoints(tmp_path)
    later = state._replace(step=state.step + 1)
    checkpoints.save(Stage.base, state, where(5))
    checkpoints.save(Stage.base, later, where(10), wait=True)
    fresh = Checkpoints(tmp_path)
    assert fresh.run(Stage.base).cursor == 10
    assert_same(fresh.restore(Stage.base, abstract(tx, mesh)), later)
    assert sorted(p.name for p in (tmp_path / "base").iterdir() if p.name.isdigit()) == ["10", "5"]
    checkpoints.save(Stage.base, later, where(15, done=True))
    assert [p.name for p in (tmp_path / "base").iterdir() if p.name.isdigit()] == ["15"]


def test_done_mark(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.has(Stage.warmup) and checkpoints.run(Stage.warmup) is None
    checkpoints.save(Stage.warmup, state, where(5), wait=True)
    assert not Checkpoints(tmp_path).run(Stage.warmup).done
    checkpoints.save(Stage.warmup, state, where(5, done=True))  # where it has just saved
    assert Checkpoints(tmp_path).run(Stage.warmup).done
    checkpoints.drop(Stage.warmup)
    assert not Checkpoints(tmp_path).has(Stage.warmup)


def test_when_a_checkpoint_is_old(tmp_path, state, monkeypatch):
    """Where saving takes 3 s: soon at first, then at intervals that double, up to 2 % of the time."""
    now = 100.0
    monkeypatch.setattr("mstar_jax.training.checkpoint.time.monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.old() and not checkpoints.saved

    def written(stage, noted=checkpoints._note):
        nonlocal now
        now += 1.5  # noted twice where it is waited for
        noted(stage)

    monkeypatch.setattr(checkpoints, "_note", written)
    checkpoints.save(Stage.base, state, where(1), wait=True)
    assert checkpoints.saved and now == 103
    monkeypatch.undo()
    monkeypatch.setattr("mstar_jax.training.checkpoint.time.monotonic", lambda: now)
    intervals = []
    for step in range(2, 8):
        begun = now
        while not checkpoints.old():
            now += 0.5
        intervals.append(now - begun)
        checkpoints.save(Stage.base, state, where(step))  # written meanwhile: its own time says nothing
    assert intervals == [12, 24, 48, 96, 150, 150]
    checkpoints.wait()


def test_parameters_alone(tmp_path, state, tx, mesh):
    """By the object that saved the state, and by another one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Stage.warmup, state, where(5), wait=True)
    for each in (checkpoints, Checkpoints(tmp_path)):
        assert_same(each.params(Stage.warmup, abstract(tx, mesh).params), state.params)
    assert_same(checkpoints.restore(Stage.warmup, abstract(tx, mesh)), state)


def test_half_written_checkpoint_is_ignored(tmp_path, state, tx, mesh):
    Checkpoints(tmp_path).save(Stage.base, state, where(5), wait=True)
    part = tmp_path / "base" / "10.orbax-checkpoint-tmp"  # as a killed save leaves it
    (part / "state").mkdir(parents=True)
    (part / "state" / "d").write_text("half")
    (tmp_path / "base" / "done.json.part17").write_text('{"stage"')
    fresh = Checkpoints(tmp_path)
    assert (fresh.run(Stage.base).cursor, fresh.run(Stage.base).done) == (5, False)
    assert_same(fresh.restore(Stage.base, abstract(tx, mesh)), state)
    fresh.save(Stage.base, state, where(10), wait=True)
    assert Checkpoints(tmp_path).run(Stage.base).cursor == 10


def test_misfit(tmp_path, state, tx, mesh):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="base holds no checkpoint"):
        checkpoints.restore(Stage.base, abstract(tx, mesh))
    checkpoints.save(Stage.base, state, where(5), wait=True)
    for change in ({"intermediate_size": 64}, {"tie_word_embeddings": True}):
        with pytest.raises(ValueError, match="base/5 does not fit this model"):
            Checkpoints(tmp_path).restore(Stage.base, abstract(tx, mesh, **change))


def cut(step):
    """Every file of data, since Orbax may have left one that is not read any more."""
    sizes = {path: path.stat().st_size for path in (step / "state").rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > max(sizes.values()) // 10:
            path.write_bytes(path.read_bytes()[: size // 2])


def zeros(step):
    """Orbax reads them as numbers."""
    path = max((step / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(1000) + data[len(data) // 2 + 1000 :])


def without_where(step):
    shutil.rmtree(step / "run")


def without_manifest(step):
    shutil.rmtree(step / "state" / "d")


@pytest.mark.parametrize(
    ("damage", "done"),
    [
        *((damage, False) for damage in (cut, zeros, without_where, without_manifest)),
        (cut, True),
        *(
            pytest.param(each, True, marks=pytest.mark.slow)
            for each in (zeros, without_where, without_manifest)
        ),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, state, tx, mesh, caplog, damage, done):
    checkpoints = Checkpoints(tmp_path)
    later = state._replace(step=state.step + 1)
    checkpoints.save(Stage.base, state, where(5))
    checkpoints.save(Stage.base, later, where(10, done=done), wait=True)
    damage(tmp_path / "base" / "10")
    fresh = Checkpoints(tmp_path)
    found = fresh.run(Stage.base)
    if done:  # nothing was kept before a finished one: the stage begins again
        assert found is None and not fresh.has(Stage.base)
    else:
        assert (found.cursor, found.done) == (5, False)
        assert_same(fresh.restore(Stage.base, abstract(tx, mesh)), state)
    # Orbax may warn that it waited for a disk
    [line] = [each.getMessage() for each in caplog.records if each.name.startswith("mstar_jax")]
    assert "base/10: damaged, so it is set aside" in line
    assert (tmp_path / "base" / "damaged_10").exists()
    fresh.save(Stage.base, later, where(10, done=True))
    assert Checkpoints(tmp_path).run(Stage.base).done
    assert_same(Checkpoints(tmp_path).restore(Stage.base, abstract(tx, mesh)), later)


def test_what_cannot_be_read_is_set_aside(tmp_path, state, tx, mesh):
    """Where a kill came before the digest was noted."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Stage.base, state, where(5), wait=True)
    checkpoints.save(Stage.base, state, where(10), wait=True)
    (tmp_path / "base" / "10.sum").unlink()
    cut(tmp_path / "base" / "10")
    fresh = Checkpoints(tmp_path)
    with pytest.raises(Damaged, match="base/10: damaged"):
        fresh.restore(Stage.base, abstract(tx, mesh))
    assert fresh.run(Stage.base).cursor == 5  # what `main` goes on with
    assert_same(fresh.restore(Stage.base, abstract(tx, mesh)), state)


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 14 GiB"), False),
        (MemoryError(), False),
        (OSError("stale file handle"), True),
    ],
)
def test_what_is_whole_is_not_set_aside(tmp_path, state, tx, mesh, monkeypatch, error, noted):
    """Where it could not be read for another reason, it would be trained again for nothing."""
    Checkpoints(tmp_path).save(Stage.base, state, where(5, done=True), wait=True)
    if not noted:
        (tmp_path / "base" / "5.sum").unlink()
    fresh = Checkpoints(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(ocp.CheckpointManager, "restore", raises(error))
        fresh.restore(Stage.base, abstract(tx, mesh))
    assert raised.value is error
    assert fresh.run(Stage.base).done and not (tmp_path / "base" / "damaged_5").exists()
    assert_same(fresh.restore(Stage.base, abstract(tx, mesh)), state)


def raises(error):
    def failing(*_, **__):
        raise error

    return failing


def test_two_and_two_steps_are_four(tmp_path, tx, mesh):
    processor = tiny.processor(tmp_path / "tokenizer")
    found = [Query(f"q{i}", (), "area " * i) for i in range(9)]
    planned = loader.plan_prompts([(q, q.question) for q in found], processor, 1000)
    rows = [Row(p, ((20 + i, 30), (40 + i, 9, 9))) for i, p in enumerate(planned)]

    def batches(state=None):
        return loader.train_batches([(rows, 1.0)], processor, 4, (64,), seed=3, state=state)

    def run(state, iterator, count):
        losses = []
        for _ in range(count):
            rate = RATES[int(state.step)]
            state, values = step(state, sharding.put_batch(next(iterator), mesh), rate)
            losses.append(float(values["loss"]))
        return state, losses

    def start():
        layout = sharding.shardings(tiny.abstract(), sharding.TRAIN, mesh)
        given = TrainState(0, jax.device_put(tiny.model(), layout), ())
        return optimizer.carry_on(given, tx, mesh, frozen=FROZEN, moments=False, schedule=False)

    step = make_train_step(tx, mesh, frozen=FROZEN)
    with jax.set_mesh(mesh):
        whole, losses = run(start(), batches(), 4)

        iterator = batches()
        state, first = run(start(), iterator, 2)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(Stage.base, state, where(2, loader=iterator.get_state()))
        run(state, iterator, 1)  # not waited for: training donates what is still being written
        checkpoints.wait()

        fresh = Checkpoints(tmp_path / "checkpoints")
        state = fresh.restore(Stage.base, abstract(tx, mesh))
        state, second = run(state, batches(fresh.run(Stage.base).loader), 2)
    assert first + second == losses and len(set(losses)) == 4
    assert_same(state, whole)
    assert int(state.step) == 4
    assert json.dumps(fresh.run(Stage.base).loader)
