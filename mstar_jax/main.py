"""The main job: `python -m mstar_jax.main --config=configs/tiny.py [--workdir=...] [--config.seed=1]`."""

import json
import logging
import os
import pathlib
import platform
import signal
import sys
import threading
import time
from typing import Any

import absl.logging
import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from mstar_jax import __version__, evolve, inference, metrics, processes, report, setup, sharding, speed
from mstar_jax.store import write_text

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's values.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; default runs/<config>.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; on TPU pods, GKE and SLURM they find each other."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where nothing tells.")
COUNT = flags.DEFINE_integer("num_processes", None, "How many there are, where nothing tells.")
INDEX = flags.DEFINE_integer("process_id", None, "Which one this is, where nothing tells.")
GRACE = flags.DEFINE_float("grace", 8.0, "Seconds from SIGTERM until the process is gone, saved or not.")

log = logging.getLogger("mstar_jax")


class Termination:
    """Turns SIGTERM into a question that the stages ask; a second thread keeps the promised time.

    A compiler or a long device batch cannot be interrupted, so after the grace period the process leaves
    as it is: everything on disk is whole, and a restart ends the same.
    """

    def __init__(self, grace: float):
        self.asked = threading.Event()
        self.grace = grace
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: self.asked.set())
        # Python runs a handler between two of its own instructions, which can be long in coming; the
        # byte on the pipe is written at once
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader: int) -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        self.asked.set()
        time.sleep(self.grace)
        os._exit(143)


def head(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What results.json says above its stages."""
    import flax
    import optax
    import orbax.checkpoint as ocp

    device = jax.devices()[0]
    versions = {"mstar_jax": __version__, "python": platform.python_version()}
    versions |= {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": ocp.__version__,
    }
    return {
        "config": json.loads(config.to_json_best_effort()),
        "seed": config.seed,
        "versions": versions,
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
    }


def claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes the config into a new workdir; refuses one that holds a run with other values.

    Raises:
      ValueError: with every value that differs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if path.exists():
        changed = [
            f"{k}: {a} there, {b} now" for k, a, b in _differences(json.loads(path.read_text()), config)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other values ({'; '.join(changed)}). "
                "Name another --workdir, or remove that one."
            )
    else:
        write_text(path, json.dumps(config, indent=1))


def _differences(there: Any, now: Any, name: str = ""):
    if isinstance(there, dict) and isinstance(now, dict):
        for key in there | now:
            yield from _differences(there.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif there != now:
        yield name, there, now


def begin() -> None:
    """Joins the other processes, if there are any; only process 0 says how things go."""
    if DISTRIBUTED.value or COORDINATOR.value:
        processes.start(COORDINATOR.value, COUNT.value, INDEX.value)
    log.setLevel(logging.INFO if processes.first() else logging.WARNING)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    absl.logging.set_verbosity(absl.logging.WARNING)  # JAX and Orbax report through absl
    log.addHandler(metrics.ProgressHandler())
    log.propagate = False
    termination = Termination(GRACE.value)
    compiled, config, started = speed.compiled(), CONFIG.value, time.time()
    workdir = pathlib.Path(WORKDIR.value or _default_workdir())
    try:
        begin()
        top = head(config)
        mesh = sharding.make_mesh(**config.mesh)
        jax.set_mesh(mesh)
        setup.check(config, mesh)  # an impossible run claims no workdir
        with processes.first_alone("claim"):
            claim(workdir, top["config"])
        log.info("workdir %s, %d %s device(s)", workdir, jax.device_count(), jax.devices()[0].platform)
        records = evolve.run(config, workdir, top, termination.asked.is_set)
    except inference.Stopped as stopped:
        log.warning("%s. Start the same command again to go on.", stopped)
        sys.exit(143)
    except ValueError as error:
        if os.environ.get("MSTAR_TRACEBACK"):
            raise
        log.error("error: %s", error)
        sys.exit(2)
    spent = time.time() - started
    log.info("%d programs compiled in %.0f s, of %.0f s in all", len(compiled), sum(compiled), spent)
    if not processes.first():
        return
    inside = "results.json, samples/, metrics/, tensorboard/, rollouts/"
    asked = workdir / "benchmarks" / "table.md" if config.benchmarks.names else None
    shown = [metrics.table(records), metrics.speeds(records), asked.read_text().strip() if asked else ""]
    print("\n" + "\n\n".join([*filter(None, shown), f"{workdir.absolute()}: {inside}"]))
    try:
        print(f"{report.write([workdir])}: the report, one file for any browser")
    except OSError as error:  # the run is whole without it
        log.warning("no report was written (%s); python -m mstar_jax.report %s", error, workdir)


def _default_workdir() -> str:
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return os.path.join("runs", pathlib.Path(path).stem + (f"_{variant}" if variant else ""))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main)
