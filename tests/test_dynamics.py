"""What the dynamics say, and which temperature is in force."""

import dataclasses
import json
import types

import pytest
from ml_collections import ConfigDict

from mstar_jax import store
from mstar_jax.data.truth import Truth
from mstar_jax.records import Results
from mstar_jax.stages.explore import explore, explores, temperature_after
from mstar_jax.stages.measure import by_part, check_measured, right_steps
from mstar_jax.stages.policy import Policy
from mstar_jax.structs import Response, Stage, TrainState


def run(tmp_path, every=2):
    return types.SimpleNamespace(
        results=Results(tmp_path, {}), config=ConfigDict({"explore": {"every": every}})
    )


def add(run, stage, **values):
    run.results.add(stage, {"split": "validation", "seconds": 1.0, "speed": {}} | values)


def test_the_temperature_stays_until_an_exploration_chooses(tmp_path):
    """As a restart walks through the stages of a run."""
    here = run(tmp_path)
    chosen = {Stage.warmup: 0.6, Stage.iteration(2): 0.8, Stage.iteration(4): None}  # measured, not chosen
    for stage in (Stage.base, Stage.warmup, *map(Stage.iteration, (1, 2, 4))):
        add(here, stage, **({"grid": [], "chosen": chosen[stage]} if stage in chosen else {}))
    here.results.records.reverse()  # the order of the records does not matter
    temperature, found = 1.0, []
    for stage in (Stage.base, Stage.warmup, *map(Stage.iteration, range(1, 6))):
        temperature = temperature_after(here, stage, temperature)
        found.append(temperature)
    assert found == [1.0, 0.6, 0.6, 0.8, 0.8, 0.8, 0.8]


def test_a_finished_exploration_is_read(tmp_path):
    here = run(tmp_path)
    add(here, Stage.warmup)
    here.results.extend(
        Stage.warmup, "validation", {"grid": [], "chosen": 0.6, "seconds": 2.0, "speed": {"score": {"a": {}}}}
    )
    record = Results(tmp_path, {}).find(Stage.warmup, "validation")  # from the file
    assert record["seconds"] == 3.0 and record["speed"] == {"score": {"a": {}}} and record["split"]
    policy = Policy(Stage.warmup, lambda: pytest.fail("nothing has to be sampled"))
    assert explore(here, policy, object(), 1.0) == 0.6


def test_a_records_numbers_are_drawn_and_tabulated(tmp_path):
    """In TensorBoard by split, and in the file of all records; what is no number of its own in neither."""
    numbers = {"entropy": 0.25, "groups_all_right": 0.5, "kl": 0.0625}
    add(run(tmp_path), Stage.iteration(3), curriculum={"groups": 10}, **numbers)
    [events] = (tmp_path / "tensorboard" / "dynamics").glob("*tfevents*")
    assert all(f"validation/{name}".encode() in events.read_bytes() for name in numbers)
    head, row = (tmp_path / "metrics" / "dynamics.csv").read_text().splitlines()
    found = dict(zip(head.split(","), row.split(","), strict=True))
    assert {name: float(found[name]) for name in numbers} == numbers and "curriculum" not in found


def older(there):
    there["stages"] = there["stages"][:2]
    there["digest"] = store.digest(there["stages"])  # a copy that the run has written


def another_choice(there):
    there["stages"][1]["chosen"] = 1.6


def another_score(there):
    there["stages"][0]["n"] = 99


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_choice, r"results\.json: its records are not those that the run wrote"),
        (another_score, r"results\.json: its records are not those that the run wrote"),
        (lambda there: there.pop("digest"), r"results\.json: its records are not those that the run wrote"),
        (
            older,
            r"results\.json: no record of iteration_02 \(validation\), though a later stage has followed",
        ),
        (lambda there: there["stages"].clear() or there.update(digest=store.digest([])), "no record of iter"),
    ],
)
def test_results_that_a_run_would_go_on_with_wrongly_are_refused(tmp_path, change, said):
    """The temperature of later iterations is in them, and without checkpoints nothing makes them anew."""
    here = run(tmp_path)
    here.config.update({"eval": {"every": 2, "test_at": ()}, "evolve": {"iterations": 4}})
    chosen = {Stage.warmup: 0.6, Stage.iteration(2): 0.8}
    for stage in (Stage.base, Stage.warmup, Stage.iteration(2)):
        add(here, stage, **({"grid": [], "chosen": chosen[stage]} if stage in chosen else {}))

    def start():
        again = run(tmp_path)
        again.config.update(here.config)
        for number in (1, 2, 3):  # 1 and 3 are not measured
            check_measured(again, Stage.iteration(number), object())
        return again

    assert start().results.records == here.results.records
    there = json.loads((tmp_path / "results.json").read_text())
    change(there)
    (tmp_path / "results.json").write_text(json.dumps(there))
    with pytest.raises(ValueError, match=said):
        start()


def test_a_measured_stage_without_its_temperatures_is_refused(tmp_path):
    here = run(tmp_path)
    here.config.update({"eval": {"every": 1, "test_at": ()}, "evolve": {"iterations": 4}})
    add(here, Stage.iteration(2))
    check_measured(here, Stage.iteration(2), None)  # without a reward model none are tried
    with pytest.raises(ValueError, match=r"no record of iteration_02 \(temperatures\)"):
        check_measured(here, Stage.iteration(2), object())


def test_when_temperatures_are_explored(tmp_path):
    reward = object()
    stages = [Stage.base, Stage.warmup, *map(Stage.iteration, range(1, 5))]
    assert [explores(run(tmp_path), s, reward) for s in stages] == [False, True, False, True, False, True]
    assert not any(explores(run(tmp_path), s, None) for s in stages)
    assert not any(explores(run(tmp_path, every=0), s, reward) for s in stages)


def test_a_policy_is_restored_when_it_is_asked_for():
    read = []

    def restore():
        read.append(1)
        return TrainState(0, "params", ())

    policy = Policy(Stage.warmup, restore)
    assert not read
    assert policy.params == policy.params == "params" and len(read) == 1
    assert policy.take().params == "params" and policy.state is None and len(read) == 1
    assert policy.params == "params" and len(read) == 2  # the state was given away
    trained = Policy(Stage.warmup, restore, TrainState(1, "new", ()))
    assert trained.params == "new" and trained.take().step == 1 and len(read) == 2


def test_stages_are_ordered_as_they_run():
    first = [Stage.align, Stage.base, Stage.warmup, Stage.reward_model]
    stages = [*first, *map(Stage.iteration, (1, 2, 10, 100))]
    backwards = list(reversed(stages))
    assert sorted(backwards) == stages
    names = ["align", "base", "warmup", "prm"]
    names += ["iteration_01", "iteration_02", "iteration_10", "iteration_100"]
    assert [stage.name for stage in stages] == names == [str(stage) for stage in stages]
    assert [Stage.parse(name) for name in names] == stages
    assert [(stage.kind, stage.number) for stage in stages[2:5]] == [
        ("warmup", 0),
        ("prm", 0),
        ("iteration", 1),
    ]
    for name in ("", "iteration", "iteration_00", "iteration_x", "warm-up", "iteration_-1"):
        with pytest.raises(ValueError, match="no stage is called"):
            Stage.parse(name)
    with pytest.raises(ValueError, match="counted from 1"):
        Stage.iteration(0)


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
    expected = {"all_right": 1 / 4, "unfaithful": pytest.approx(2 / 3)}
    assert right_steps(groups, {truth.id: truth}) == expected


def test_parts_of_a_split_are_measured_apart():
    lines = ("The red bar is at 4 and the blue bar at 2.", "4 + 2 = 6")
    parts = {"a": "new figures", "b": "new figures", "c": "both"}
    known = {
        name: Truth(name, "test", "pair", (("red", 4), ("blue", 2)), (lines,), "6", part=part, free=True)
        for name, part in parts.items()
    }
    right, lucky, wrong = (
        "Red 4, blue 2.\n2 + 4 = 6.",
        "Red 5, blue 1.\n5 + 1 = 6",
        "Red 4, blue 2.\n4 + 2 = 7",
    )

    def group(name, *texts):
        return [
            Response(name, i, text, (), 0.0, False, verdict="wrong" if text == wrong else "correct",
                     temperature=float(i > 0)) for i, text in enumerate(texts)
        ]  # fmt: skip

    groups = [
        group("a", right, wrong, wrong),
        group("b", lucky, right, wrong),
        group("c", wrong, wrong, right),
    ]
    figures = {"n": 2, "greedy_accuracy": 1.0, "sampled_accuracy": 0.25, "pass_at_k": 0.5, "all_right": 0.5}
    both = {"n": 1, "greedy_accuracy": 0.0, "sampled_accuracy": 0.5, "pass_at_k": 1.0, "all_right": 0.0}
    assert by_part(groups, known, 2) == {"parts": {"new figures": figures, "both": both}}
    assert by_part(groups, {name: dataclasses.replace(t, part="") for name, t in known.items()}, 2) == {}
    assert by_part(groups, {}, 2) == {}
    assert right_steps(groups, {}) == {}  # no embedded data
