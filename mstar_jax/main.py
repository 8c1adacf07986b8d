"""The main job: `python -m mstar_jax.main --config=configs/tiny.py [--workdir=...] [--config.seed=1]`."""

import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from mstar_jax import __version__, cli, configure, evolve, processes, ranges, records, sharding
from mstar_jax.cli import CONFIG, WORKDIR
from mstar_jax.evaluate import evaluation
from mstar_jax.profiling import speed
from mstar_jax.report import page, trackers
from mstar_jax.training.checkpoint import Damaged
from mstar_jax.workdir import claim, lock, unclaim

flags.adopt_module_key_flags(cli)
log = logging.getLogger("mstar_jax")


def head(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What results.json says before its stages: config, seed, versions, device."""
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


def run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, top: dict[str, Any], stop: Callable[[], bool]
) -> list[records.Record]:
    """Runs all stages, again where a checkpoint was damaged: every step is idempotent."""
    while True:
        try:
            return evolve.evolve(config, workdir, top, stop)
        except Damaged as error:  # each time one checkpoint is set aside, so this ends
            if jax.process_count() > 1:  # the others may have read theirs
                raise
            log.warning("%s", error)


def report(workdir: pathlib.Path) -> pathlib.Path | None:
    """Writes the report; None where it could not be written: the run is complete without it."""
    try:
        return page.write([workdir])
    except OSError as error:
        log.warning("no report was written (%s); python -m mstar_jax.report %s", error, workdir)
        return None


def main(argv: list[str]) -> None:
    stop = cli.start(argv)
    started = time.monotonic()
    compiled = speed.compiled()
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value or _default_workdir())
    with cli.explained():
        cli.begin()
        top = head(config)
        mesh = sharding.make_mesh(**config.mesh)
        jax.set_mesh(mesh)
        # before the workdir is claimed
        ranges.refuse([*configure.problems(config, mesh), *evaluation.problems(config)])
        lock(workdir)
        with processes.first_alone("claim"):
            new = claim(workdir, top["config"])
        log.info("workdir %s, %d %s device(s)", workdir, jax.device_count(), jax.devices()[0].platform)
        with trackers.following(config.tracker if processes.first() else "", workdir):
            try:
                found = run(config, workdir, top, stop)
            except ValueError:
                if new:
                    unclaim(workdir)
                raise
            made = report(workdir) if processes.first() else None
    spent = time.monotonic() - started
    log.info("%d programs compiled in %.0f s, of %.0f s in all", len(compiled), sum(compiled), spent)
    if not processes.first():
        return
    inside = "results.json, samples/, metrics/, tensorboard/, rollouts/"
    asked = sorted((workdir / "benchmarks").glob("*.md")) if config.benchmarks.names else []
    tables = [path.read_text().strip() for path in asked]
    shown = [records.table(found), records.shown_best(found), records.speeds(found), *tables]
    print("\n" + "\n\n".join([*filter(None, shown), f"{workdir.absolute()}: {inside}"]))
    if made:
        print(f"{made}: the report, one file for any browser")


def _default_workdir() -> str:
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return os.path.join("runs", pathlib.Path(path).stem + (f"_{variant}" if variant else ""))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.main(main)
