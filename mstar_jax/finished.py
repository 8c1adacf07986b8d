"""The finished stages of a run's workdir, read back by commands other than the run itself."""

import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from mstar_jax import configure, models, sharding
from mstar_jax.models import vlm
from mstar_jax.records import best
from mstar_jax.store import read_json
from mstar_jax.structs import Stage
from mstar_jax.training.checkpoint import Checkpoints
from mstar_jax.workdir import of_checkpoint

Policy = models.Pretrained | models.FromScratch


class Restored(NamedTuple):
    """A stage read back: the run's policy, which stage it is, and its parameters (a `Model`, or of the reward
    model a `ScoringModel`)."""

    policy: Policy
    stage: Stage
    params: Any


def restore(workdir: pathlib.Path, stage: Stage | None = None, mesh: Mesh | None = None) -> Restored:
    """Reads a stage's parameters back.

    Args:
      workdir: of a run.
      stage: which policy, or the reward model; None for the last policy whose training is complete.
      mesh: where they go; None for the first device.

    Raises:
      ValueError: there is no such run or stage.
    """
    _check_run(workdir)
    stage = finished(workdir, stage)
    policy = policy_of(workdir)
    abstract = jax.eval_shape(policy.build)
    if stage == Stage.reward_model:
        abstract = jax.eval_shape(vlm.RewardModel, abstract)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    params = Checkpoints(workdir / "checkpoints").params(stage, abstract)
    return Restored(policy, stage, params)


def policy_of(workdir: pathlib.Path) -> Policy:
    """A run's policy, without its parameters.

    Raises:
      ValueError: there is no such run, or the tokenizer or checkpoint that it began with is another one now.
    """
    _check_run(workdir)
    config = ml_collections.ConfigDict(read_json(workdir / "config.json"))
    try:
        policy = configure.make_policy(config, workdir)
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"{workdir}/config.json has other keys than this version of mstar_jax ({error}): "
            "use the version that wrote it"
        ) from error
    noted = workdir / "inputs.json"
    key = "tokenizer" if isinstance(policy, models.FromScratch) else "policy.path"
    if noted.exists() and read_json(noted).get(key) != of_checkpoint(policy.folder):
        raise ValueError(
            f"{policy.folder} has changed since {workdir} was begun with it ({key} in {noted}): its "
            f"parameters mean something else now. Restore it; to go on all the same, remove {noted}"
        )
    return policy


def stage_of(workdir: pathlib.Path, name: str) -> Stage:
    """The stage of a run that has this name, or for `best` the iteration that was best on validation.

    Raises:
      ValueError: there is none.
    """
    if name != "best":
        return Stage.parse(name)
    path = workdir / "results.json"
    found = best(read_json(path, "stages")["stages"]) if path.exists() else None
    if found is None:
        raise ValueError(f"{path}: no iteration has been measured on validation, so none is the best")
    return Stage.iteration(found["iteration"])


def _check_run(workdir: pathlib.Path) -> None:
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is no run: it holds no config.json")


def finished(workdir: pathlib.Path, stage: Stage | None = None) -> Stage:
    """The stage itself if its training is complete; for None the last policy's.

    Raises:
      ValueError: it is not.
    """
    done = sorted(Stage.parse(path.parent.name) for path in (workdir / "checkpoints").glob("*/done.json"))
    policies = [each for each in done if each != Stage.reward_model]
    if not policies or (stage is not None and stage not in done):
        there = ", ".join(map(str, done)) or "none"
        raise ValueError(f"{workdir}: no finished training of {stage or 'any stage'}; there is {there}")
    return policies[-1] if stage is None else stage
