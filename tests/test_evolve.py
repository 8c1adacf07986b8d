"""The whole loop, shrunk: what it writes, and that a run that was stopped or killed ends as one that was not.

So small a policy is never right and writes no second line, so nearly all of these runs take every response
for a correct one, and label the step that its first three tokens would be.
"""

import collections
import functools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import tiny as tiny_config
from mstar_jax import configure, evolve, main, sharding
from mstar_jax.data import pictures
from mstar_jax.inference import generate
from mstar_jax.records import speeds
from mstar_jax.rewards import prm, selection
from mstar_jax.stages import policy
from mstar_jax.store import digest
from mstar_jax.workdir import claim

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {
    "data.figures.train": 24,
    "data.figures.validation": 12,
    "data.figures.test": 8,
    "data.figures.captions": 24,
    "data.figures.arithmetic": 16,
    "data.figures.instruct": 16,
    "data.validation": 8,
    "data.test": 8,
    "data.max_prompt": 152,
    "data.buckets": (160,),
    "policy.decoder.num_layers": 1,
    "policy.decoder.unroll": 1,
    "policy.vision.num_layers": 1,
    "base.steps": 12,
    "base.batch": 8,
    "base.warmup_steps": 2,
    "base.check_from": 10,
    "base.check_every": 5,
    "base.check_queries": 8,
    "warmup.queries": 12,
    "warmup.k": 2,
    "warmup.steps": 3,
    "warmup.batch": 8,
    "warmup.warmup_steps": 1,
    "evolve.iterations": 2,
    "evolve.fraction": 0.5,
    "evolve.k": 2,
    "evolve.steps": 3,
    "evolve.batch": 8,
    "evolve.warmup_steps": 1,
    "sampling.batch": 8,
    "sampling.max_new_tokens": 8,
    "eval.samples": 1,  # with the greedy one two branches, as in sampling: one program less
    "eval.k": 1,
    "prm.queries": 8,
    "prm.held_out": 4,
    "prm.k": 2,
    "prm.completions": 1,
    "prm.samples": 2,  # as many as the others sample: one program less
    "prm.rows": 8,
    "prm.steps": 3,
    "prm.warmup_steps": 1,
    "prm.chunk": 8,
    "explore.temperatures": (1.0,),
    "explore.samples": 1,
    "explore.queries": 8,
    "explore.batch": 8,
    "train.save_every": 2,
    "train.log_every": 3,
    "train.profile": (1, 2),
}
FINAL = "iteration_02"
KINDS = ("rollouts", "labels", "scores", "logprobs")  # of stores
# With as many devices as here: threads are shared out by their number, and sums differ in the last bit.
DRIVER = """
import functools, jax
from absl import app
from mstar_jax import main, sharding
from mstar_jax.rewards import prm, selection
selection.correct = list
selection.is_correct = lambda r: r.verdict == "correct"
true = prm.prefixes
first = lambda found: [tuple(r.tokens[:3]) for r in found if len(r.tokens) > 3]
prm.prefixes = lambda found, texts: list(dict.fromkeys([*first(found), *true(found, texts)]))
one = jax.devices()[:1]
sharding.make_mesh = functools.partial(sharding.make_mesh, devices=one)
app.run(main.main)
"""


def small(variant="smoke"):
    config = tiny_config.get_config(variant)
    config.update_from_flattened_dict(SMALL)
    return config


def run(config, workdir, stop=lambda: False):
    head = main.head(config)
    claim(workdir, head["config"])
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):  # as main does: layouts are pinned to it
        return evolve.evolve(config, workdir, head, stop)


def first_tokens(found, texts, true=prm.prefixes):
    first = [tuple(r.tokens[:3]) for r in found if len(r.tokens) > 3]
    return list(dict.fromkeys([*first, *true(found, texts)]))


@pytest.fixture(autouse=True, scope="module")
def shrunk_further():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "correct", list)
        patch.setattr(selection, "is_correct", lambda r: r.verdict == "correct")  # truncated or not
        patch.setattr(prm, "prefixes", first_tokens)
        one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])  # compiles sooner than eight
        patch.setattr(sharding, "make_mesh", one)
        yield


class Programs(logging.Handler):
    """Hears what JAX compiles: (name, shapes of the arguments)."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.found = []

    def emit(self, record):
        if record.msg.startswith("Compiling %s with global shapes and types %s"):
            self.found.append((str(record.args[0]), str(record.args[1])))

    def __enter__(self):
        self.log = logging.getLogger("jax._src.interpreters.pxla")
        self.before = self.log.level, self.log.propagate
        self.log.setLevel(logging.DEBUG)
        self.log.propagate = False
        self.log.addHandler(self)
        return self

    def __exit__(self, *_):
        self.log.removeHandler(self)
        self.log.setLevel(self.before[0])
        self.log.propagate = self.before[1]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run from start to end, and the programs that it compiled."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Programs() as programs:
        run(small(), workdir)
    return workdir, programs.found


@pytest.fixture(scope="module")
def whole(started):
    return started[0]


def texts(workdir):
    """What must not depend on how often the run was stopped; image paths hold the workdir's name."""
    found = [
        *(path for kind in KINDS for path in workdir.glob(f"{kind}/*/*.json*")),
        *workdir.glob("metrics/*.csv"),
        *workdir.glob("samples/*.md"),
    ]
    return {str(p.relative_to(workdir)): p.read_text().replace(str(workdir), "") for p in found}


def arrays(workdir, stage=FINAL):
    [folder] = [p for p in (workdir / "checkpoints" / stage).iterdir() if p.name.isdigit()]
    with ocp.StandardCheckpointer() as reader:
        return {name: np.asarray(x) for name, x in reader.restore((folder / "state").absolute()).items()}


def results(workdir):
    """The records without their times."""
    records = json.loads((workdir / "results.json").read_text())["stages"]
    return [{k: v for k, v in record.items() if k not in ("seconds", "speed")} for record in records]


def assert_same_run(workdir, other, curves=True):
    assert results(workdir) == results(other)
    one, two = (
        {name: text for name, text in texts(each).items() if curves or not name.startswith("metrics")}
        for each in (workdir, other)
    )
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
    one, two = arrays(workdir), arrays(other)
    assert sorted(one) == sorted(two) and any("mu" in name for name in one)
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []


def test_results(whole):
    results = json.loads((whole / "results.json").read_text())
    assert {"config", "seed", "versions", "device"} <= set(results)
    assert results["config"]["base"]["steps"] == 12 and "jax" in results["versions"]
    places = [(s["stage"], s["iteration"], s["split"]) for s in results["stages"]]
    assert places == [
        ("base", 0, "validation"),
        ("base", 0, "test"),
        ("prm", 0, "held-out"),
        ("warmup", 0, "validation"),
        ("warmup", 0, "test"),
        ("iteration", 1, "validation"),
        ("iteration", 2, "validation"),
        ("iteration", 2, "test"),
    ]
    fields = ("n", "greedy_accuracy", "pass_at_k", "k", "temperature", "kept", "seconds")
    own = [record for record in results["stages"] if record["stage"] != "prm"]
    for record in own:
        assert set(fields) <= set(record) and record["n"] == 8 and record["k"] == 1
        assert 0 <= record["greedy_accuracy"] <= 1 and record["seconds"] > 0
        assert 0 <= record["all_right"] <= 1
        assert record["entropy"] > 0 and record["groups_all_right"] + record["groups_all_wrong"] <= 1
        assert ("reward_pass_at_2" in record) == (record["stage"] != "base")
    assert [record["kept"] for record in own] == [None, None, 24, 24, 24, 24, 24]  # 12 queries, 2 responses
    [record] = [record for record in results["stages"] if record["stage"] == "prm"]
    assert record["n"] == 4 and record["responses"] == 8 and record["steps"] > 0
    assert [row["n"] for row in record["curve"]] == [1, 2]
    assert set(record["truth"]) == {
        f"{name}{of}" for name in ("step_auc", "all_right_auc") for of in ("", "_likelihood")
    }


@pytest.mark.slow
def test_memory_between_stages(whole, tmp_path, monkeypatch):
    """While the policy trains there is its state and nothing else: no reward model, no weights for sampling.
    While it samples or scores, its moments are on the host. The run ends as one that leaves them where they
    are, bit for bit."""
    config = small()
    config.train.offload_optimizer = True
    config.train.save_every = 100  # what is being saved is held in copies
    model = jax.eval_shape(configure.make_policy(config, whole, []).build)
    shape = model.decoder.blocks.gate.shape
    assert model.decoder.blocks.up.shape == shape

    def copies():
        """Of a model's parameters, or of moments of them, in the devices' own memory."""
        alive = [x for x in jax.live_arrays() if x.shape == shape and x.sharding.memory_kind == "device"]
        return len({x.unsafe_buffer_pointer() for x in alive}) / 2 - before  # several may share a buffer

    def watched(kind, call):
        def fn(*args, **kwargs):
            seen[kind].append(copies())
            return call(*args, **kwargs)

        return fn

    before, seen = 0, collections.defaultdict(list)
    before = copies()
    make = policy.make_train_step
    monkeypatch.setattr(policy, "make_train_step", lambda *a, **k: watched("train", make(*a, **k)))
    monkeypatch.setattr(generate.rollouts, "rollouts", watched("sample", generate.rollouts.rollouts))
    monkeypatch.setattr(prm, "scores", watched("score", prm.scores))
    run(config, tmp_path / "run")
    assert set(seen["train"]) == {3}, "the parameters and two moments"
    assert sorted(seen["sample"])[-2:] == [1, 3], (
        "in float32 sampled from as they are; base stops to be checked"
    )
    assert set(seen["score"]) <= {1, 2}, "the reward model, and the policy once it is back"
    assert_same_run(tmp_path / "run", whole)


def test_no_program_is_compiled_twice(started):
    """What takes a model has many arguments; the others are JAX's own, such as jit(add)."""
    own = [(name, shapes) for name, shapes in started[1] if shapes.count("ShapedArray") >= 10]
    assert {"jit(step)", "jit(_restart)", "jit(token_scores)"} <= {name for name, _ in own}
    assert [(name, count) for (name, _), count in collections.Counter(own).items() if count > 1] == []


def test_what_takes_no_model_needs_few_programs(started):
    """Outside of a jitted function every operation is a program: what needs no device belongs to numpy."""
    tiny = {name for name, shapes in started[1] if shapes.count("ShapedArray") < 10}
    allowed = {"jit(init)", "jit(cos)", "jit(_folded)", "jit(_blank)"}  # parameters, rates, keys, free slots
    assert tiny <= allowed, f"{sorted(tiny - allowed)} of {started[1]}"
    assert len(started[1]) <= 18, [name for name, _ in started[1]]


def test_speeds(whole):
    records = json.loads((whole / "results.json").read_text())["stages"]
    passes = {}
    for record in records:
        for kind, found in record["speed"].items():
            assert not passes.keys() & {(kind, name) for name in found}
            passes |= {(kind, name): each for name, each in found.items()}
    kinds = {kind for kind, _ in passes}
    assert kinds == {"train", "train prm", "rollouts", "evaluation", "labels", "score"}
    for each in passes.values():
        assert 0 < each["tokens"] < each["slots"] and each.get("decoded", 0) <= each.get("decode_slots", 0)
    shards = sorted((whole / "rollouts" / "iteration_01").glob("*.jsonl"))
    lines = [line for path in shards for line in path.read_text().splitlines()]
    lengths = [len(r["tokens"]) for line in lines for r in json.loads(line)["responses"]]
    rollouts = passes["rollouts", "iteration_01"]
    assert rollouts["decoded"] == sum(lengths) and rollouts["slots"] % 160 == 0
    trained = passes["train", FINAL]  # nothing is compiled any more
    assert trained["slots"] == 3 * 8 * 160 and trained["left_out"] == 0
    assert min(trained[f"flops/{part}"] for part in ("vision", "projector", "language")) > 0
    assert trained["tokens_per_second"] > 0 and passes["score", FINAL]["tokens_per_second"] > 0
    assert passes["rollouts", FINAL]["decoded_per_second"] > 0
    [events] = (whole / "tensorboard" / FINAL).glob("*tfevents*")
    assert b"speed/tokens_per_second" in events.read_bytes()
    shown = speeds(records)
    assert "rollouts: decode" in shown and len({len(line) for line in shown.split("\n")}) == 1


def test_every_stage_has_its_profile(whole):
    for stage in ("base", "warmup", "prm", "iteration_01", FINAL):
        assert list((whole / "profile" / stage / "0").glob("plugins/profile/*/*.xplane.pb"))


def test_temperatures(whole):
    """Measured after the warm-up and every second iteration; the choice is what the next ones sample at."""
    records = json.loads((whole / "results.json").read_text())["stages"]
    explored = {(r["stage"], r["iteration"]): r for r in records if "grid" in r}
    assert list(explored) == [("warmup", 0), ("iteration", 2)]
    for record in explored.values():
        [row] = record["grid"]
        assert row["temperature"] == record["chosen"] == 1.0 and 0 <= row["reward_pass_at_2"] <= 1


def test_labels_can_be_read(whole):
    shards = sorted((whole / "labels" / "prm").glob("*.jsonl"))
    records = [json.loads(line) for path in shards for line in path.read_text().splitlines()]
    found = [step for record in records for step in record["steps"]]
    assert found and all(step["of"] == 1 and step["reached"] in (0, 1) for step in found)
    assert all(step["text"].strip() and step["tokens"] for step in found)


def test_what_was_kept_was_scored(whole):
    lines = (whole / "scores" / "iteration_01" / "00000.jsonl").read_text().splitlines()
    responses = [r for line in lines for r in json.loads(line)["responses"]]
    assert any(r["step_scores"] for r in responses)
    for r in responses:
        assert all(0 < score < 1 for score in r["step_scores"])


def test_the_base_ends_at_its_target(whole):
    done = json.loads((whole / "checkpoints" / "base" / "done.json").read_text())
    assert (done["cursor"], done["done"]) == (10, True)  # target 0 is met when it is first asked
    assert sorted(p.name for p in (whole / "rollouts").glob("base_check*")) == ["base_check_00010"]


def test_schedule_is_of_the_whole_run(whole):
    rates = []
    for stage in ("iteration_01", "iteration_02"):
        rows = (whole / "metrics" / f"{stage}.csv").read_text().splitlines()
        assert rows[0] == "step,loss,accuracy,grad_norm,tokens,learning_rate" and len(rows) == 2
        rates.append(float(rows[1].split(",")[-1]))
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * (step - 1) / 5)) / 2 for step in (2, 5)]
    assert rates == pytest.approx([1e-3 * part for part in cosine], rel=1e-5)
    assert int(arrays(whole)["step"]) == 6


def test_rollouts_can_be_read(whole):
    lines = (whole / "rollouts" / "iteration_01" / "00000.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert len(record["responses"]) == 2 and pathlib.Path(record["images"][0]).exists()
    assert {r["verdict"] for r in record["responses"]} <= {"correct", "wrong", "unparsed"}
    assert {r["temperature"] for r in record["responses"]} == {1.0}


def test_benchmarks_are_asked_at_the_end(whole, tmp_path):
    """Base, warm-up and final policy, with votes by the run's own reward model."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    config = small()
    config.benchmarks.update({"names": ("mathv360k",), "root": str(workdir / "figures"), "samples": 1})
    evolve.evolve(config, workdir, main.head(config), lambda: False)
    found = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob("benchmarks/*/*.json")}
    assert set(found) == {"base", "warmup", FINAL}
    assert all(record["greedy"]["n"] == 8 and "weighted_vote" in record for record in found.values())
    rows = (workdir / "benchmarks/table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:5]] == ["base", "warmup", FINAL]


@pytest.mark.parametrize("devices", [8, 1])
def test_a_second_start_does_nothing(whole, monkeypatch, devices):
    """Not even on another number of devices, where other rows would be prefilled together."""
    fewer = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    monkeypatch.setattr(sharding, "make_mesh", fewer)
    monkeypatch.setattr(pictures, "_known", {})  # as in a new process
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    monkeypatch.setattr("mstar_jax.stages.policy.make_train_step", None)
    monkeypatch.setattr("mstar_jax.inference.rollouts.rollouts", None)
    monkeypatch.setattr(prm, "scores", None)
    records = run(small(), whole)
    assert records == json.loads((whole / "results.json").read_text())["stages"]
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert after == before


def test_a_damaged_reward_model_is_trained_again(whole, tmp_path):
    """From the labels that are there, though it has been reported on: the next iteration is scored by it."""
    shutil.copytree(whole, tmp_path / "run")
    [step] = [p for p in (tmp_path / "run" / "checkpoints" / "prm").iterdir() if p.name.isdigit()]
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    run(small(), tmp_path / "run")
    assert results(tmp_path / "run") == results(whole)
    one, two = arrays(tmp_path / "run", "prm"), arrays(whole, "prm")
    assert one.keys() == two.keys() and all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.parametrize("kept", [0, 5])  # of 8 records: none, or those up to the warm-up
def test_an_older_copy_of_the_results_is_refused(whole, tmp_path, kept):
    """Iteration 1 is not measured again, and the last one sampled at a temperature that they name."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    there = json.loads(path.read_text())
    stages = there["stages"][:kept]
    path.write_text(json.dumps(there | {"stages": stages, "digest": digest(stages)}))
    with pytest.raises(ValueError, match=r"results\.json: no record of iteration_01 \(validation\)"):
        run(small(), tmp_path / "run")


def stop_after(count):
    asked = iter(range(count))
    return lambda: next(asked, None) is None


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 14, 22, 26, 30])  # in base training, sampling, labels, scores, later
def test_a_stopped_run_continues(whole, tmp_path, count):
    with pytest.raises(generate.Stopped):
        run(small(), tmp_path, stop_after(count))
    run(small(), tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.fixture
def command():
    """Starts the main job in a process of its own, which compiles all of its programs itself."""
    begun = []

    def start(workdir, values=SMALL):
        line = [sys.executable, "-c", DRIVER, "--config=configs/tiny.py:smoke", f"--workdir={workdir}"]
        line += [f"--config.{k}={v}" for k, v in values.items()]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
        begun.append(subprocess.Popen(line, cwd=ROOT, env=env))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def kill_once(there, process):
    while not there():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def has_rows(curve, count):
    """Whether so many rows have been written: with `train.log_every` of 1, one a step."""
    return curve.exists() and len(curve.read_text().splitlines()) > count


def steps_saved(workdir, stage):
    folder = workdir / "checkpoints" / stage
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_gets_on_however_soon_it_is_killed(whole, tmp_path, command):
    """Each time once the second step after a start is done: by then the first one is on disk."""
    values = SMALL | {"train.log_every": 1, "train.save_every": 1000}
    saved = {"base": 0, "iteration_01": 0}
    for stage in ("base", "base", "base", "iteration_01", "iteration_01"):
        before, curve = saved[stage], tmp_path / "metrics" / f"{stage}.csv"
        curve.unlink(missing_ok=True)  # what it says next is of this start
        process = command(tmp_path, values)
        kill_once(functools.partial(has_rows, curve, 2), process)
        saved[stage] = steps_saved(tmp_path, stage)
        print(f"{stage}: killed after step {before + 2}; step {saved[stage]} is saved")
        # a start that has saved the last step of a stage before has got on as well
        assert saved[stage] > before or (stage == "iteration_01" and not before)
    assert saved["iteration_01"] > 0
    assert command(tmp_path, values).wait() == 0
    assert_same_run(tmp_path, whole, curves=False)


COIN = f"{ROOT}/tests/users_rewards.py:coin"
# Without a reward model there are fewer programs to compile.
PLAIN = SMALL | {"train.log_every": 1, "evolve.select": "random", "prm.queries": 0, "eval.test_at": ()}
# What a run does as it goes on after a kill: values, and when it is killed.
KILLED = {
    # pseudo-labelled rows by their weights, microbatches of one row, no clipping, worker processes
    "unlabelled": (
        {
            "data.workers": 2,
            "evolve.batch": 1,
            "evolve.unlabelled.mixin": 0.5,
            "evolve.unlabelled.threshold": 0.0,
            "train.clip": 0.0,
        },
        lambda workdir: has_rows(workdir / "metrics" / "iteration_02.csv", 1),
    ),
    # adapters; every iteration from the warm-up's parameters, with the moments and schedule of the last one
    "lora": (
        {"train.lora.rank": 4, "evolve.start": "warmup", "data.workers": 2},
        lambda workdir: has_rows(workdir / "metrics" / "iteration_02.csv", 1),
    ),
    # queries by what is known of them, and a user's reward that is right for half of all texts
    "informative": (
        {"reward": COIN, "evolve.curriculum": "informative", "evolve.remeasure": 0.2, "evolve.k": 4},
        lambda workdir: has_rows(workdir / "metrics" / "iteration_02.csv", 1),
    ),
    # a policy gradient, killed between its own reading of the rollouts and the warm-up's
    "grpo": (
        {
            "reward": COIN,
            "evolve.objective": "grpo",
            "evolve.kl": 0.1,
            "evolve.k": 4,
            "evolve.token_mean": False,
            "sampling.cache": "int8",
        },
        lambda workdir: list(workdir.glob("logprobs/iteration_02_reference/settings.json")),
    ),
    # no likelihood is above 1, so iterations train nothing; responses end at a line's end
    "nothing kept": (
        {"evolve.select": "likelihood", "evolve.threshold": 1.0, "sampling.stop_strings": ("\n",)},
        lambda workdir: list(workdir.glob("scores/iteration_01/*.jsonl")),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KILLED)
def test_kinds_of_runs_that_were_killed_continue(tmp_path, command, kind):
    """In a process of their own each time, with nothing compiled before; a shard that was cut meanwhile is
    sampled again."""
    changes, there = KILLED[kind]
    values = PLAIN | changes
    config = small()
    config.update_from_flattened_dict(values | {"data.workers": 0})
    config.lock()
    run(config, tmp_path / "whole")
    begun = time.monotonic()
    kill_once(lambda: there(tmp_path / "run"), command(tmp_path / "run", values))
    cut = sorted((tmp_path / "run" / "rollouts").glob("iteration_01/*.jsonl"))[0]
    cut.write_bytes(cut.read_bytes()[:-100])
    assert command(tmp_path / "run", values).wait() == 0
    print(f"{kind}: {time.monotonic() - begun:.0f} s with the kill")
    if kind == "informative":
        records = [record for record in results(tmp_path / "whole") if "curriculum" in record]
        assert [record["iteration"] for record in records] == [1, 2]
        assert [record["curriculum"]["groups"] for record in records] == [12, 12]
        assert 0 < records[0]["curriculum"]["informative"] <= 12 and records[1]["greedy_accuracy"] > 0
        assert records[1]["curriculum"]["asked"]["informative"] > 0
    final = results(tmp_path / "whole")[-1]
    assert (final["stage"], final["iteration"]) == ("iteration", 2)
    assert (final["kept"] == 0) == (kind == "nothing kept")
    assert (kind == "grpo") == ("kl" in final) == ("sampler_ess" in final)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_reward_that_fails_for_everything_is_survived_and_reported(tmp_path, caplog):
    config = small()
    config.reward = f"{ROOT}/tests/users_rewards.py:any_of"  # it knows no such text
    records = run(config, tmp_path)
    assert [(r["stage"], r["iteration"]) for r in records][-1] == ("iteration", 2)
    for record in records:
        for kind, found in record["reward_failed"].items():
            assert found["failed"] == found["responses"] > 0 and found["by_query"], (record["stage"], kind)
        sampled = record["split"] != "test" and record["stage"] != "base"
        assert ("sampled" in record["reward_failed"]) == sampled
        assert ("completions" in record["reward_failed"]) == (record["stage"] == "prm")
    assert "FAILS FOR EACH of the first 64 responses" in caplog.text
    assert (
        "iteration_02: reward " in caplog.text and "FAILED FOR EVERY ONE of its 24 responses" in caplog.text
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_continues(whole, tmp_path, command):
    process = command(tmp_path / "run")
    after = ("rollouts/base_validation", "rollouts/warmup", "labels/prm", "scores/prm_held_out")
    after += ("rollouts/iteration_01", "scores/iteration_01", "scores/iteration_01_validation")
    moment = np.random.default_rng().choice(after)
    print(f"killed once {moment} has a shard")
    while not list((tmp_path / "run" / moment).glob("*.jsonl")):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command(tmp_path / "run").wait() == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rest_em", "iterative_rft", "sft", "control"])
def test_variants(tmp_path, variant):
    config = small(variant)
    config.base.target, config.evolve.keep, config.prm.queries = 0.0, 1, 0
    records = run(config, tmp_path)
    assert [s["iteration"] for s in records if s["split"] == "validation"] == [0, 0, 1, 2]
    sampled = (tmp_path / "rollouts" / "iteration_01").exists()
    assert sampled == (variant in ("rest_em", "iterative_rft"))
    assert int(arrays(tmp_path)["step"]) == (3 if config.evolve.reset_schedule else 6)
    responses = {"sft": 12, "control": 24}.get(variant, 12)
    assert [s["kept"] for s in records if s["stage"] == "iteration"] == [responses] * 3
    assert run(config, tmp_path) == records


@pytest.mark.slow
@pytest.mark.parametrize("oracle", [False, True])
def test_unlabelled_queries_join(tmp_path, oracle):
    config = small()
    config.evolve.unlabelled.mixin, config.evolve.unlabelled.oracle = 0.5, oracle
    config.evolve.unlabelled.threshold = 0.0
    records = [s for s in run(config, tmp_path) if s["stage"] == "iteration" and s["split"] == "validation"]
    assert [("pseudo_coverage" in record) for record in records] == [False, True]  # half of the training is 1
    assert records[1]["pseudo_coverage"] == 1.0 if oracle else 0 <= records[1]["pseudo_precision"] <= 1
    assert (tmp_path / "rollouts" / "iteration_02_unlabelled").exists()
    assert (tmp_path / "scores" / "iteration_02_unlabelled_votes").exists() == (not oracle)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("own", [False, True])
def test_smoke(tmp_path, own):
    """Unchanged, with the true reward; and with the regular expression of docs/rewards.md."""
    line = [sys.executable, "-m", "mstar_jax.main", "--config=configs/tiny.py:smoke", f"--workdir={tmp_path}"]
    if own:
        page = (ROOT / "docs" / "rewards.md").read_text()
        (tmp_path / "reward.py").write_text(page.split("```python\n")[1].split("```")[0])
        line.append(f"--config.reward={tmp_path}/reward.py:grade")
    env = os.environ | {"XLA_FLAGS": ""}
    assert subprocess.run(line, cwd=ROOT, env=env).returncode == 0
    records = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [s["iteration"] for s in records if s["split"] == "validation"] == [0, 0, 1, 2]
    assert all(s["kept"] > 0 for s in records if s["stage"] not in ("base", "prm"))
    assert not any("reward_failed" in record for record in records)
    shards = sorted(tmp_path.glob("rollouts/iteration_*/*.jsonl"))
    found = [
        r for path in shards for text in path.read_text().splitlines() for r in json.loads(text)["responses"]
    ]
    assert found and all(("score" in r) == own for r in found)
    if own:
        assert all((r["score"] >= 0.5) == (r["verdict"] == "correct") for r in found)
    assert "Figure 3" in (tmp_path / "report" / "report.html").read_text()
