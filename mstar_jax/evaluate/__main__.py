"""Benchmarks of one or several policies.

    python -m mstar_jax.evaluate --config=configs/phi35.py --root=/data/benchmarks \
        --checkpoint=/checkpoints/Phi-3.5-vision-instruct,runs/phi35:warmup,runs/phi35 \
        --benchmarks=mathvista,m3cot,mmstar_r,mmbench_r,ai2d [--prm=runs/phi35 --samples=16]

A checkpoint is a folder in one of the three families' official format, or a run of mstar_jax.main, its last
policy or `:stage`. The first is what the others are compared with. A reward model is a run's, or a folder
that `export --stage=prm` wrote. Started again, nothing is asked twice.

`--root` holds the official files, in a folder for each benchmark or all together: see `benchmarks.py`.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags

from mstar_jax import cli, configure, export, models, processes, sharding
from mstar_jax.cli import CONFIG, WORKDIR
from mstar_jax.evaluate import benchmarks
from mstar_jax.evaluate.evaluation import Evaluation, Policy, Voter, identity
from mstar_jax.inference import sampler
from mstar_jax.inference.generate import Generator
from mstar_jax.inference.score import Scorer

CHECKPOINTS = flags.DEFINE_list("checkpoint", None, "Folders of checkpoints, or runs, with :stage.")
BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Which; default the config's benchmarks.names.")
ROOT = flags.DEFINE_string("root", None, "Their official files; default the config's benchmarks.root.")
PRM = flags.DEFINE_string("prm", None, "A reward model that votes over the samples: a run, or an export.")
SAMPLES = flags.DEFINE_integer("samples", None, "Votes per question; default benchmarks.samples.")

log = logging.getLogger("mstar_jax")


class Checkpoint:
    """A policy or a reward model in a folder of its own or in a run; its weights wait until they are asked
    for."""

    def __init__(self, text: str, stage: str = ""):
        """Reads what is needed to name it.

        Args:
          text: a folder, or a run with `:stage` behind it.
          stage: of a run, where the text names none.

        Raises:
          ValueError: it is neither, or has no such stage.
        """
        folder, _, named = text.rpartition(":") if not pathlib.Path(text).exists() else (text, "", "")
        self.path = pathlib.Path(folder or text)
        config = self.path / "config.json"
        values = json.loads(config.read_text()) if config.exists() else {}
        self.run = "model_type" not in values and "evolve" in values
        if not self.run and "model_type" not in values:
            raise ValueError(f"{text} is neither a run nor a checkpoint's folder: no such config.json in it")
        self.stage = export.finished(self.path, named or stage) if self.run else ""
        self.name = "_".join(part for part in (self.path.resolve().name, self.stage) if part)
        self.identity = identity(self.path, self.stage)

    def processor(self, max_crops: int | None) -> Any:
        """The family's host side."""
        if self.run:
            return export.policy_of(self.path).processor()
        return models.Pretrained(self.path, max_crops=max_crops).processor()

    def load(self, mesh: Any, dtype: Any, reward: bool = False) -> Callable[[], Any]:
        """Reads the parameters, laid out for sampling, when it is first called."""

        @functools.cache
        def params() -> Any:
            if self.run:
                return sampler.for_sampling(export.restore(self.path, self.stage, mesh)[2], mesh, dtype)
            source = models.Pretrained(self.path)
            how = {"mesh": mesh, "rules": sharding.SAMPLE}
            return source.load_reward(dtype, **how) if reward else source.load(dtype, **how)

        return params


def main(argv: list[str]) -> None:
    stop = cli.start(argv)
    config, b = CONFIG.value, CONFIG.value.benchmarks
    b.names = tuple(BENCHMARKS.value) or b.names
    b.root, b.samples = ROOT.value or b.root, b.samples if SAMPLES.value is None else SAMPLES.value
    workdir = pathlib.Path(WORKDIR.value or "runs/benchmarks")
    with cli.explained():
        cli.begin()
        evaluation = run(config, workdir, CHECKPOINTS.value or [], PRM.value, stop)
    if processes.first():
        print(f"\n{evaluation.table()}\n\n{evaluation.folder.absolute()}: scores, predictions, table.md")


def run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    checkpoints: Sequence[str],
    prm: str | None,
    stop: Callable[[], bool],
) -> Evaluation:
    """Evaluates every checkpoint on `config.benchmarks`.

    Args:
      config: `benchmarks`, and how policies sample.
      workdir: where responses, scores and tables go.
      checkpoints: folders, or runs with `:stage`.
      prm: a reward model's, or None.
      stop: asked between device batches; once true, `Stopped` is raised.

    Raises:
      ValueError: there is nothing to evaluate, or something is not what it should be.
    """
    if not config.benchmarks.names:
        raise ValueError(f"no benchmark is named: --benchmarks={','.join(benchmarks.NAMES)}")
    if prm and not config.benchmarks.samples:
        raise ValueError("--prm votes over samples: give their number, --samples=16")
    found = [Checkpoint(text) for text in checkpoints]
    names = [checkpoint.name for checkpoint in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two checkpoints have the same name ({', '.join(names)}): rename a folder")
    judge = Checkpoint(prm, "prm") if prm else None
    mesh = sharding.make_mesh(**config.mesh)
    configure.check_benchmarks(config)
    configure.check_sampling(config, mesh)
    dtype, crops = jnp.dtype(config.sampling.dtype), config.policy.max_crops
    with processes.first_alone("benchmarks"):  # writes the images that their files hold
        evaluation = Evaluation(workdir, config.benchmarks)
    for checkpoint in found:
        host, voter = Generator(config, workdir, checkpoint.processor(crops), stop), None
        if judge:
            model = judge.load(mesh, dtype, reward=True)
            voter = Voter(Scorer(host, judge.processor(crops)), model, judge.identity)
        params = checkpoint.load(mesh, dtype)
        with jax.set_mesh(mesh):
            evaluation.evaluate(Policy(checkpoint.name, host, params, checkpoint.identity), voter)
    return evaluation


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.mark_flag_as_required("checkpoint")
    jax.config.config_with_absl()
    app.run(main)
