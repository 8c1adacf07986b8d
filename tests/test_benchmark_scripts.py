"""The benchmark scripts run at their smallest size, and the sides of a comparison agree."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_smolvlm
from flax import nnx

from mstar_jax import models
from mstar_jax.data import truth
from mstar_jax.models import smolvlm
from mstar_jax.models.vision import Vit, VitConfig

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]


def measured(script: str, folder: pathlib.Path, *flags: str) -> dict:
    """What a script of benchmarks/ writes with --smoke."""
    command = [sys.executable, ROOT / "benchmarks" / script, "--smoke", "--repeats=1", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--out={folder}/out.json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "out.json").read_text())
    for row in record["results"]:
        assert row["least"] <= row["seconds"] <= row["greatest"]
        assert f"| {row['what']} |" in done.stdout
    assert record["machine"]["device"] == "cpu: cpu" and "jax" in record["versions"]
    return record


@pytest.mark.parity
def test_against_transformers(tmp_path):
    pytest.importorskip("torch")
    record = measured("against_transformers.py", tmp_path)
    assert record["rollouts agree"]["equal greedy tokens"] == 12
    assert record["sft agree"]["losses differ by"] < 1e-4
    assert record["prm agree"]["differ by"] < 1e-5
    parts = [(row["part"], row["ratio"] is None) for row in record["results"]]
    assert parts == [(part, alone) for part in ("rollouts", "sft", "prm") for alone in (True, False)]


def test_host(tmp_path):
    """At 400 rows; the second start knows the images."""
    command = [sys.executable, ROOT / "benchmarks" / "host.py", "--rows=400", "--images=60", "--only=read"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    flags = [f"--out={tmp_path}/out.json", f"--folder={tmp_path}/data"]
    done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["what"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert list(found)[:3] == [
        "first start: rows read and split",
        "first start: digests",
        "first start: 199 prompts planned",
    ]
    assert all(f"| {what} |" in done.stdout and row["processor"] > 0 for what, row in found.items())
    read = [found[f"{when} start: rows read and split"]["processor"] for when in ("first", "second")]
    assert read[1] < read[0]
    rows = json.loads((tmp_path / "data" / "train_400_60.json").read_text())
    assert len(rows) == 400 and len({row["image"] for row in rows}) == 60


@pytest.mark.parametrize("flags", [(), ("--policy=smolvlm", "--dtype=float32", "--lora=2")])
def test_gpu(tmp_path, flags):
    """On a CPU, whose peak is unknown, there are no shares of it."""
    record = measured("gpu.py", tmp_path, *flags)
    assert [row["what"].split(",")[0] for row in record["results"]] == [
        "decode", "prefill", "rollouts", "prm", "train"
    ]  # fmt: skip
    assert all(row["MFU"] is None and row["bandwidth"] is None for row in record["results"])
    # 2 layers, 2 rows of 48 prompt tokens, keys and values of 64 numbers in bfloat16 or float32
    size = 2 * 48 * 2 * 2 * 64 * (4 if flags else 2)
    assert record["rollouts"]["a step reads prompts"] == f"{size / 1e9:.4g} GB"
    assert flags or {"vision", "language", "projector"} <= set(record["train"])
    assert record["memory"]["peak GB resident"] > 0.1


def test_host_judging(tmp_path, monkeypatch):
    """Every response is stored, with its verdict, and those with scores are the correct ones."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import host_judging

    rows = host_judging.judging(tmp_path, 6, 16)
    assert len(rows) == 5 and all(row.peak > 0 for row in rows)
    counts = {}
    for kind in ("rollouts", "scores"):
        lines = (tmp_path / kind / "00000.jsonl").read_text().splitlines()
        found = [r for line in lines for r in json.loads(line)["responses"]]
        counts[kind] = len(found), sum(r["verdict"] == "correct" and not r["truncated"] for r in found)
    assert counts["rollouts"][0] == 6 * 16
    assert counts["scores"] == (counts["rollouts"][1],) * 2 and counts["scores"][0] > 0


def test_teach_tower(monkeypatch, capsys):
    """Digits are named in the cells where they are printed, with their place and owner; a tower learns them,
    the one that it starts from keeps its values, and a connector says them in a language model's words."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("mstar_jax.data.figures.draw_objects", lambda rng: ("list", (("star", 417),)))
    import teach_tower

    images, answers = teach_tower.drawn(0)
    there = answers[..., 0] != teach_tower.NOTHING
    named = answers[there].reshape(len(images), 3, 4)
    assert (np.sort(named[..., 0], axis=1) == [1, 4, 7]).all()
    star = teach_tower.FORMS.index("star")
    for digit, place in ((4, 2), (1, 1), (7, 0)):
        assert (named[named[..., 0] == digit][:, 1:] == [place, len(teach_tower.COLOURS), star]).all()
    cells = there.reshape(len(images), teach_tower.CELLS, teach_tower.CELLS, teach_tower.SLOTS)
    line = cells.any(axis=(0, 2, 3))
    assert line.nonzero()[0].tolist() in ([3], [4], [3, 4])  # the middle of the image
    monkeypatch.setattr(teach_tower, "figures_of", lambda seeds: (images, answers))
    monkeypatch.setattr(teach_tower, "PIECE", 100)
    config = VitConfig(32, 64, 1, 2, 128, 8, select_layer=-1, class_token=False, pre_norm=False)
    tower = Vit(config, nnx.Rngs(0))
    before = jax.tree.map(np.asarray, tower)
    taught = teach_tower.teach(tower, 100, 400, "float32", 3e-3, held=100)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, tower)))
    assert not jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, taught)))
    pattern = r"held-out figures: ([\d.]+) % of the digits are read, ([\d.]+) % with"
    digits, whole = map(float, re.search(pattern, capsys.readouterr().out).groups())
    assert digits > 60 and 0 < whole <= digits  # a guess is right in a third of them

    words = [word for kind, _ in teach_tower.WORDS for word in kind]
    connector = teach_tower.connector(taught, lambda word: np.eye(len(words))[words.index(word)], 400)
    assert connector.shape == (32 * 4, len(words))
    said = np.asarray(teach_tower.features(taught, images[:100])) @ connector
    alone = (answers[:100, :, 0, 0] < 10) & (answers[:100, :, 1, 0] == teach_tower.NOTHING)
    assert (said[alone][:, :10].argmax(-1) == answers[:100, :, 0, 0][alone]).mean() > 0.5
    assert abs(said[..., words.index(" star")][alone].mean() - 1) < 0.5
    assert abs(said[~there[:100].any(-1)].mean()) < 0.1


def test_teach_tower_with_few_steps_and_figures(monkeypatch, capsys):
    """Fewer figures than a piece, and too few steps to warm up: all of them are drawn, and it learns."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import teach_tower

    asked = []

    def figures_of(seeds):
        asked.append(seeds)
        images = np.zeros((len(seeds) * teach_tower.PIECE, 128, 128, 3), np.uint8)
        return images, np.zeros((len(images), teach_tower.CELLS**2, teach_tower.SLOTS, 4), np.uint8)

    monkeypatch.setattr(teach_tower, "figures_of", figures_of)
    monkeypatch.setattr(teach_tower, "PIECE", 8)
    monkeypatch.setattr(teach_tower, "BATCH", 4)
    tower = Vit(VitConfig(16, 32, 1, 2, 128, 8, select_layer=-1, class_token=False), nnx.Rngs(0))
    before = np.asarray(tower.patch[...])
    taught = teach_tower.teach(tower, 2, 3, "float32", 1e-3, held=8)
    assert asked == [range(2)] and "11 figures" in capsys.readouterr().out
    after = np.asarray(taught.patch[...])
    assert np.isfinite(after).all() and (after != before).any()


def test_describe_figures(monkeypatch, capsys, tmp_path):
    """Descriptions count by what they claim, in any words; a policy that says nothing has 0 %."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import describe_figures

    examples = describe_figures.drawn(tmp_path, 30)
    assert len(examples) == 30 and all(each.mode == "caption" for each in examples)
    right = {each.query.id: each.response for each in examples}
    rows = describe_figures.judged(examples, right.__getitem__)
    assert set(rows) == {"bar charts", "price lists", "scenes"}
    assert sum(row["figures"] for row in rows.values()) == 30
    assert all(row["whole"] == row["names"] == row["numbers"] == 1 for row in rows.values())

    def wrong(query):  # one number more than is shown, in other words and another order
        _, (first, number), *rest = truth.facts(right[query])
        return "It shows " + ", ".join(f"{value} {name}" for name, value in [*rest, (first, number + 1)])

    counts = {"bar charts": 0, "price lists": 0, "scenes": 0}
    for each in examples:
        said = truth.facts(each.response)
        counts[describe_figures.kind_of(said)] += len(said) - 1
    for kind, row in describe_figures.judged(examples, wrong).items():
        assert row["whole"] == 0 and row["names"] == 1
        assert row["numbers"] == pytest.approx(1 - row["figures"] / counts[kind])

    test_smolvlm.make_words(tmp_path / "words")
    made = models.FromScratch(smolvlm.FAMILY, test_smolvlm.CONFIG, tmp_path / "words")
    policy = made.build(0)
    folders = [tmp_path / name / "policy" for name in "ab"]  # of one name
    for folder in folders:
        made.save(policy, folder)
    monkeypatch.setattr(sys, "argv", ["", *map(str, folders), "--figures=3", "--show=2", "--batch=8"])
    capsys.readouterr()
    describe_figures.main()
    shown = capsys.readouterr().out
    cells = [line.split("|")[2:-1] for line in shown.splitlines() if line.startswith(f"| {tmp_path}")]
    assert sum(int(n) for n, *_ in cells) == 6 and shown.count("said:") == 4
    assert all([cell.strip() for cell in rest] == ["0.0 %"] * 3 for _, *rest in cells)
