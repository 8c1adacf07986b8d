"""The launchers, with stand-ins for gcloud, docker, xpk, kubectl and SLURM that record their calls."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("gpu_host", "slurm", "tpu_pod", "gke")
ODD = [
    "--config.a=two words",
    '--config.b=it\'s "so"',
    "--config.c=$HOME `id` $(id) $$ \\ *",
    "--config.d=",
    "é;&|",
]
FLAGS = ["--config=configs/tiny.py", "--workdir=/mnt/runs/one", *ODD]
POD = ["--name=pod", "--type=v5litepod-16", "--zone=z", "--image=reg.example/m:1", "--volume=/mnt/runs"]
GKE = ["--name=job", "--cluster=c", "--zone=z", "--type=v5litepod-16", "--image=i"]
OPTIONS = {"gpu_host": [], "slurm": ["--name=job"], "tpu_pod": POD, "gke": GKE}

# A stand-in notes its words in `calls` and answers with the next line of a file named after what was asked;
# the last line stays. `gcloud ... ssh` runs what it was given, as a host's shell would.
FAKE = r"""#!/bin/bash
name=${0##*/}
printf '%s\x1f' "$name" "$@" >>"$FAKE/calls"; printf '\x1e' >>"$FAKE/calls"
next() {
  local file=$FAKE/$1
  if [ ! -f "$file" ]; then return; fi
  head -n 1 "$file"
  if [ "$(wc -l <"$file")" -gt 1 ]; then sed -i 1d "$file"; fi
}
case "$name $*" in
  "gcloud auth "*) exit 0 ;;
  gcloud*" describe "*)
    state=$(next states)
    if [ "$state" = ABSENT ]; then echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi
    echo "${state:-ACTIVE}" ;;
  gcloud*" ssh "*) for word; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
  sudo*) exec "$@" ;;
  findmnt*) [ -f "$FAKE/mount" ] && cat "$FAKE/mount" || echo /mnt ;;
  "docker inspect"*) [ -f "$FAKE/container" ] && cat "$FAKE/container" || exit 1 ;;
  "docker wait"*) code=$(next codes); echo "${code:-0}" ;;
  kubectl*) next jobset ;;
  squeue*) next queue ;;
  srun* | trainer*) code=$(next codes); exit "${code:-0}" ;;
esac
"""
PROGRAMS = ("gcloud", "sudo", "docker", "findmnt", "xpk", "kubectl")
PROGRAMS += ("sbatch", "squeue", "scontrol", "srun", "trainer")


class Place:
    """A folder of stand-ins that hides the real programs, and what was called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for program in PROGRAMS:
            path = folder / "bin" / program
            path.write_text(FAKE)
            path.chmod(0o755)
        unwanted = ("SLURM_", "MSTAR_", "XLA_", "JAX_", "NCCL_", "PYTHONUNBUFFERED")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
        self.env |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "PYTHON": "trainer",
        }
        self.env |= {"MSTAR_BACKOFF": "0", "HOME": str(folder)}

    def start(self, script, *words, **env):
        return subprocess.run(
            [LAUNCH / f"{script}.sh", *words],
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def answer(self, name, *lines):
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def calls(self, *begins):
        """Calls since the last time; with words, only those that begin with them."""
        path = self.folder / "calls"
        calls = [c.split("\x1f")[:-1] for c in path.read_text().split("\x1e")[:-1]] if path.exists() else []
        path.unlink(missing_ok=True)
        return [c for c in calls if c[: len(begins)] == list(begins)]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def words(line):
    """A line of shell as its words, read by bash itself."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(place, script):
    done = place.start(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"launch/{script}.sh" in done.stdout and "--dry_run" in done.stdout and "set -e" not in done.stdout
    source = (LAUNCH / f"{script}.sh").read_text()
    for option in re.findall(
        r"^    (--[a-z_]+)(?:=\*)?(?: \||\))", source, re.M
    ):  # every option is explained
        assert option == "--in_job" or option in done.stdout, option


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(place, script):
    done = place.start(script, *OPTIONS[script], "--dry_run", "--env=A=b c", "--", *FLAGS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not place.calls()
    # copied and pasted it is the same calls
    subprocess.run(["bash", "-ec", done.stdout], env=place.env, cwd=place.folder, check=True, timeout=60)
    pasted = place.calls()
    assert pasted
    if script == "slurm":
        (call,) = pasted
        assert call[0] == "sbatch" and call[call.index("--") + 1 :] == FLAGS and "--dry_run" not in call


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--nonsense=1", "--", *FLAGS], "unknown option --nonsense"),
        (["stray", "--", *FLAGS], "unknown option stray"),
        (["--env=A", "--", *FLAGS], "expected --env=NAME=VALUE"),
        (["--max_restarts=x", "--", *FLAGS], "expected a number"),
        (["--", "--workdir=/mnt/runs/one"], "no --config"),
        ([], "no --config"),
    ],
)
def test_refused(place, script, wrong, message):
    done = place.start(script, *OPTIONS[script], *wrong)
    assert done.returncode == 2 and message in done.stderr
    assert not place.calls()


@pytest.mark.parametrize("script", ["slurm", "tpu_pod", "gke"])
def test_missing(place, script):
    required = [o for o in OPTIONS[script] if not o.startswith("--volume")]
    for option in required:
        rest = [o for o in OPTIONS[script] if o != option]
        done = place.start(script, *rest, "--", *FLAGS)
        assert done.returncode == 2 and f"{option.partition('=')[0]}=... is missing" in done.stderr
    for flags, message in (
        ([FLAGS[0]], "no --workdir"),
        ([FLAGS[0], "--workdir=runs/one"], "expected an absolute path"),
    ):
        done = place.start(script, *OPTIONS[script], "--", *flags)
        assert done.returncode == 2 and message in done.stderr
    done = place.start(script, *OPTIONS[script], "--name=Not_good", "--", *FLAGS)
    assert done.returncode == 2 and "--name=Not_good" in done.stderr
    assert not place.calls()


# ---- one host ----------------------------------------------------------------------------------------


def test_host_arguments(place):
    assert place.start("gpu_host", "--env=A=b c", "--", *FLAGS).returncode == 0
    assert place.calls() == [["trainer", "-m", "mstar_jax.main", *FLAGS]]


@pytest.mark.parametrize(
    "codes, limit, starts, ends",
    [
        ([143, 143, 0], 20, 3, 0),  # preempted twice
        ([137, 0], 20, 2, 0),  # killed
        ([2, 0], 20, 1, 2),  # impossible
        ([143, 2], 20, 2, 2),
        ([1, 0], 20, 1, 1),  # an error at once
        ([143], 3, 4, 143),  # the cap
        ([143], 0, 1, 143),
    ],
)
def test_host_restarts(place, codes, limit, starts, ends):
    place.answer("codes", *codes)
    done = place.start("gpu_host", f"--max_restarts={limit}", "--", *FLAGS)
    assert done.returncode == ends, done.stderr
    assert len(place.calls("trainer")) == starts


def test_back_off(tmp_path):
    """A wait doubles up to 300 s; half an hour of work resets the count and the waits."""
    program = f"""
    . {LAUNCH}/common.sh
    backoff=100 max_restarts=3
    sleep() {{ echo "$1" >>{tmp_path}/slept; }}
    attempt() {{
      n=$((n + 1))
      if ((n == 3)); then SECONDS=$((SECONDS + 1800)); fi
      return 143
    }}
    n=0
    keep_going attempt || echo "$n $?"
    """
    done = subprocess.run(["bash", "-euc", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "6 143\n"
    assert (tmp_path / "slept").read_text().split() == ["100", "200", "100", "200", "300"]
    rule = (
        f". {LAUNCH}/common.sh; again 1 120 && again 1 9000 && again 75 0 && ! again 1 119 && ! again 3 9000"
    )
    assert subprocess.run(["bash", "-euc", rule], capture_output=True).returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_host_passes_the_signal_on(place, sent):
    """The run saves before the launcher is gone, and is not started again."""
    trainer = place.folder / "bin" / "trainer"
    trainer.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.2); pathlib.Path(here, 'saved').touch(); sys.exit(143)\n"
        f"here = {str(place.folder)!r}\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(here, 'begun').touch()\ntime.sleep(30)\n"
    )
    # a shell cannot trap what it was started to ignore, as jobs in the background are
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heard += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heard, LAUNCH / "gpu_host.sh", "--", *FLAGS],
        env=place.env,
        cwd=place.folder,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 20
    while not (place.folder / "begun").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=20) == 143
    assert (place.folder / "saved").exists()


def test_host_keeps_the_callers_environment(place):
    done = place.start("gpu_host", "--dry_run", "--env=JAX_PLATFORMS=cuda", "--", *FLAGS, XLA_FLAGS="--mine")
    assert "JAX_PLATFORMS=cuda " in done.stdout and "JAX_PLATFORMS=cuda,cpu" not in done.stdout
    assert "XLA_FLAGS" not in done.stdout
    done = place.start("gpu_host", "--dry_run", "--cpu", "--", *FLAGS)
    assert "JAX_PLATFORMS=cpu " in done.stdout and "XLA_" not in done.stdout


def test_xla_flags_exist(place):
    """XLA ends the process at a flag that it does not know, on every backend alike."""
    done = place.start("gpu_host", "--dry_run", "--", *FLAGS)
    (flags,) = [w.partition("=")[2] for w in words(done.stdout.splitlines()[1]) if w.startswith("XLA_FLAGS=")]
    readme = (LAUNCH / "README.md").read_text()
    flags = " ".join([flags, *(f"{f}=true" for f in re.findall(r"`(--xla_\w+)=true`", readme))])
    code = "import jax; jax.devices()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given},
            stderr=subprocess.PIPE,
            text=True,
        )
        for given in (flags, "--xla_gpu_there_is_no_such_flag=true")
    ]
    (_, known), (_, unknown) = [process.communicate(timeout=60) for process in started]
    assert started[0].returncode == 0, known
    assert started[1].returncode != 0 and "there_is_no_such_flag" in unknown


# ---- SLURM -------------------------------------------------------------------------------------------


def test_slurm_submits_once(place):
    options = ["--name=job", "--nodes=2", "--gpus=4", "--time=1:00:00", "--sbatch=--partition=a b"]
    assert place.start("slurm", *options, "--", *FLAGS).returncode == 0
    squeue, sbatch = place.calls()
    assert squeue[0] == "squeue" and "--name=job" in squeue
    for word in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=1:00:00",
        "--partition=a b",
    ):
        assert word in sbatch
    assert "--requeue" in sbatch and "--signal=TERM@120" in sbatch
    assert sbatch[sbatch.index("--") + 1 :] == FLAGS
    place.answer("queue", "17 RUNNING")
    done = place.start("slurm", *options, "--", *FLAGS)
    assert done.returncode == 0 and "17 RUNNING" in done.stderr
    assert not place.calls("sbatch")


@pytest.mark.parametrize(
    "code, state, count, requeued",
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),  # its time was over
        (143, "RUNNING", 100, False),  # the cap
        (143, "COMPLETING", 0, False),  # preempted: SLURM requeues; cancelled: it stays away
        (1, "RUNNING", 0, False),  # an error at once
        (137, "RUNNING", 3, True),
    ],
)
def test_slurm_requeues(place, code, state, count, requeued):
    """The job runs a copy of the script, elsewhere, as SLURM does."""
    place.answer("codes", code)
    place.answer("queue", state)
    copy = shutil.copy(LAUNCH / "slurm.sh", place.folder / "slurm_script")
    env = place.env | {"MSTAR_ROOT": str(ROOT), "SLURM_JOB_ID": "17"}
    if count:
        env["SLURM_RESTART_COUNT"] = str(count)
    command = [copy, "--in_job", "--name=job", "--cpus=3", "--", *FLAGS]
    done = subprocess.run(command, env=env, cwd=place.folder, capture_output=True, timeout=60)
    assert done.returncode == code
    calls = place.calls()
    assert (["scontrol", "requeue", "17"] in calls) == requeued
    (srun,) = [c for c in calls if c[0] == "srun"]
    assert srun[srun.index("trainer") :] == ["trainer", "-m", "mstar_jax.main", "--distributed", *FLAGS]
    assert "--cpus-per-task=3" in srun and "JAX_COMPILATION_CACHE_DIR=/mnt/runs/one.compiled" in srun


# ---- TPU slice ---------------------------------------------------------------------------------------


def verbs(calls):
    """What gcloud and docker were asked for."""
    found = []
    for call in calls:
        if call[0] == "gcloud" and call[3] == "queued-resources":
            found.append(call[4])
        elif call[0] == "docker":
            found.append(f"docker {call[1]}")
    return [v for v in found if v != "describe"]


RUN = ["docker inspect", "docker run", "docker logs", "docker wait"]


def test_pod_from_nothing(place):
    place.answer("states", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = place.start(
        "tpu_pod", *POD, "--spot", "--env=A=b c", "--delete", "--prepare=echo ready", "--", *FLAGS
    )
    assert done.returncode == 0, done.stderr
    assert "ready" in done.stdout
    calls = place.calls()
    assert verbs(calls) == ["create", *RUN, "delete"]
    (create,) = [c for c in calls if "create" in c]
    assert "--spot" in create and "--runtime-version=v2-alpha-tpuv5-lite" in create
    (run,) = [c for c in calls if c[:2] == ["docker", "run"]]
    assert run[run.index("reg.example/m:1") + 1 :] == ["--distributed", *FLAGS]  # through two shells
    assert "A=b c" in run and "type=bind,source=/mnt/runs,target=/mnt/runs" in run


def test_pod_goes_on_after_a_preemption(place):
    place.answer("states", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ABSENT", "ACTIVE")
    place.answer("codes", 143, 0)
    done = place.start("tpu_pod", *POD, "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert verbs(place.calls()) == [*RUN, "delete", "create", *RUN]
    assert "still there, and costs" in done.stderr and "queued-resources delete pod" in done.stderr


@pytest.mark.parametrize(
    "codes, runs, ends",
    [([2], 1, 2), ([1], 1, 1), ([143], 3, 143), ([255], 3, 75), ([134, 0], 2, 0)],
)
def test_pod_restarts(place, codes, runs, ends):
    place.answer("codes", *codes)
    done = place.start("tpu_pod", *POD, "--max_restarts=2", "--", *FLAGS)
    assert done.returncode == ends, done.stderr
    assert verbs(place.calls()).count("docker run") == runs


def test_pod_follows_what_runs(place):
    place.answer("container", "running")
    done = place.start("tpu_pod", *POD, "--", *FLAGS)
    assert done.returncode == 0 and "pod runs already" in done.stdout
    assert "docker run" not in verbs(place.calls())
    place.answer("container", "exited")
    place.start("tpu_pod", *POD, "--", *FLAGS)
    assert verbs(place.calls()) == ["docker inspect", "docker rm", *RUN[1:]]


def test_pod_refuses_storage_that_vanishes(place):
    done = place.start("tpu_pod", *POD, "--", FLAGS[0], "--workdir=/mnt/runsother/one")
    assert done.returncode == 2 and "lies in no --volume" in done.stderr and not place.calls()
    place.answer("mount", "/")
    done = place.start("tpu_pod", *POD, "--", *FLAGS)
    assert done.returncode == 1 and "on its own disk" in done.stderr
    assert "docker run" not in verbs(place.calls())


def test_pod_without_a_slice(place):
    place.answer("states", "ABSENT", "FAILED")
    done = place.start("tpu_pod", *POD, "--", *FLAGS)
    assert done.returncode == 2 and "the request failed" in done.stderr
    assert verbs(place.calls()) == ["create"]


def test_pod_stop(place):
    assert place.start("tpu_pod", "--name=pod", "--zone=z", "--stop").returncode == 0
    assert place.calls("docker") == [["docker", "stop", "-t", "60", "pod"]]


# ---- GKE ---------------------------------------------------------------------------------------------


def kubernetes(text):
    """A pod's command as Kubernetes reads it: $$ is $, and $(NAME) a variable of the container."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else "EXPANDED", text)


@pytest.mark.parametrize(
    "found, asked",
    [("", ["create"]), ("job:", []), ("job:Completed", []), ("job:Failed", ["delete", "create"])],
)
def test_gke(place, found, asked):
    place.answer("jobset", found)
    done = place.start("gke", *GKE, "--storage=runs", "--xpk=--spot", "--env=A=b c", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    calls = place.calls("xpk")
    assert [c[2] for c in calls] == ["list", *asked]
    if not asked:
        assert "job is done" in done.stderr or "job is there already" in done.stderr
        return
    create = calls[-1]
    for word in (
        "--storage=runs",
        "--spot",
        "--restart-on-exit-codes=1",
        "--max-restarts=20",
        "--num-slices=1",
    ):
        assert word in create
    (command,) = [w.removeprefix("--command=") for w in create if w.startswith("--command=")]
    exec_, env, *rest = words(kubernetes(command))
    assert (exec_, env) == ("exec", "env") and "A=b c" in rest and "\n" not in command
    assert rest[rest.index("python") :] == ["python", "-m", "mstar_jax.main", "--distributed", *FLAGS]


def test_gke_refuses_line_breaks(place):
    done = place.start("gke", *GKE, "--", *FLAGS, "--config.a=1\n2")
    assert done.returncode == 2 and "line break" in done.stderr and not place.calls()


def test_gke_stop(place):
    assert place.start("gke", "--name=job", "--cluster=c", "--zone=z", "--stop").returncode == 0
    assert [c[:3] for c in place.calls()] == [["xpk", "workload", "delete"]]


# ---- image -------------------------------------------------------------------------------------------


def test_dockerfile():
    """What it copies is in the checkout and in the build's context, and SIGTERM reaches Python."""
    text = (LAUNCH / "Dockerfile").read_text()
    kept = {
        line[1:]
        for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]]
    assert copied and all((ROOT / c).exists() and c.partition("/")[0] in kept for c in copied)
    assert 'ENTRYPOINT ["python", "-m", "mstar_jax.main"]' in text
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in ("cuda12", "tpu"):
        assert re.search(rf"^{extra} = ", pyproject, re.M) and extra in text
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")


def test_readme_names_what_there_is(place):
    readme = (LAUNCH / "README.md").read_text()
    for name in re.findall(r"launch/(\w+\.?\w*)", readme):
        assert (LAUNCH / name).exists(), name
    for block in re.findall(r"```bash\n(.*?)```", readme, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("launch/"):
                script, *options = shlex.split(line, comments=True)
                options.insert(options.index("--"), "--dry_run")
                done = place.start(pathlib.Path(script).stem, *options)
                assert done.returncode == 0, (line, done.stderr)
    assert not place.calls()
