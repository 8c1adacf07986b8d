"""Checkpoints with Orbax: TrainState, EvolveState and the loader's state, saved together or not at all.

How a killed run comes back, in this order:
  1. `evolve` reads results.json: a stage with its record there is over.
  2. The stage's rollouts come from the store; only missing shards are sampled, with the weights of the
     stage before, which are in that stage's last checkpoint.
  3. The stage's own newest checkpoint, if there is one, gives TrainState and the loader's state; training
     goes on behind it, and metric rows written after it are dropped and written again.
  4. A stage without a checkpoint starts from the stage before.
Orbax writes to a temporary folder and renames it, so a checkpoint that exists is whole.

    <workdir>/checkpoints/<stage>/<step>/{state,run}, and done.json once the stage has ended
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from mstar_jax import processes, sharding
from mstar_jax.store import write_text
from mstar_jax.structs import EvolveState, TrainState


def _names(tree: Any) -> dict[str, Any]:
    """A flat, readable dictionary of a state: `params.decoder.blocks.q` -> array."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
        named[".".join(part for part in parts if part != "value")] = leaf
    return named


class Checkpoints:
    """The checkpoints of a run, one folder a stage; saving does not hold up training."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder).absolute()
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def _manager(self, stage: str) -> ocp.CheckpointManager:
        if stage not in self._managers:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, create=True, enable_async_checkpointing=True
            )
            self._managers[stage] = ocp.CheckpointManager(self.folder / stage, options=options)
        return self._managers[stage]

    def save(self, stage: str, state: TrainState, run: EvolveState, wait: bool = False) -> None:
        """Saves at `run.cursor`; returns once the arrays are copied, or written if `wait` or `run.done`."""
        manager = self._manager(stage)
        if manager.latest_step() != run.cursor:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(_names(state)), run=ocp.args.JsonSave(dataclasses.asdict(run))
            )
            manager.save(run.cursor, args=args, force=True)
        if wait or run.done:
            manager.wait_until_finished()
        if run.done and processes.first():  # a mark of its own: the stage may end where it just saved
            write_text(self.folder / stage / "done.json", json.dumps(dataclasses.asdict(run)))

    def has(self, stage: str) -> bool:
        """Whether the stage has a checkpoint."""
        return (self.folder / stage).exists() and self._manager(stage).latest_step() is not None

    def run(self, stage: str) -> EvolveState | None:
        """The EvolveState of the stage's newest checkpoint, None where there is none."""
        if not self.has(stage):
            return None
        done = self.folder / stage / "done.json"
        if done.exists():
            return EvolveState(**json.loads(done.read_text()))
        manager = self._manager(stage)
        found = manager.restore(manager.latest_step(), args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return EvolveState(**found["run"])

    def restore(self, stage: str, abstract: TrainState) -> TrainState:
        """Reads the stage's newest TrainState straight into the shardings of `abstract`.

        Raises:
          ValueError: there is none, or it does not fit the model.
        """
        manager = self._manager(stage)
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{self.folder / stage} holds no checkpoint")
        try:
            found = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_names(abstract)))
            )["state"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.folder / stage}/{step} does not fit this model: {error}") from error
        leaves = [found[name] for name in _names(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def params(self, stage: str, abstract: Any) -> Any:
        """Reads the stage's newest parameters alone, without the optimizer state.

        Args:
          stage: its name in the workdir.
          abstract: the model's shapes, each with its sharding.

        Raises:
          ValueError: there is no checkpoint, or it does not fit the model.
        """
        manager = self._manager(stage)
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{self.folder / stage} holds no checkpoint")
        wanted = {f"params.{name}": leaf for name, leaf in sharding.named(abstract).items()}
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        how = ocp.args.PyTreeRestore(item=wanted, restore_args=args, partial_restore=True)
        try:  # not the manager's restore: it is bound to the handler that saved
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                found = reader.restore(self.folder / stage / str(step) / "state", args=how)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.folder / stage}/{step} does not fit this model: {error}") from error
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])

    def drop(self, stage: str) -> None:
        """Removes a stage's checkpoints (a finished iteration that nothing needs any more)."""
        manager = self._managers.pop(stage, None)
        if manager is not None:
            manager.close()
        if processes.first():
            shutil.rmtree(self.folder / stage, ignore_errors=True)

    def wait(self) -> None:
        """Waits until everything is written."""
        for manager in self._managers.values():
            manager.wait_until_finished()
