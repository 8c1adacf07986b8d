"""Several processes on this machine run one job: the same rollouts as one process, and they stop together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mstar_jax import processes, sharding
from tests.test_evolve import DRIVER, FINAL, ROOT, SMALL

DEVICES = 4


def test_one_process_is_free():
    assert processes.first()
    assert [processes.agree(asked) for asked in (True, False)] == [True, False]
    assert processes.shared(lambda number: b"x" * number, 3) == [b"", b"x", b"xx"]
    with processes.first_alone("x"):
        processes.barrier("x")
    tree = processes.fetch({"a": jax.numpy.ones((2, 3))})
    assert isinstance(tree["a"], np.ndarray)


def test_shares_are_the_rows_in_order():
    rows = list(range(12))
    for count in (1, 2, 3, 4):
        assert sum((sharding.Share((i,), count).rows(12) for i in range(count)), []) == rows
    share = sharding.Share((0, 3), 4)
    assert share.rows(8) == [0, 1, 6, 7] and share.whole(4) == 8
    with pytest.raises(ValueError, match="12 rows cannot be split into 5"):
        sharding.Share((0,), 5).rows(12)


def devices(order, per=2, slices=1):
    """Devices of other processes, `per` each, as a mesh would hold them."""
    return [
        types.SimpleNamespace(id=i, process_index=i // per, slice_index=i * slices // len(order))
        for i in order
    ]


def test_a_share_is_what_the_processes_devices_hold():
    def mesh(order, data, fsdp, tensor):
        array = np.empty(len(order), object)
        array[:] = devices(order)
        shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
        return types.SimpleNamespace(devices=array.reshape(data, fsdp, tensor), shape=shape)

    assert sharding.share_of(mesh(range(8), 2, 4, 1)) == sharding.Share((0, 1), 8)
    assert sharding.share_of(mesh((0, 4, 1, 5, 2, 6, 3, 7), 2, 4, 1)) == sharding.Share((0, 2), 8)
    assert sharding.share_of(mesh(range(8), 1, 4, 2)) == sharding.Share((0,), 4)
    assert sharding.share_of(mesh(range(8), 2, 1, 4)) == sharding.Share((0,), 2)  # shared with process 1
    assert sharding.share_of(mesh((0, 1), 1, 2, 1)) == sharding.Share()


def test_slices_lie_along_data(monkeypatch):
    laid = []

    def hybrid(within, across, devices):
        laid.append((within, across))
        return np.array(devices, object).reshape([a * b for a, b in zip(within, across)])

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", hybrid)
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: devices.shape)
    assert sharding.make_mesh(data=2, fsdp=-1, devices=devices(range(8), slices=2)) == (2, 4, 1)
    assert sharding.make_mesh(data=4, fsdp=1, tensor=2, devices=devices(range(8), slices=2)) == (4, 1, 2)
    assert laid == [((1, 4, 1), (2, 1, 1)), ((2, 1, 2), (2, 1, 1))]
    with pytest.raises(ValueError, match="mesh.data = 1 is impossible: the devices are in 2 slices"):
        sharding.make_mesh(data=1, fsdp=8, devices=devices(range(8), slices=2))


MIXED = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import Mesh
from mstar_jax import processes, sharding
order = np.array(jax.devices(), object)[[0, 2, 1, 3]]  # the processes take turns along the batch
mesh = Mesh(order.reshape(2, 2, 1), sharding.AXES)
share = sharding.share_of(mesh)
rows = np.arange(8)
placed = sharding.put_batch(rows[share.rows(8)], mesh)
assert processes.fetch(placed).tolist() == rows.tolist(), processes.fetch(placed)
assert share.rows(8) == ([0, 1, 4, 5], [2, 3, 6, 7])[jax.process_index()], share
made = []
for count in (0, 1, 5):
    want = [bytes([number]) * 3 * number for number in range(count)]
    found = processes.shared(lambda number: made.append(number) or bytes([number]) * 3 * number, count)
    assert found == want, found
assert made == ([0, 0, 2, 4], [1, 3])[jax.process_index()], made  # each item is made by one process
"""


def test_processes_take_turns_and_share_work():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", MIXED, f"localhost:{port}"]
    started = [subprocess.Popen([*command, str(i)], env=env, cwd=ROOT) for i in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]


def test_waiting_for_a_file_ends(monkeypatch):
    monkeypatch.setattr(processes, "LATE", 0.3)
    with pytest.raises(ValueError, match="on storage that all hosts share"):
        processes.visible(lambda: False, "x")


def test_a_half_described_cluster_is_refused():
    with pytest.raises(ValueError, match="must be given together"):
        processes.start("localhost:1", None, None)


# ---- whole jobs ---------------------------------------------------------------------------------------


MAIN = ["-c", DRIVER.replace("one = jax.devices()[:1]", "one = None")]


class Job:
    """A command on the shrunk tiny config, the main job or another one, in so many processes with four
    devices in all."""

    def __init__(
        self, count: int, workdir: pathlib.Path, program: Sequence[str] = MAIN, how: Sequence[str] = ()
    ):
        flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
        env = os.environ | {"XLA_FLAGS": flags + " --xla_backend_optimization_level=0"}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        values = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in SMALL.items()]
        self.processes, self.log = [], workdir.with_suffix(".log")
        for index in range(count):
            command = [sys.executable, *program, "--config=configs/tiny.py:smoke", *values, *how]
            command += [f"--workdir={workdir}", "--grace=100"]  # a busy machine compiles for long
            if count > 1:
                command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
                command += [f"--process_id={index}"]
            with open(self.log, "ab") as log:
                started = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
            self.processes.append(started)

    def ends(self, seconds: float = 280) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def sampled(workdir):
    """Every response's tokens and verdict."""
    found = {}
    for path in sorted(workdir.glob("rollouts/*/0*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:
            record = json.loads(line)
            shown = [(r["tokens"], r["verdict"]) for r in record["responses"]]
            found[path.parent.name, record["query"]] = shown
    return found


def parameters(workdir):
    [folder] = [p for p in (workdir / "checkpoints" / FINAL).iterdir() if p.name.isdigit()]
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata((folder / "state").absolute()).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore((folder / "state").absolute(), restore_args=how)
    return {name: value for name, value in state.items() if name.startswith("params")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert Job(1, workdir).ends() == [0]
    return workdir


def assert_as_alone(workdir, alone):
    assert sampled(workdir) == sampled(alone) and len(sampled(alone)) > 50
    mine, theirs = parameters(workdir), parameters(alone)
    for name, value in theirs.items():
        assert np.abs(mine[name] - value).max() <= 1e-3 * np.abs(value).max(), name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_do_what_one_does(count, alone, tmp_path):
    assert Job(count, tmp_path / "run").ends(500) == [0] * count
    assert_as_alone(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(alone, tmp_path):
    program = ["-m", "mstar_jax.evaluate", f"--checkpoint={alone}:warmup,{alone}", f"--prm={alone}"]
    program += ["--benchmarks=mathv360k", f"--root={alone / 'figures'}", "--samples=2"]
    how = ["--config.benchmarks.limit=8"]
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        job = Job(count, workdir, program, how)
        assert job.ends() == [0] * count, job.log.read_text()
        files = sorted((workdir / "benchmarks").rglob("*.jsonl"))
        found.append({path.relative_to(workdir): path.read_text() for path in files})
    assert found[0] == found[1] and len(found[0]) == 2 and all(found[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_told_to_end_takes_the_others_along(kind, alone, tmp_path):
    job = Job(2, tmp_path / "run")
    begun = time.monotonic()
    while not (tmp_path / "run/rollouts/warmup/00000.jsonl").exists() and time.monotonic() < begun + 200:
        time.sleep(0.1)
    job.processes[1].send_signal(kind)
    codes = job.ends(100)
    assert all(codes), codes  # none of them thinks that it is done
    if kind == signal.SIGTERM:
        assert codes == [143, 143]
    assert Job(2, tmp_path / "run").ends() == [0, 0]
    assert_as_alone(tmp_path / "run", alone)
