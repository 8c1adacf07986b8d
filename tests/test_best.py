"""The best iteration by validation: which one it is, that its checkpoint stays, and that it is exported."""

import json
import types

import pytest
from ml_collections import ConfigDict

from mstar_jax import finished, records
from mstar_jax.stages.policy import drop_checkpoints
from mstar_jax.structs import Stage

COURSE = (0.5, 0.7, 0.6, 0.7, 0.65, 0.8, 0.1, 0.2, 0.3)  # greedy accuracy of iterations 1, 2, ...


def record(accuracy, split="validation"):
    values = {"split": split, "n": 8, "greedy_accuracy": accuracy, "kept": 1, "temperature": 1.0}
    return values | {"seconds": 1.0, "speed": {}}


def results(workdir, course=COURSE):
    found = records.Results(workdir, {})
    found.add(Stage.warmup, record(0.9))
    for t, accuracy in enumerate(course, 1):
        found.add(Stage.iteration(t), record(accuracy))
    found.add(Stage.iteration(max(len(course), 1)), record(1.0, "test"))
    return found


def test_the_best_iteration_is_the_first_of_equal_ones(tmp_path):
    for count, best in ((1, 1), (2, 2), (5, 2), (6, 6), (9, 6)):
        folder = tmp_path / str(count)
        folder.mkdir()
        assert results(folder, COURSE[:count]).best() == Stage.iteration(best)
        assert json.loads((folder / "results.json").read_text())["best"] == f"iteration_{best:02d}"
        assert finished.stage_of(folder, "best") == Stage.iteration(best)
    found = results(tmp_path).records
    assert records.shown_best(found) == (
        "best on validation: iteration 6, greedy 80.0% (export --stage=best); the warm-up was better, 90.0% "
        "(--stage=warmup)"
    )
    equal = [{**found[0], "greedy_accuracy": 0.8}, *found[1:]]
    assert records.shown_best(equal).endswith("greedy 80.0% (export --stage=best)")


def test_there_may_be_none(tmp_path):
    none = results(tmp_path, ())
    assert none.best() is None and records.shown_best(none.records[:1]) == ""
    assert json.loads((tmp_path / "results.json").read_text())["best"] is None
    with pytest.raises(ValueError, match=r"results\.json: no iteration has been measured on validation"):
        finished.stage_of(tmp_path, "best")
    with pytest.raises(ValueError, match="no iteration has been measured"):
        finished.stage_of(tmp_path / "elsewhere", "best")
    assert finished.stage_of(tmp_path, "iteration_07") == Stage.iteration(7)
    with pytest.raises(ValueError, match="no stage is called 'beste'"):
        finished.stage_of(tmp_path, "beste")


def test_one_whose_checkpoint_was_removed_is_named(tmp_path):
    results(tmp_path)
    for name in ("warmup", "prm", "iteration_08", "iteration_09"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "done.json").write_text("{}")
    assert finished.finished(tmp_path) == Stage.iteration(9)
    said = "no finished training of iteration_06; there is warmup, prm, iteration_08, iteration_09"
    with pytest.raises(ValueError, match=said):
        finished.finished(tmp_path, finished.stage_of(tmp_path, "best"))


@pytest.mark.parametrize("every", [1, 3])  # iterations from one measurement to the next
def test_its_checkpoint_is_kept(tmp_path, every):
    """Besides the last two, whether or not the run was killed between a record and what it drops."""
    found = records.Results(tmp_path, {})
    there, late = set(), set()  # the other one drops only when it has to, as after a kill
    runs = [
        types.SimpleNamespace(
            config=ConfigDict({"evolve": {"keep_checkpoints": 2}}),
            results=found,
            checkpoints=types.SimpleNamespace(drop=kept.discard),
        )
        for kept in (there, late)
    ]
    for t, accuracy in enumerate(COURSE, 1):
        stage = Stage.iteration(t)
        there.add(stage)
        late.add(stage)
        if t % every == 0:
            found.add(stage, record(accuracy))
        drop_checkpoints(runs[0], t)
        best = found.best()
        assert there == {Stage.iteration(n) for n in (t - 1, t) if n} | ({best} if best else set())
        assert every > 1 or best.number == COURSE.index(max(COURSE[:t])) + 1
        if t in (4, 5, 9):
            drop_checkpoints(runs[1], t)
            assert late == there
