"""Trackers hold what results.json and the curves hold, each step once, also after a kill."""

import csv
import json
import os
import pathlib
import struct
import subprocess
import sys

import pytest

from mstar_jax.report import trackers

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The writing side of a run in two starts: the first is killed amid the warm-up, after its last checkpoint.
RUN = """
import json, os, pathlib, signal, sys, time
import numpy as np
from PIL import Image
from mstar_jax.report import trackers
from mstar_jax.records import Results
from mstar_jax.structs import Stage
from mstar_jax.training.curves import StageLog

kind, workdir, start = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
trackers.EVERY = 0.1


def train(stage, first, last):
    curve = StageLog(workdir, stage, first)
    for step in range(first + 1, last + 1):
        values = {"loss": 3 / step, "accuracy": 1 - 1 / step, "grad_norm": 0.1 * step, "tokens": 7.0 * step}
        curve.add({name: np.float32(value) for name, value in values.items()})
        curve.write(step, 1e-3 / step)
    curve.close()


def record(split, accuracy):
    return {"split": split, "n": 4, "greedy_accuracy": accuracy, "parts": {"held-out": {"n": 2}},
            "kept": None, "seconds": 1.0, "speed": {}}


workdir.mkdir(exist_ok=True)
(workdir / "config.json").write_text(json.dumps({"eval": {"show": 5}, "seed": 0}))
results = Results(workdir, {"config": {"seed": 0}})
with trackers.following(kind, workdir):
    if start == 1:
        for split in ("validation", "test"):
            folder = workdir / "rollouts" / f"base_{split}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(workdir / "red.png")
            said = {"temperature": 0.0, "verdict": "correct", "text": "The answer is <b>2</b>"}
            line = {"query": split, "images": [str(workdir / "red.png")], "question": "?", "gold": "2",
                    "responses": [said]}
            (folder / "00000.jsonl").write_text(json.dumps(line) + "\\n")
        train(Stage.base, 0, 5)
        results.add(Stage.base, record("validation", 0.25))
        results.add(Stage.base, record("test", 0.1))
        train(Stage.warmup, 0, 4)
        while not (workdir / "tracker.json").exists():
            time.sleep(0.1)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    train(Stage.warmup, 2, 6)
    train(Stage.reward_model, 0, 3)
    results.add(Stage.reward_model, {"split": "held-out", "label_auc": 0.75, "seconds": 1.0, "speed": {}})
    results.add(Stage.warmup, record("validation", 1 / 3))
    results.add(Stage.warmup, record("test", 0.3))
    grid = [{"temperature": t, "reward_pass_at_2": t / 2} for t in (0.5, 0.7)]
    results.extend(Stage.warmup, "validation", {"grid": grid, "chosen": 0.7, "seconds": 1.0, "speed": {}})
    train(Stage.iteration(1), 0, 2)
    results.add(Stage.iteration(1), record("validation", 0.5))
    (workdir / "report").mkdir(exist_ok=True)
    (workdir / "report" / "report.html").write_text("<p>report</p>")
"""


def start(kind, workdir, number):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    command = [sys.executable, "-c", RUN, kind, str(workdir), str(number)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def mlflow_history(workdir):
    """{name: [(step, value)]} from the files of the only run, and the names of its artefacts."""
    [run] = [path.parent for path in workdir.glob("mlruns/*/*/meta.yaml")]
    metrics = [path for path in (run / "metrics").rglob("*") if path.is_file()]
    found = {}
    for path in metrics:
        lines = [line.split() for line in path.read_text().splitlines()]
        found[str(path.relative_to(run / "metrics"))] = [
            (int(step), float(value)) for _, value, step in lines
        ]
    return found, {str(p.relative_to(run / "artifacts")) for p in (run / "artifacts").rglob("*.html")}


def wandb_history(workdir):
    """As above, from the log of the last start, in LevelDB's format: blocks of 32 KB, records of length and
    type (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    [path] = (workdir / "wandb" / "latest-run").glob("*.wandb")
    data, at, part = path.read_bytes(), 7, b""
    found, files = {}, set()
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            entry = wandb_internal_pb2.Record.FromString(part)
            part = b""
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item}
            for key, value in values.items():
                if key.startswith("samples/"):  # a table
                    files.add("/".join(key.split("/")[:2]) + ".html")
                elif not key.startswith("_"):
                    found.setdefault(key, []).append((entry.history.step.num, value))
            if entry.request.log_artifact.artifact.name or entry.artifact.name:
                files.add("report.html")
    return found, files


@pytest.mark.parametrize(("kind", "history"), [("mlflow", mlflow_history), ("wandb", wandb_history)])
def test_a_killed_run_is_there_once(tmp_path, kind, history):
    pytest.importorskip(kind)
    workdir = tmp_path / "run"
    assert start(kind, workdir, 1).returncode == -9
    before = json.loads((workdir / "tracker.json").read_text())
    done = start(kind, workdir, 2)
    assert done.returncode == 0 and "tracker" not in done.stderr, done.stderr
    assert json.loads((workdir / "tracker.json").read_text()) == before  # the same run
    found, files = history(workdir)
    for series in found.values():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps))
    values = {key: [value for _, value in series] for key, series in found.items()}
    stages = json.loads((workdir / "results.json").read_text())["stages"]
    for split, key in (
        ("validation", "greedy_accuracy"),
        ("test", "greedy_accuracy"),
        ("held-out", "label_auc"),
    ):
        assert values[f"{split}/{key}"] == [r[key] for r in stages if r["split"] == split]
    assert values["validation/parts/held-out/n"] == [2, 2, 2] and values["validation/stage"] == [0, 1, 2]
    assert values["explore/temperature"] == [0.5, 0.7] and values["explore/chosen"] == [0.7]
    for stage, name in {
        "base": "base",
        "warmup": "warmup",
        "prm": "prm",
        "iteration": "iteration_01",
    }.items():
        with open(workdir / "metrics" / f"{name}.csv") as file:
            lines = list(csv.DictReader(file))
        for key in ("loss", "accuracy", "grad_norm", "tokens", "learning_rate"):
            assert values[f"{stage}/{key}"] == [float(line[key]) for line in lines], (stage, key)
    assert {"report.html", "samples/base_validation.html", "samples/base_test.html"} <= files


def test_rows_only_grow(tmp_path):
    """A later look appends: curves before their stage's records, and an exploration after them."""

    def curve(name, steps):
        lines = ["step,loss", *(f"{step},{step / 2}" for step in steps)]
        (tmp_path / "metrics" / f"{name}.csv").write_text("\n".join(lines) + "\n")

    def look(*stages):
        (tmp_path / "results.json").write_text(json.dumps({"stages": stages}))
        return trackers.rows(tmp_path)

    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "dynamics.csv").write_text("stage,split\nbase,test\n")
    base = {"stage": "base", "iteration": 0, "split": "test", "n": 4, "gap": None, "seconds": 1.0}
    curve("base", (10, 20))
    looks = [look(), look(base)]
    curve("warmup", (10,))
    (tmp_path / "metrics" / "warmup.csv").open("a").write("20,1")  # of a line that is being written
    looks.append(look(base))
    first = {"stage": "warmup", "iteration": 0, "split": "validation", "greedy_accuracy": 0.5, "seconds": 1.0}
    second = {**first, "split": "test"}
    looks += [look(base, first), look(base, first, second)]
    more = {"grid": [{"temperature": 0.7}], "chosen": 0.7, "seconds": 2.0}
    looks.append(look(base, first | more, second))
    curve("iteration_01", (10,))
    looks.append(look(base, first | more, second))
    for one, two in zip(looks, looks[1:]):
        assert two[: len(one)] == one and len(two) == len(one) + 1
    assert [row.step for row in looks[-1]] == [10, 20, 21, 31, 32, 33, 34, 44]
    assert looks[-1][2] == trackers.Row(
        21, {"test/stage": 0.0, "test/iteration": 0.0, "test/n": 4.0}, "base_test"
    )
    assert looks[-1][6].values == {"explore/temperature": 0.7, "explore/chosen": 0.7}


def test_a_tracker_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog):
    def broken(workdir):
        raise RuntimeError("no such server")

    monkeypatch.setattr(trackers, "_mlflow", broken)
    done = []
    with trackers.following("mlflow", tmp_path):
        done.append(1)
    with trackers.following("", tmp_path):
        done.append(2)
    assert done == [1, 2]
    assert [r.getMessage() for r in caplog.records] == [
        "tracker mlflow: RuntimeError: no such server. The run goes on without it"
    ]
