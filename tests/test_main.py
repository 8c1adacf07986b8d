"""The command: what it refuses, and what it writes above the results."""

import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

from configs import tiny as tiny_config
from mstar_jax import configure, main, sharding
from mstar_jax.profiling import speed
from mstar_jax.stages import run
from mstar_jax.workdir import claim

ANSWER = {"from": "gpt", "value": "The answer is 2"}
ROOT = pathlib.Path(__file__).resolve().parents[1]


def start(*flags, devices=1):
    """Runs the command to its end."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.run(
        [sys.executable, "-m", "mstar_jax.main", *flags], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("variant", ["mstar", "continuous", "rest_em", "smoke"])
def test_head(variant, tmp_path):
    config = tiny_config.get_config(variant)
    head = main.head(config)
    assert head["config"]["policy"]["decoder"]["hidden_size"] == 96 and head["seed"] == 0
    assert {"mstar_jax", "python", "jax", "flax", "optax", "orbax"} <= set(head["versions"])
    assert head["device"] == {"kind": "cpu", "platform": "cpu", "count": 8}
    assert json.loads(json.dumps(head)) == head  # tuples would differ from what is read back
    claim(tmp_path, head["config"])
    claim(tmp_path, main.head(tiny_config.get_config(variant))["config"])


def test_impossible_batch_is_refused(tmp_path):
    flags = ["--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=2"]
    done = start(*flags, "--config.evolve.batch=3", devices=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("evolve.batch", "3", "2"):
        assert part in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()  # so that the corrected command may have it


@pytest.mark.slow  # the same with a file in the path is below
def test_a_workdir_that_cannot_be_written_is_named():
    done = start("--config=configs/tiny.py:smoke", "--workdir=/proc/runs/one")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "/proc/runs" in line


def test_seconds_do_not_follow_the_wall_clock(monkeypatch):
    """Which may be set back while a run lasts."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    here = types.SimpleNamespace(since=time.monotonic() - 2, speeds=speed.Speeds(chips=1))
    assert [run.lap(here)["seconds"] >= least for least in (2, 0)] == [True, True]
    assert run.lap(here)["seconds"] < 2


@pytest.mark.parametrize(
    ("key", "value"), [("refill", 0.0), ("refill", 1.5), ("shard", 0), ("cache", "int4"), ("batch", 3)]
)
def test_impossible_sampling_is_refused(key, value):
    config = tiny_config.get_config("smoke")
    mesh = sharding.make_mesh(**config.mesh)
    assert configure.sampling_problems(config, mesh) == []
    config.sampling[key] = value
    [problem] = configure.sampling_problems(config, mesh)
    assert problem.startswith(f"sampling.{key} = ")


def test_more_passes_than_samples_are_refused():
    config = tiny_config.get_config("smoke")
    configure.check(config, sharding.make_mesh(**config.mesh))
    config.eval.k = 1 + config.eval.samples
    with pytest.raises(ValueError, match="eval.k = 5: Pass@k needs k samples, and eval.samples = 4"):
        configure.check(config, sharding.make_mesh(**config.mesh))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("few.json", "3 usable rows are too few"),
        pytest.param("none.json", "cannot be read", marks=pytest.mark.slow),
    ],
)
def test_data_that_cannot_be_leaves_the_workdir_free(tmp_path, name, said):
    """The corrected command may have it."""
    (tmp_path / "few.json").write_text(
        json.dumps(
            [
                {"id": i, "conversations": [{"from": "human", "value": f"Question: {i} + 1?"}, ANSWER]}
                for i in "123"
            ]
        )
    )
    flags = ["--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'run'}", "--config.base.batch=8"]
    done = start(*flags, f"--config.data.labelled={tmp_path / name}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1] and name in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = start("--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'file' / 'run'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "file") in line
