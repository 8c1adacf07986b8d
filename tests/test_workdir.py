"""Whose a workdir is: other values, other inputs and a second process are refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import PIL.Image
import pytest

from configs import tiny as tiny_config
from mstar_jax import configure, finished, records, sharding, sources, workdir
from mstar_jax.stages import run
from mstar_jax.structs import Query, Stage
from mstar_jax.training import curves

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLD = """
import pathlib, sys, time
from mstar_jax import workdir
workdir.lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_claim(tmp_path):
    config = {"seed": 0, "base": {"steps": 10, "mix": [1, 2]}, "old": 1}
    assert workdir.claim(tmp_path / "runs" / "one", config)
    assert not workdir.claim(tmp_path / "runs" / "one", config)  # the same values are accepted
    assert json.loads((tmp_path / "runs" / "one" / "config.json").read_text()) == config
    changed = {"seed": 0, "base": {"steps": 12, "mix": [1, 3]}, "new": "x"}
    with pytest.raises(ValueError) as error:
        workdir.claim(tmp_path / "runs" / "one", changed)
    text = str(error.value)
    for part in ("base.steps: 10 there, 12 now", "base.mix: [1, 2] there, [1, 3] now"):
        assert part in text
    assert "old: 1 there, None now" in text and "new: None there, x now" in text and "seed" not in text


def test_values_that_cannot_change_results_may_differ(tmp_path):
    config = {"seed": 0, "train": {"accumulate": 1, "remat": "full"}, "eval": {"show": 5}}
    config |= {"mesh": {"fsdp": -1, "tensor": 2}}
    workdir.claim(tmp_path, config)
    config = {"seed": 0, "train": {"accumulate": 2, "remat": "none"}, "eval": {"show": 0}}
    config |= {"mesh": {"fsdp": -1, "tensor": 1}}  # another machine
    workdir.claim(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    with pytest.raises(ValueError, match=r"other values \(seed: 0 there, 1 now\)"):
        workdir.claim(tmp_path, config | {"seed": 1, "eval": {"show": 9}})


def test_a_cut_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, "ba')
    with pytest.raises(ValueError, match=r"config\.json: damaged, not valid JSON"):
        workdir.claim(tmp_path, {"seed": 0})


def holder(folder):
    """Another process that holds a workdir."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_process_at_a_time(tmp_path):
    """The second is told who holds it; a process that was killed holds nothing."""
    process = holder(tmp_path)
    try:
        owner = f"in use by process {process.pid} on {socket.gethostname()}: "
        for _ in range(2):
            with pytest.raises(OSError, match=owner):
                workdir.lock(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    workdir.lock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


# ---- inputs -------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Queries with images of their own."""
    found = []
    for i in range(6):
        path = tmp_path / "run" / "figures" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * 200_000)
        found.append(Query(f"q{i}", (str(path),), f"Question {i}?", answer=str(i)))
    return found


def check(folder, queries):
    workdir.check_inputs(folder, {"data, labelled": workdir.of_queries(queries, folder)})


def replaced(queries, at, **values):
    return [dataclasses.replace(q, **values) if i == at else q for i, q in enumerate(queries)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q[:4], r"queries \(6 there, 4 now\), ids or their order"),
        (lambda q: q[::-1], "labelled: ids or their order"),
        (lambda q: replaced(q, 2, answer="7"), "labelled: gold answers[.]"),
        (lambda q: replaced(q, 2, question="Else?"), "labelled: questions[.]"),
        (lambda q: replaced(q, 2, options=("a", "b")), "labelled: questions[.]"),
        (lambda q: replaced(q, 2, images=q[1].images), "labelled: which images, contents of images"),
    ],
)
def test_other_data_is_refused_by_what_changed(tmp_path, data, change, said):
    folder = tmp_path / "run"
    check(folder, data)
    check(folder, data)
    before = (folder / "inputs.json").read_bytes()
    with pytest.raises(ValueError, match=said):
        check(folder, change(data))
    assert (folder / "inputs.json").read_bytes() == before
    (folder / "inputs.json").unlink()  # as the message says
    check(folder, change(data))


def test_another_picture_of_the_same_name_is_refused(tmp_path, data):
    check(tmp_path / "run", data)
    pathlib.Path(data[3].images[0]).write_bytes(b"\1" * 200_000)
    with pytest.raises(ValueError, match="labelled: contents of images[.]"):
        check(tmp_path / "run", data)


def test_a_copied_run_has_the_same_inputs(tmp_path, data):
    check(tmp_path / "run", data)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    moved = [
        dataclasses.replace(q, images=tuple(i.replace("/run/", "/copy/") for i in q.images)) for q in data
    ]
    check(tmp_path / "copy", moved)


def test_a_checkpoint_that_was_replaced_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(10_000_000))
    inputs = {"policy.path": workdir.of_checkpoint(folder)}
    workdir.check_inputs(tmp_path, inputs)
    os.utime(folder / "model.safetensors", (0, 0))  # fetched again, it is the same
    workdir.check_inputs(tmp_path, {"policy.path": workdir.of_checkpoint(folder)})
    (folder / "model.safetensors").write_bytes(bytes([1]) * 10_000_000)
    with pytest.raises(ValueError, match="its start: policy.path: model.safetensors[.]"):
        workdir.check_inputs(tmp_path, {"policy.path": workdir.of_checkpoint(folder)})


FIGURES = {"train": 6, "unlabelled": 6, "validation": 4, "test": 4}
FIGURES |= {"captions": 6, "arithmetic": 6, "instruct": 6}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A config of a policy from scratch on the embedded data, and a workdir in which it has begun."""
    config = tiny_config.get_config("smoke")
    config.update_from_flattened_dict({f"data.figures.{key}": value for key, value in FIGURES.items()})
    folder = tmp_path_factory.mktemp("begun") / "run"
    run.start(config, folder, {}, lambda: False)
    return config, folder


def test_a_reward_that_changed_is_refused(begun, tmp_path):
    config, folder = begun
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "inputs.json").unlink()
    path = tmp_path / "own.py"
    path.write_text("def grade(query, text):\n    return 1\n")
    config = config.copy_and_resolve_references()
    config.reward = f"{path}:grade"
    found = run.start(config, tmp_path / "copy", {}, lambda: False)
    assert found.grading.identity["reward"]["function"] == "grade"
    run.start(config, tmp_path / "copy", {}, lambda: False)
    path.write_text("def grade(query, text):\n    return 0\n")
    with pytest.raises(ValueError, match="changed since its start: reward: own.py[.]"):
        run.start(config, tmp_path / "copy", {}, lambda: False)
    path.unlink()
    with pytest.raises(ValueError, match="there is no file .*own.py to load the function 'grade' from"):
        run.start(config, tmp_path / "copy", {}, lambda: False)


def other_text(key):
    def change(path):
        lines = path.read_text().splitlines()
        lines[3] = json.dumps(json.loads(lines[3]) | {key: "7"})
        path.write_text("\n".join(lines) + "\n")

    return change


def other_answer(path):
    rows = json.loads(path.read_text())
    rows[2]["conversations"][1]["value"] = "The answer is 17"
    path.write_text(json.dumps(rows))


def other_ids(path):
    """Two tokens change places."""
    found = json.loads(path.read_text())
    ids = found["model"]["vocab"]
    one, two = list(ids)[300:302]
    ids[one], ids[two] = ids[two], ids[one]
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("figures/base.jsonl", other_text("response"), "data, base: responses[.]"),
        ("figures/base.jsonl", other_text("question"), "data, base: questions[.]"),
        ("figures/truth.jsonl", other_text("answer"), r"data, truth: truth\.jsonl[.]"),
        ("figures/truth.jsonl", pathlib.Path.unlink, r"data, truth: truth\.jsonl[.]"),
        ("figures/unlabelled.json", other_answer, "data, unlabelled: hidden answers[.]"),
        (
            "figures/validation.json",
            other_answer,
            "data, validation: gold answers; data, base_val",
        ),
        ("tokenizer/tokenizer.json", other_ids, r"tokenizer: tokenizer\.json[.]"),
    ],
)
def test_what_a_run_has_made_itself_may_not_change_either(begun, tmp_path, name, change, said):
    """The narrow data, what measures it, and the tokenizer, between two starts."""
    config, folder = begun
    shutil.copytree(folder, tmp_path / "copy")
    run.start(config, tmp_path / "copy", {}, lambda: False)
    change(tmp_path / "copy" / name)
    with pytest.raises(ValueError, match=f"changed since its start: {said}"):
        run.start(config, tmp_path / "copy", {}, lambda: False)


def test_a_run_is_read_with_the_tokenizer_that_it_began_with(begun, tmp_path):
    """By export, say: with other ids its parameters would mean something else."""
    config, folder = begun
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(config.to_json_best_effort())
    finished.policy_of(tmp_path / "copy")
    other_ids(tmp_path / "copy" / "tokenizer" / "tokenizer.json")
    with pytest.raises(ValueError, match="copy/tokenizer has changed since .*copy was begun with it"):
        finished.policy_of(tmp_path / "copy")


def test_cut_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text('{"config": {')
    with pytest.raises(ValueError, match=r"results\.json: damaged, not valid JSON"):
        records.Results(tmp_path, {})


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run is a file, not a folder: name another --workdir"):
        workdir.lock(tmp_path / "run")


def test_fewer_queries_than_asked_for_are_a_warning(tmp_path, caplog):
    turns = [
        [{"from": "human", "value": f"What is {i} + 1?"}, {"from": "gpt", "value": f"{i}"}] for i in range(16)
    ]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    config = tiny_config.get_config("smoke")
    with config.unlocked():
        config.policy.path = "/elsewhere"
        config.data.labelled = str(tmp_path / "d.json")
        config.data.validation, config.data.test = 2, 9
    data = sources.load_data(config, tmp_path)
    assert (len(data.validation), len(data.test)) == (2, 4)
    text = "data.test: 4 queries instead of 9, for it is at most one quarter of the 16 usable rows"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [text]


def test_files_of_ones_own_are_measured_on(tmp_path, caplog):
    """What shows their images is not trained on, and the rest is labelled. Files may have the same ids."""
    for name in "abcdef":
        PIL.Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")

    def write(file, images):
        rows = [
            {"id": str(at), "image": f"{name}.png", "question": f"<image>{file} {at}?", "answer": "3"}
            for at, name in enumerate(images)
        ]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / file)

    config = tiny_config.get_config("smoke")
    config.policy.path = "/elsewhere"
    config.data.update(
        {
            "labelled": write("train.jsonl", "aabbccddeeff"),
            "validation_file": write("val.jsonl", "ba"),
            "test_file": write("test.jsonl", "bbcc"),
            "labelled_share": 1.0,
            "validation": 5,
            "test": 3,
        }
    )
    for file, ids in (("train.jsonl", ("x", "y")), ("val.jsonl", ("x",))):  # without an image
        with (tmp_path / file).open("a") as lines:
            lines.writelines(json.dumps({"id": i, "question": f"{i}?", "answer": "1"}) + "\n" for i in ids)
    data = sources.load_data(config, tmp_path)
    assert [query.id for query in data.validation] == [
        "validation_1",
        "validation_x",
    ]  # b is shown by the test
    assert len(data.test) == 3 and {q.id for q in data.test} < {f"test_{n}" for n in range(4)}
    names = [os.path.basename(q.images[0]) if q.images else q.id for q in data.labelled]
    assert sorted(names) == ["d.png", "d.png", "e.png", "e.png", "f.png", "f.png", "y"]
    assert not data.unlabelled
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    config.data.labelled_share = 0.5
    halves = sources.load_data(config, tmp_path)
    assert 2 <= len(halves.labelled) <= 5 and len(halves.labelled) + len(halves.unlabelled) == 7
    config.data.labelled = ""
    with pytest.raises(ValueError, match="data.test_file = .*: needs data.labelled"):
        configure.check(config, sharding.make_mesh())


def test_long_answers_are_read_for_a_reward_of_the_users(tmp_path):
    turns = [
        [
            {"from": "human", "value": f"Why {i}?"},
            {"from": "gpt", "value": f"It is because {i} is an odd number"},
        ]
        for i in range(16)
    ]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    config = tiny_config.get_config("smoke")
    config.policy.path, config.data.labelled = "/elsewhere", str(tmp_path / "d.json")
    for reward in ("", "format"):  # both compare
        config.reward = reward
        with pytest.raises(ValueError, match="no usable row"):
            sources.load_data(config, tmp_path)
    config.reward = "own.py:grade"
    data = sources.load_data(config, tmp_path)
    assert sum(map(len, (data.labelled, data.unlabelled, data.validation, data.test))) == 16


def test_curves_lose_doubled_and_cut_rows(tmp_path):
    """As two runs in one workdir left them; and a row of step 200 that was cut is none of step 20."""
    (tmp_path / "metrics").mkdir()
    path = tmp_path / "metrics" / "base.csv"
    steps = (10, 20, 10, 30, 20, 40)
    rows = [f"{step},{step / 8},0.5,1,9,0.1" for step in steps]
    path.write_text("\n".join([",".join(curves.StageLog.FIELDS), *rows, "20"]))
    curves.StageLog(tmp_path, Stage.base, 30).close()
    assert path.read_text().splitlines()[1:] == [rows[0], rows[1], rows[3]]


def test_a_run_that_lost_its_tokenizer_is_not_given_a_new_one(tmp_path):
    config = tiny_config.get_config("smoke")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: the run's tokenizer is not there; restore it"):
        configure.make_policy(config, tmp_path)
    assert not (tmp_path / "tokenizer").exists()


def curve(*steps):
    rows = [f"{step},1.5,0.5,2.0,64,0.001" for step in steps]
    return "\n".join(["step,loss,accuracy,grad_norm,tokens,learning_rate", *rows]) + "\n"


@pytest.mark.parametrize(
    ("text", "start", "pending", "ends"),
    [
        (curve(10, 20), 20, 0, None),
        (curve(10, 20), 23, 3, None),
        (curve(10, 20, 30), 23, 3, None),  # a later row, which is written again
        (curve(), 3, 3, None),
        (curve(10), 20, 0, (10, 20)),
        (curve(10, 20)[:-9], 23, 3, (10, 20)),  # cut within a row
        ("", 23, 3, (0, 20)),
    ],
)
def test_rows_that_a_curve_has_lost_are_named(tmp_path, caplog, text, start, pending, ends):
    path = tmp_path / "metrics" / "base.csv"
    path.parent.mkdir()
    path.write_text(text)
    sums = {name: [1.0 * pending, pending] for name in curves.MEANS} if pending else {}
    curves.StageLog(tmp_path, Stage.base, start, sums).close()
    said = [f"{path}: ends at step {ends[0]}, not {ends[1]}; the rows between are lost"] if ends else []
    assert caplog.messages == said
    assert all(row.count(",") == 5 for row in path.read_text().splitlines())
