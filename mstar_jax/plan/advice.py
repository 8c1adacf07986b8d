"""Settings with which a stage takes less memory: what is tried where it does not fit."""

from collections.abc import Iterator, Sequence

import jax
import ml_collections

from mstar_jax import configure, ranges, sharding
from mstar_jax.plan.programs import Programs

Settings = dict[str, str | int]  # by dotted name


def smaller_settings(
    kind: str, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Iterator[Settings]:
    """Settings to try one after the other if a stage does not fit; each is added to those before it."""
    shards = sharding.batch_shards(mesh)
    if kind.startswith("train"):
        if config.train.remat != "full":
            yield {"train.remat": "full"}
        rows = config.evolve.batch if kind == "train" else config.prm.batch
        accumulate = 2 * config.train.accumulate
        while rows % (accumulate * shards) == 0:
            yield {"train.accumulate": accumulate}
            accumulate *= 2
    else:
        if not config.train.offload_optimizer:
            yield {"train.offload_optimizer": True}
        key = {"exploration": "explore.batch", "labels": "prm.rows", "score": "prm.score_batch"}
        name = key.get(kind, "sampling.batch")
        section, field = name.split(".")
        size = (config[section][field] or config.prm.batch) // 2
        while size >= shards and size % shards == 0:
            yield {name: size}
            size //= 2
    rest: Settings = {} if -1 in (config.mesh.data, config.mesh.fsdp) else {"mesh.fsdp": -1}
    for tensor in (2, 4, 8):
        if tensor > mesh.shape["tensor"]:
            yield rest | {"mesh.tensor": tensor}


def as_flags(changes: Settings) -> str:
    """Settings as they are given on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def with_settings(
    config: ml_collections.ConfigDict, changes: Settings, devices: Sequence[jax.Device]
) -> Programs:
    """The programs of a config with changes.

    Raises:
      ValueError: a run would refuse it.
    """
    tried = config.copy_and_resolve_references()
    tried.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(**tried.mesh, devices=devices)
    ranges.refuse(configure.impossible(tried, mesh))
    return Programs(tried, mesh)
