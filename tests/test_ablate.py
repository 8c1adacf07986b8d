"""The ablations: rows differ in what their titles say and nothing else; what is made of their results."""

import json
import math
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from absl import app

from configs import tiny
from configs.variants import VARIANTS
from mstar_jax import ablate, configure, sharding

ROWS = {row.name: row for table in ablate.TABLES_BY_NUMBER.values() for row in table.rows}


@pytest.mark.parametrize("name", [*ROWS, "shared"])
def test_rows_are_possible_and_equal_in_queries_and_steps(name):
    config = tiny.get_config("ablation")
    before = dict(config.evolve)
    config.update_from_flattened_dict(ablate.values_of(config, (ROWS | {"shared": ablate.SHARED})[name], 7))
    configure.check(config, sharding.make_mesh())
    assert config.seed == config.data.seed == 7 and config.explore.adapt == (name == "adaptive")
    assert config.explore.every == (2 if name == "adaptive" else 0)
    assert config.data.figures.unlabelled == config.data.figures.train
    e = config.evolve
    if name == "shared":
        assert e.iterations == 0
    else:
        assert e.iterations * e.steps == before["iterations"] * before["steps"]
        assert e.iterations * e.fraction == pytest.approx(before["iterations"] * before["fraction"])


def test_rows_of_a_table_differ():
    config = tiny.get_config("ablation")
    for table in ablate.TABLES_BY_NUMBER.values():
        found = [json.dumps(ablate.values_of(config, row, 0), sort_keys=True) for row in table.rows]
        assert len(set(found)) == len(found)
        assert table.against in {row.name for row in table.rows}


@pytest.mark.parametrize(
    "name", ["sft", "iterative_rft", "rest_em", "random_2", "rloo", "grpo", "grpo_process"]
)
def test_rows_are_the_variants_that_users_name(name):
    assert ROWS[name].values == VARIANTS[name]
    assert VARIANTS["continuous"].items() <= ROWS["continuous_25"].values.items()


def write(folder, stage, done=8, **values):
    """Results of a run of 8 iterations, `done` of them, or of the warm-up alone."""
    folder.mkdir(parents=True, exist_ok=True)
    last = stage == "iteration"
    record = {"stage": stage, "iteration": done if last else 0, "split": "test"} | values
    there = {"config": {"evolve": {"iterations": 8 if last else 0}}, "stages": [record]}
    (folder / "results.json").write_text(json.dumps(there))


def test_tables(tmp_path):
    greedy = {"shared": (0.4, 0.5, 0.3), "top_2": (0.6, 0.66, 0.57), "random_2": (0.5, 0.55)}
    for name, values in greedy.items():
        for seed, value in enumerate(values):
            stage = "warmup" if name == "shared" else "iteration"
            write(tmp_path / f"seed_{seed}" / name, stage, greedy_accuracy=value, all_right=value / 2)
    table = [row for row in ablate.TABLES_BY_NUMBER["2"].rows if row.name in ("top_2", "random_2", "top_1")]
    found = {record["name"]: record for record in ablate.table(tmp_path, table, range(3), "random_2")}
    assert [found[name]["seeds"] for name in ("shared", "random_2", "top_1", "top_2")] == [3, 2, 0, 3]
    top = found["top_2"]
    assert top["greedy_accuracy"]["mean"] == pytest.approx(61.0)
    sd = np.std([60, 66, 57], ddof=1)
    assert top["greedy_accuracy"]["interval"] == pytest.approx(4.302653 * sd / math.sqrt(3), rel=1e-5)
    assert top["gain"]["values"] == pytest.approx([20, 16, 27]) and top["paper"] == (45.3, 59.2)
    assert top["greedy_difference"]["values"] == pytest.approx([10, 11])
    assert top["all_right_difference"]["values"] == pytest.approx([5, 5.5])
    assert "greedy_difference" not in found["random_2"] and "gain" not in found["shared"]
    text = ablate.markdown("Table", list(found.values()), "Random-2")
    lines = text.splitlines()
    assert len(lines) == 4 + 3 + 2 and lines[-1] == "Not run: PRM Top-1."
    assert all(line.count("|") == lines[2].count("|") for line in lines[3:-2])
    assert "| PRM Top-2 | 61.0 ± 11.4 | 30.5 ± 5.7 | +21.0 ± 13.8 | +10.5 ± 6.4 (n = 2) |" in text
    assert "45.3 / 59.2" in text and "greedy over Random-2" in text


def test_a_row_that_was_killed_is_not_tabulated(tmp_path):
    """Though it was tested after every iteration."""
    write(tmp_path / "seed_0" / "grpo", "iteration", done=5, greedy_accuracy=0.5)
    assert ablate.measured(tmp_path / "seed_0" / "grpo") == {}
    assert not ablate.finished(tmp_path / "seed_0" / "grpo", 8)
    write(tmp_path / "seed_0" / "grpo", "iteration", greedy_accuracy=0.5)
    assert ablate.measured(tmp_path / "seed_0" / "grpo") == {"greedy_accuracy": 50.0}


def test_entropy_is_no_share(tmp_path):
    write(tmp_path / "seed_0" / "grpo", "iteration", greedy_accuracy=0.5, entropy=0.271)
    [row] = [row for row in ablate.TABLES_BY_NUMBER["5"].rows if row.name == "grpo"]
    found = ablate.table(tmp_path, [row], [0], "top_2")
    text = ablate.markdown("Table", found, "Top-2")
    assert "| | greedy | entropy (nats) | seeds | paper |" in text
    assert "| GRPO | 50.0 | 0.27 | 1 | not in the paper |" in text


def test_parts_of_the_test_split_have_a_table(tmp_path):
    for seed, value in enumerate((0.5, 0.7)):
        parts = {"new figures": {"n": 2, "greedy_accuracy": value}, "both": {"n": 2, "greedy_accuracy": 0.0}}
        write(tmp_path / f"seed_{seed}" / "grpo", "iteration", greedy_accuracy=value / 2, parts=parts)
    [row] = [row for row in ablate.TABLES_BY_NUMBER["5"].rows if row.name == "grpo"]
    lines = ablate.markdown("Table", ablate.table(tmp_path, [row], [0, 1], "top_2"), "Top-2").splitlines()
    assert "| by part of the test split | greedy, new figures | greedy, both | seeds |" in lines
    assert "| GRPO | 60.0 ± 127.1 | 0.0 ± 0.0 | 2 |" in lines


def test_fork(tmp_path):
    shared = tmp_path / "seed_0" / "shared"
    (shared / "checkpoints" / "prm").mkdir(parents=True)
    (shared / "checkpoints" / "prm" / "done.json").write_text("{}")
    (shared / "config.json").write_text("{}")
    write(shared, "warmup", greedy_accuracy=0.4)
    folder = tmp_path / "seed_0" / "top_2"
    ablate.fork(shared, folder)
    assert (folder / "checkpoints" / "prm" / "done.json").exists()
    assert not (folder / "config.json").exists()  # it has other values
    assert ablate.finished(shared, 0) and not ablate.finished(folder, 8)
    (folder / "results.json").unlink()  # as a run does, which replaces its files and never changes them
    write(folder, "iteration", greedy_accuracy=0.6)
    assert ablate.finished(folder, 8)
    assert json.loads((shared / "results.json").read_text())["stages"][0]["stage"] == "warmup"


def test_a_row_that_fails_or_is_killed_leaves_the_others(tmp_path, monkeypatch):
    """And a second start runs it alone, in the folder where it stopped."""
    codes = {"grpo": "sys.exit(3)", "rloo": "os.kill(os.getpid(), 9)", "top_2": "pass", "informative": "pass"}
    begun = []

    def start(workdir, name, values):
        begun.append(name)
        folder = workdir / name
        assert (folder / "tokenizer.json").exists()  # forked from `shared`, or there before
        if (code := codes[folder.name]) == "pass":
            write(folder, "iteration", greedy_accuracy=0.5)
        return subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"])

    monkeypatch.setattr(ablate, "_start", start)
    monkeypatch.setattr(ablate, "JOBS", types.SimpleNamespace(value=2))
    (tmp_path / "seed_0" / "shared").mkdir(parents=True)
    (tmp_path / "seed_0" / "shared" / "tokenizer.json").write_text("{}")
    todo = {f"seed_0/{name}": {} for name in codes}
    assert set(ablate.run(todo, tmp_path, 8)) == {"seed_0/grpo", "seed_0/rloo"} and set(begun) == set(todo)
    table = ablate.TABLES_BY_NUMBER["5"].rows
    done = [record["name"] for record in ablate.table(tmp_path, table, [0], "top_2") if record["seeds"]]
    assert done == ["top_2", "informative"]
    begun.clear()
    codes["grpo"] = codes["rloo"] = "pass"
    assert ablate.run(todo, tmp_path, 8) == [] and set(begun) == {"seed_0/grpo", "seed_0/rloo"}


def test_a_stop_waits_for_its_rows(tmp_path):
    """They save what they have, and a second start finds none of them still writing."""
    row = "import pathlib, signal, sys, time\n"
    row += "save = lambda *_: (time.sleep(1), pathlib.Path('saved').touch(), sys.exit(143))\n"
    row += "signal.signal(signal.SIGTERM, save)\n"
    row += "pathlib.Path('begun').touch()\ntime.sleep(60)"
    command = f"""
import pathlib, signal, subprocess, sys, types
from mstar_jax import ablate, cli
from configs import tiny
values = {{"CONFIG": tiny.get_config("ablation"), "WORKDIR": "runs", "TABLES": ["5"]}}
for name, value in (values | {{"ROWS": ["grpo"], "SEEDS": 1, "JOBS": 1}}).items():
    setattr(ablate, name, types.SimpleNamespace(value=value))
ablate._start = lambda *_: subprocess.Popen([sys.executable, "-c", {row!r}])
ablate.main(["ablate"])
"""
    for number in (signal.SIGTERM, signal.SIGHUP):
        process = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path)
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 143 and (tmp_path / "saved").exists()
        for name in ("begun", "saved"):
            (tmp_path / name).unlink()


def test_rows_with_other_values_are_not_mixed(tmp_path):
    """A finished row is not looked at again, so a second start with other values would tabulate both."""
    config = tiny.get_config("ablation")
    ablate.claim(tmp_path / "runs", json.loads(config.to_json_best_effort()))
    config.train.log_every = 3  # says nothing about results
    ablate.claim(tmp_path / "runs", json.loads(config.to_json_best_effort()))
    config.evolve.k = 5
    with pytest.raises(app.UsageError, match=r"other values \(evolve.k: 16 there, 5 now\)"):
        ablate.claim(tmp_path / "runs", json.loads(config.to_json_best_effort()))


def test_passes_that_a_fraction_does_not_divide():
    config = tiny.get_config("ablation")
    config.evolve.iterations = 6  # one pass and a half
    with pytest.raises(ValueError, match="continuous_100: evolve.fraction = 1.0: .* = 1.5 passes"):
        ablate.values_of(config, ROWS["continuous_100"], 0)


def test_an_impossible_row_is_told_before_any_runs(tmp_path, monkeypatch):
    """Not after the hours that base and warm-up take."""
    config = tiny.get_config("ablation")
    config.evolve.iterations = 6
    values = {"CONFIG": config, "WORKDIR": str(tmp_path / "runs"), "TABLES": ["1"], "ROWS": []}
    values["SEEDS"] = 1
    for name, value in values.items():
        monkeypatch.setattr(ablate, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(ablate.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ablate, "run", lambda *_: pytest.fail("a row was started"))
    with pytest.raises(app.UsageError, match="iterative_rft: .* = 1.5 passes .*; choose other --rows"):
        ablate.main(["ablate"])
    assert not (tmp_path / "runs").exists()


def test_flags_are_passed_on():
    """All but the command's own, in every form that absl reads."""
    given = [
        "--config",
        "a.py:b",
        "--config.seed=1",
        "--noconfig.x",
        "--config.y",
        "--tables=1",
        "--grace=120",
    ]
    own = ["--seeds", "3", "-rows=sft", "--jobs=2", "--workdir", "runs/x"]
    assert ablate._passed_on([*own, *given, "--config.z", "-1"]) == [
        *given[:5],
        "--grace=120",
        "--config.z",
        "-1",
    ]
