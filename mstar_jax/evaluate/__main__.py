"""Benchmarks of one or several policies.

    python -m mstar_jax.evaluate --config=configs/phi35.py --root=/data/benchmarks \
        --checkpoint=/checkpoints/Phi-3.5-vision-instruct,runs/phi35:warmup,runs/phi35 \
        --benchmarks=mathvista,m3cot,mmstar_r,mmbench_r,ai2d [--prm=runs/phi35 --samples=16]

A checkpoint is a folder in the official format of a family of `models`, or a run of mstar_jax.main:
its last policy, or that of `:stage` (`:best` is the best iteration on validation). The first is what the
others are compared with. A reward model is a run's, or what `prm.path` takes: a folder that `export
--stage=prm` wrote, or another's, which the keys of `config.prm` describe. Both may be hub ids. Started again,
the command asks nothing twice.

`--benchmarks=visualprocessbench --prm=...` measures the reward model itself and needs no checkpoint.

`--root` holds the official files, in a folder for each benchmark or all together: see `benchmarks.py`.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mstar_jax import cli, configure, finished, models, processes, ranges, sharding
from mstar_jax.cli import CONFIG, WORKDIR
from mstar_jax.evaluate import benchmarks, process
from mstar_jax.evaluate.evaluation import (
    Candidate,
    evaluate,
    identity,
    judge_steps,
    problems,
    read,
    write_table,
)
from mstar_jax.evaluate.summary import Result, Results, table
from mstar_jax.inference import draw, sampler
from mstar_jax.inference.generate import inference
from mstar_jax.inference.score import Scorer, of_folder
from mstar_jax.models import hf
from mstar_jax.rewards.prm import as_written
from mstar_jax.store import read_json
from mstar_jax.structs import Processor, Stage
from mstar_jax.workdir import lock

CHECKPOINTS = flags.DEFINE_list("checkpoint", None, "Folders of checkpoints, or runs, with :stage.")
BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Which; default the config's benchmarks.names.")
ROOT = flags.DEFINE_string("root", None, "Their official files; default the config's benchmarks.root.")
PRM = flags.DEFINE_string("prm", None, "A reward model that votes over the samples: a run, or a folder.")
SAMPLES = flags.DEFINE_integer("samples", None, "Votes per question; default benchmarks.samples.")

log = logging.getLogger("mstar_jax")


class Checkpoint:
    """A policy or a reward model, in a folder of its own or in a run; its parameters are not read yet.

    Attributes:
      path: the folder.
      run: whether it is a run's.
      stage: which stage of the run; None for a folder.
      name: in files and tables.
      identity: what tells its parameters from others in the same place.
    """

    def __init__(self, text: str, stage: Stage | None = None):
        """Reads what is needed to name it.

        Args:
          text: a folder, or a run followed by `:stage`; or a hub id, as `policy.path` and `prm.path` are.
          stage: of a run, where the text names none; None for its last policy.

        Raises:
          ValueError: it is none of them, or has no such stage.
        """
        whole = ":" not in text or pathlib.Path(text).exists()
        folder, _, named = (text, "", "") if whole else text.rpartition(":")
        path = pathlib.Path(folder)
        self.path = path if named or path.exists() else hf.local_folder(text)
        config = self.path / "config.json"
        values = read_json(config) if config.exists() else {}
        self.run = "model_type" not in values and "evolve" in values
        if not self.run and "model_type" not in values:
            raise ValueError(f"{text} is neither a run nor a checkpoint's folder: no such config.json in it")
        wanted = finished.stage_of(self.path, named) if named else stage
        self.stage = finished.finished(self.path, wanted) if self.run else None
        suffix = f"_{self.stage}" if self.stage else ""
        self.name = path.resolve().name + suffix
        self.identity = identity(self.path, self.stage)

    def processor(self, config: ml_collections.ConfigDict) -> Processor:
        """The family's host side."""
        if self.run:
            return finished.policy_of(self.path).processor()
        return self.files(config).processor()

    def files(self, config: ml_collections.ConfigDict) -> models.Pretrained:
        """The folder's, with `policy.max_crops` if it is of the config's family."""
        family = models.FAMILIES.get(config.policy.family.partition(":")[0])  # without the size
        return models.pretrained(self.path, family, config.policy.max_crops)

    def load(self, mesh: Mesh, dtype: DTypeLike) -> Any:
        """Reads the parameters, a `Model` or, of a run's reward model, a `ScoringModel`, laid out for
        sampling."""
        if self.run:
            restored = finished.restore(self.path, self.stage, mesh)
            return sampler.for_sampling(restored.params, mesh, dtype)
        return models.Pretrained(self.path).load(dtype, mesh=mesh, rules=sharding.SAMPLE)


def main(argv: list[str]) -> None:
    stop = cli.start(argv)
    config = CONFIG.value
    b = config.benchmarks
    b.names = tuple(BENCHMARKS.value) or b.names
    b.root = ROOT.value or b.root
    b.samples = b.samples if SAMPLES.value is None else SAMPLES.value
    workdir = pathlib.Path(WORKDIR.value or "runs/benchmarks")
    with cli.explained():
        cli.begin()
        lock(workdir)
        results = run(config, workdir, CHECKPOINTS.value or [], PRM.value, stop)
    if processes.first():
        folder = (workdir / "benchmarks").absolute()
        shown = f"{table(results, b.paper)}\n\n" if results else ""
        print(f"\n{shown}{folder}: scores, predictions, tables")


def run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    checkpoints: Sequence[str],
    prm: str | None,
    stop: Callable[[], bool],
) -> Results:
    """Evaluates every checkpoint on `config.benchmarks`.

    Args:
      config: `benchmarks`, and how policies sample.
      workdir: where responses, scores and tables go.
      checkpoints: folders, or runs with `:stage`.
      prm: a reward model's, or None.
      stop: asked between device batches; once true, `Stopped` is raised.

    Returns:
      The results by policy and benchmark.

    Raises:
      ValueError: there is nothing to evaluate, or something is not what it should be.
    """
    if not config.benchmarks.names:
        known = ",".join((*benchmarks.NAMES, process.NAME))
        raise ValueError(f"no benchmark is named: --benchmarks={known}")
    of_policies = set(config.benchmarks.names) - {process.NAME}
    if process.NAME in config.benchmarks.names and not prm:
        raise ValueError(f"{process.NAME} measures a reward model: name one, --prm=runs/phi35")
    if of_policies and not checkpoints:
        raise ValueError("no policy is named: --checkpoint=runs/phi35")
    if prm and of_policies and not config.benchmarks.samples:
        raise ValueError("--prm votes over samples: give their number, --samples=16")
    found = [Checkpoint(text) for text in checkpoints]
    names = [checkpoint.name for checkpoint in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two checkpoints have the same name ({', '.join(names)}): rename a folder")
    judge = Checkpoint(prm, Stage.reward_model) if prm else None
    mesh = sharding.make_mesh(**config.mesh)
    of_judge = ranges.judging(config.prm, not judge.run) if judge else ()
    ranges.refuse([*problems(config), *configure.sampling_problems(config, mesh), *of_judge])
    dtype = jnp.dtype(config.sampling.dtype)
    scorer = scorer_of(judge, mesh, dtype, config) if judge else None
    with processes.first_alone("benchmarks"):  # writes the images that their files hold
        asked = read(config, workdir)
    if asked.solutions and judge and scorer:
        host = inference(config, workdir, scorer.processor, stop)
        with jax.set_mesh(mesh):
            judge_steps(host, asked, scorer, judge.name)
    results: dict[str, dict[str, Result]] = {}
    for checkpoint in found if asked.items else ():
        host = inference(config, workdir, checkpoint.processor(config), stop)
        params = functools.cache(functools.partial(checkpoint.load, mesh, dtype))  # once for all benchmarks
        candidate = Candidate(checkpoint.name, params, checkpoint.identity)
        with jax.set_mesh(mesh):
            results[checkpoint.name] = evaluate(host, asked, candidate, scorer)
        write_table(asked, results)
    return results


def scorer_of(judge: Checkpoint, mesh: Mesh, dtype: DTypeLike, config: ml_collections.ConfigDict) -> Scorer:
    """The reward model that votes; it stays in memory once it is loaded."""
    if judge.run:
        processor = judge.processor(config)
        encode = as_written(processor, draw.token_texts(processor))
        scorer = Scorer(functools.partial(judge.load, mesh, dtype), judge.identity, processor, encode)
    else:
        head = {"head": config.prm.head} if config.prm.head else {}
        scorer = of_folder(judge.files(config), config.prm, mesh, dtype, judge.identity | head)
    return dataclasses.replace(scorer, load=functools.cache(scorer.load))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.main(main)
