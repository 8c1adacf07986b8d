"""How commands are stopped: by a signal, by two, and by their time."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# a stage that saves between two batches, or a compiler that does not return
COMMAND = """
import logging, signal, sys, time
# as at a terminal, however the tests were started
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from mstar_jax import cli
from mstar_jax.inference.generate import Stopped, check_stop
cli.show_log()
stop = cli.Termination(float(sys.argv[1])).asked.is_set
with cli.explained():
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    time.sleep(0.5)
    print("begun", flush=True)
    if sys.argv[2] == "polls":
        while True:
            check_stop(stop, "warmup")
            time.sleep(0.01)
    time.sleep(600)
"""


def begin(grace, kind, *more, **settings):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(grace), kind, *more],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_an_unknown_key_of_the_config_is_one_line(tmp_path):
    command = [sys.executable, "-m", "mstar_jax.main", "--config=configs/tiny.py", "--config.evolve.kk=3"]
    ended = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and not (tmp_path / "run").exists()
    assert ended.stderr == "error: --config.evolve.kk=3: the config has no key 'kk'; base.py lists all\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_one_line(sent):
    process = begin(60, "polls")
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == "warmup: stopped. Start the same command again to continue.\n"


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,  # all three have one handler, as the test above shows
        *(pytest.param(sent, marks=pytest.mark.slow) for sent in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_the_process_is_gone_within_its_time(sent):
    process = begin(0.5, "compiles")
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in said


def test_ctrl_c_at_a_terminal_leaves_child_processes_alone():
    """It goes to all of them; one that loads data, or compares answers, is still needed to save."""
    process = begin(60, "polls", start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said == "warmup: stopped. Start the same command again to continue.\n"


def test_a_second_ctrl_c_leaves_at_once():
    process = begin(600, "compiles")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said


def test_under_nohup_a_closed_terminal_ends_nothing():
    process = begin(60, "polls", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from mstar_jax import cli
hits = []
def listen(event, **_):
    hits.extend([event] if event.endswith("cache_hits") else [])
jax.monitoring.register_event_listener(listen)
cli.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # this program is small
print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((64, 64)))[0, 0], jax.config.jax_compilation_cache_dir)
print(len(hits))
"""


def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
    def run(**settings):
        env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "user")} | settings
        found = subprocess.run([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
        assert found.returncode == 0
        (value, folder), (hits,) = (line.split() for line in found.stdout.splitlines())
        return value, folder, int(hits)

    on = {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    value, folder, hits = run(**on)
    assert folder.startswith(str(tmp_path / "user" / "mstar_jax")) and hits == 0
    assert run(**on)[::2] == (value, len([*pathlib.Path(folder).glob("*-cache")])) and any(
        pathlib.Path(folder).iterdir()
    )
    assert run()[2] == 0  # turned off, as in all other tests
    own = str(tmp_path / "own")
    assert run(JAX_COMPILATION_CACHE_DIR=own, **on)[1:] == (own, 0)
