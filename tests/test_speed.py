"""Clocks, counts and tables of speeds against hand computation; profiles are written."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mstar_jax import records, sharding
from mstar_jax.profiling import flops, speed
from mstar_jax.structs import Batch, Prompt, Query, Row, TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.step import make_train_step, token_loss


@pytest.fixture
def clock(monkeypatch):
    """Time that advances on request."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@pytest.fixture
def compiling(monkeypatch):
    found = []
    monkeypatch.setattr(speed, "compiled", lambda: found)
    return found


def batch(real, rows=2, length=8):
    branch = np.full((rows, length), -1, np.int32)
    branch.ravel()[:real] = 0
    return Batch(branch * 0, branch, branch * 0.0, branch, np.zeros((rows, 0, 4, 4, 3)), branch * 0.0)


def test_compilations_are_counted():
    found = speed.compiled()
    before = len(found)
    jax.jit(lambda x: x * 3.5 + 1.25)(jnp.ones(7))
    assert len(found) > before and found[-1] > 0 and speed.compiled() is found


def test_what_compiles_does_not_count(clock, compiling):
    asked = []
    watch = speed.Speeds(chips=4).of("train", "warmup")

    def count():
        asked.append(1)
        return {"vision": 30.0, "language": 100.0}

    def steps(number, real):
        for _ in range(number):
            watch.begin(batch(real), count)

    steps(2, 10)
    compiling.append(5.0)
    clock(6.0)
    assert watch.done() == {}  # the first call
    steps(3, 12)
    clock(2.0)
    rates = watch.done()
    assert rates == {"tokens_per_second": 18.0, "flops/vision": 45.0, "flops/language": 150.0}
    steps(1, 16)
    watch.apart(clock, 9.0)  # a checkpoint: neither its time nor the tokens of the step in flight count
    steps(1, 4)
    clock(1.0)
    assert watch.done()["tokens_per_second"] == 4.0
    assert watch.record() == {
        "tokens": 2 * 10 + 3 * 12 + 16 + 4,
        "slots": 7 * 16,
        "seconds": 3.0,
        "left_out": 6.0,
        "tokens_per_second": pytest.approx((3 * 12 + 4) / 3),
        "flops/vision": pytest.approx(4 * 30 / 3),
        "flops/language": pytest.approx(4 * 100 / 3),
    }
    assert len(asked) == 1  # one shape


def test_mfu_is_of_all_chips(clock, compiling, monkeypatch):
    chip = dataclasses.replace(flops.CHIPS["TPU v4"], flops=50.0)
    monkeypatch.setattr(flops, "chip_of", lambda kind: chip)
    watch = speed.Speeds(chips=4).of("score", "x")
    watch.begin(batch(8), lambda: {"vision": 40.0, "language": 160.0, "projector": 0.0})
    clock(2.0)
    rates = watch.done()
    assert {k: v for k, v in rates.items() if k.startswith("mfu")} == {"mfu/vision": 0.1, "mfu/language": 0.4}


def query_row(name, length):
    return Row(Prompt(Query(name, (), "?"), "?", length, 0))


def test_rollouts_are_counted_by_the_shard(clock, compiling):
    """Prompts in, in two batches of the first shard; responses out."""
    speeds = speed.Speeds(chips=1)
    watch = speeds.of("rollouts", "iteration_01")
    one, two, three = query_row("a", 5), query_row("b", 3), query_row("c", 6)
    clock(50.0)  # weights are moved before the first batch is requested
    fed = watch.fed(iter([((one,), batch(5, 1)), ((two,), batch(3, 1)), ((three,), batch(6))]))
    for batches, decoded, steps in ((2, 2 * (4 + 1), 6), (1, 7 + 2, 7)):
        for _ in range(batches):
            next(fed)
        clock(2.0)
        watch.done(decoded=decoded, decode_slots=steps * 2 * 2)
    [[record]] = [list(passes.values()) for passes in speeds.lap().values()]
    assert record == {
        "tokens": 14,
        "slots": 32,
        "decoded": 2 * 5 + 9,
        "decode_slots": 2 * 2 * 6 + 2 * 2 * 7,
        "seconds": 4.0,
        "left_out": 0.0,
        "tokens_per_second": 3.5,
        "decoded_per_second": 19 / 4,
    }
    assert speeds.lap() == {}


def test_table():
    """Counts are summed, and rates are weighted by their seconds."""
    first = {"tokens": 60, "slots": 100, "seconds": 1.0, "left_out": 20.0, "tokens_per_second": 6000.0}
    first |= {"flops/vision": 1e9, "flops/language": 4e9}
    second = {"tokens": 20, "slots": 100, "seconds": 3.0, "left_out": 0.0, "tokens_per_second": 2000.0}
    second |= {"flops/vision": 2e9, "flops/language": 8e9}
    decoded = {"tokens": 30, "slots": 40, "decoded": 10, "decode_slots": 40, "seconds": 0.0, "left_out": 2.5}
    stages = [
        {"speed": {"train": {"warmup": first}}},
        {"speed": {"train": {"iteration_01": second}, "labels": {"prm": decoded}}},
        {"stage": "of a run from before speeds were measured"},
    ]
    assert records.speeds(stages).split("\n") == [
        "work             tokens/s  padding  GFLOP/s  vision  projector  language  seconds  compiling",
        "--------------------------------------------------------------------------------------------",
        "train               3,000    60.0%      8.8     1.8                  7.0      4.0       20.0",
        "labels: prefill              25.0%                                            0.0        2.5",
        "labels: decode               75.0%                                                          ",
    ]
    for each in (first, second):
        each |= {"mfu/vision": 0.05, "mfu/language": 0.2}
    row = records.speeds(stages).split("\n")[2]
    assert row.split() == ["train", "3,000", "60.0%", "25.0", "5.0", "20.0", "4.0", "20.0"]
    nothing = {"seconds": 0.0, "left_out": 0.0}  # a stage of which no response was kept
    assert records.speeds([{}]) == records.speeds([{"speed": {"train": {"warmup": nothing}}}]) == ""
    brief = {"tokens": 6, "slots": 8, "seconds": 0.0, "left_out": 0.0, "tokens_per_second": 9e9}  # rounded
    again = records.speeds([*stages, {"speed": {"train": {"warmup": nothing}, "score": {"a": brief}}}])
    assert again.split("\n")[2:5] == records.speeds(stages).split("\n")[2:5]


def test_the_table_says_where_nothing_was_trained():
    shares = {"n": 4, "greedy_accuracy": 0.0, "temperature": 1.0, "seconds": 1.0}

    def record(stage, iteration, split, kept, **values):
        return {"stage": stage, "iteration": iteration, "split": split, "kept": kept} | shares | values

    trained = [record("base", 0, "test", None), record("warmup", 0, "validation", 3)]
    assert records.table(trained).startswith("stage ")
    lost = {"wrong": 5, "truncated": 9, "unparsed": 2, "unanswered": 0}
    stages = [*trained, *(record("iteration", 1, split, 0, dropped=lost) for split in ("validation", "test"))]
    stages.append(record("iteration", 2, "validation", 0, dropped={"wrong": 5, "correct": 1}))
    line, empty, *rest = records.table(stages).split("\n")
    assert line == (
        "Nothing was trained in iteration 1, iteration 2, for no response was kept. What became of them: "
        "10 wrong, 9 truncated, 2 unparsed, 1 correct"
    )
    assert not empty and rest[0].startswith("stage ") and len(rest) == 7
    stages.append(record("iteration", 3, "validation", 0, dropped={"correct": 8}, trained_groups=0))
    both = "for no response was kept or no query's responses had different rewards. What became of them: "
    assert both in records.table(stages)
    assert records.untrained(stages[-1:]) == (
        "Nothing was trained in iteration 3, for no query's responses had different rewards. "
        "What became of them: 8 correct\n\n"
    )


def test_flops_of_a_step_are_those_of_the_gradient():
    """What `plan` counts: the optimizer has no matrix products, and without remat nothing is recomputed."""
    policy, mesh = tiny.abstract(), sharding.make_mesh(devices=jax.devices()[:1])
    number, value = np.zeros((2, 40), np.int32), np.zeros((2, 40), np.float32)
    given = Batch(number, number, value, number, np.zeros((2, 2, tiny.SIZE, tiny.SIZE, 3), np.float32), value)
    rate = np.float32(1e-3)
    tx = optimizer.make_optimizer()
    state = TrainState(0, policy, jax.eval_shape(tx.init, policy))
    own = flops.count(jax.grad(lambda model: token_loss(model, given)[0]), policy)
    steps = {remat: make_train_step(tx, mesh, remat=remat) for remat in ("none", "full")}
    assert flops.count(steps["none"], state, given, rate) == own
    assert flops.count(steps["full"], state, given, rate)["language"] > own["language"]


def test_a_profile_appears(tmp_path):
    """Of the requested steps, also if a stage resumes or ends among them."""
    step = jax.jit(lambda x: x @ x)

    def run(folder, first, last):
        state, changes = jnp.eye(8), []
        with speed.profiler(folder, (2, 4)) as at:
            for number in range(first, last):
                if at(number, state):
                    changes.append(number)
                state = step(state)
        return changes, [path for path in folder.glob("0/plugins/profile/*/*") if path.suffix == ".pb"]

    assert run(tmp_path / "beyond", 4, 6) == ([], [])
    changes, [trace] = run(tmp_path / "whole", 0, 6)
    assert changes == [2, 4] and trace.stat().st_size > 0
    changes, found = run(tmp_path / "rest", 3, 4)
    assert changes == [3] and len(found) == 1
    with pytest.raises(ZeroDivisionError), speed.profiler(tmp_path / "failed", (0, 9)) as at:
        at(0, None)
        _ = 1 / 0
    with speed.profiler(tmp_path / "none", ()) as at:  # no trace is left open
        assert not at(0, None)
    assert len(run(tmp_path / "again", 0, 3)[1]) == 1
