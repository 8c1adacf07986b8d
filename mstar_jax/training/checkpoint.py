"""Checkpoints with Orbax: TrainState, EvolveState and the loader's state, saved together or not at all.

How a killed run is resumed, in this order:
  1. `evolve` reads results.json: a stage with its record there is finished.
  2. The stage's rollouts come from the store. Only missing shards are sampled, with the weights of the stage
     before, which are in that stage's last checkpoint.
  3. The stage's own latest checkpoint, if there is one, holds the TrainState and the loader's state. Training
     continues from there; later metric rows are dropped and written again. The first step after a start is
     saved before the next one, so a run gets on however soon it is killed each time.
  4. A stage without a checkpoint starts from the stage before.
Orbax writes to a temporary folder and renames it, so a checkpoint that exists is complete. One that was
damaged later is set aside; the one before it, or the stage's beginning, takes its place and ends the same.

    <workdir>/checkpoints/<stage>/<step>/{state,run}, and done.json once the stage is finished
    <workdir>/checkpoints/<stage>/<step>.sum           a digest of its files
    <workdir>/checkpoints/<stage>/damaged_<step>       what was set aside
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from mstar_jax import processes, sharding
from mstar_jax.store import read_json, write_text
from mstar_jax.structs import Stage, TrainState
from mstar_jax.workdir import of_folder

SHARE = 0.02  # of the time, at most, for checkpoints that are saved because the one before is old
BLOCKS = 1024  # of 64 KiB, of each file, that the digest is of: all bytes of a file up to 64 MiB
log = logging.getLogger(__name__)


@dataclasses.dataclass
class EvolveState:
    """The state of the run; written next to the TrainState in every checkpoint.

    Attributes:
      stage: `Stage.kind` of the stage whose training wrote the checkpoint.
      iteration: its `Stage.number`.
      cursor: batches of this stage's training already consumed.
      done: the stage's training is complete.
      temperature: what the responses trained on were sampled at.
      seed: the run's seed.
      loader: state of the stage's input pipeline, as its iterator gives it.
      curve: sums of the training metrics since the last row of the stage's curve.
      values: of the config, by dotted key, what the stage was trained with.
    """

    stage: str
    iteration: int
    cursor: int
    done: bool
    temperature: float
    seed: int
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    curve: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


class Damaged(ValueError):
    """A checkpoint could not be read and was set aside; at the next start the one before takes its place."""


def _named(state: TrainState) -> dict[str, jax.Array]:
    """A flat, readable dictionary of a state: `params.decoder.blocks.q` -> array."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
        named[".".join(part for part in parts if part != "value")] = leaf
    return named


class Checkpoints:
    """The checkpoints of a run, one folder for each stage; training continues while they are written.

    Attributes:
      folder: of all of them.
      saved: whether this process has saved one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder).absolute()
        self.saved = False
        self._cost = 0.0  # seconds that the last one took which was waited for
        self._first = 0.0  # when this process had saved its first one, seconds of the monotonic clock
        self._due = 0.0  # when the newest one is old
        self._managers: dict[Stage, ocp.CheckpointManager] = {}

    def save(self, stage: Stage, state: TrainState, run: EvolveState, wait: bool = False) -> None:
        """Saves at `run.cursor`; returns once the arrays are copied or, if `wait` or `run.done`, written."""
        begun = time.monotonic()
        manager = self._manager(stage)
        if manager.latest_step() != run.cursor:
            self._note(stage)
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)), run=ocp.args.JsonSave(dataclasses.asdict(run))
            )
            manager.save(run.cursor, args=args, force=True)
        if wait or run.done:
            self._note(stage)
        if run.done:
            for step in manager.all_steps():
                if step != run.cursor:
                    manager.delete(step)
        if run.done and processes.first():  # a separate mark: this step may be saved already
            write_text(self.folder / stage.name / "done.json", json.dumps(dataclasses.asdict(run)))
        now = time.monotonic()
        if wait or run.done:
            self._cost = now - begun
        self._first = self._first if self.saved else now
        # soon at first, for a process that is killed often is young; then ever more rarely
        self.saved, self._due = True, now + min(4 * self._cost + now - self._first, self._cost / SHARE)

    def old(self) -> bool:
        """Whether the newest one is so old that another is due: a kill would lose more than half of what this
        process has done, or saving takes less than `SHARE` of the time."""
        return time.monotonic() >= self._due

    def has(self, stage: Stage) -> bool:
        """Whether the stage has a checkpoint."""
        return (self.folder / stage.name).exists() and self._manager(stage).latest_step() is not None

    def run(self, stage: Stage) -> EvolveState | None:
        """The EvolveState of the stage's latest checkpoint, None if there is none."""
        if not self.has(stage):
            return None
        done = self.folder / stage.name / "done.json"
        if done.exists():
            return EvolveState(
                **read_json(done, "stage", "iteration", "cursor", "done", "temperature", "seed")
            )
        manager = self._manager(stage)
        found = manager.restore(manager.latest_step(), args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return EvolveState(**found["run"])

    def restore(self, stage: Stage, abstract: TrainState) -> TrainState:
        """Reads the stage's latest TrainState directly into the shardings of `abstract`.

        Raises:
          ValueError: there is no checkpoint, or it does not fit the model.
        """
        wanted = _named(abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        with self._read(stage, wanted) as step:
            found = self._manager(stage).restore(step, args=args)["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])

    def params(self, stage: Stage, abstract: nnx.Module) -> nnx.Module:
        """Reads the stage's latest parameters, without the optimizer state.

        Args:
          stage: which one.
          abstract: the shapes of the model, each with its sharding.

        Raises:
          ValueError: there is no checkpoint, or it does not fit the model.
        """
        wanted = {f"params.{name}": leaf for name, leaf in sharding.named(abstract).items()}
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        # not by the manager: once it has saved a state, it restores whole states only
        with self._read(stage, wanted) as step, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(self.folder / stage.name / str(step) / "state", args=args)
        return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])

    def drop(self, stage: Stage) -> None:
        """Removes a stage's checkpoints, once nothing needs them."""
        manager = self._managers.pop(stage, None)
        if manager is not None:
            manager.close()
        if processes.first():
            shutil.rmtree(self.folder / stage.name, ignore_errors=True)

    def wait(self) -> None:
        """Waits until everything is written."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def _manager(self, stage: Stage) -> ocp.CheckpointManager:
        if stage not in self._managers:
            with processes.first_alone(f"{stage}: checkpoints"):
                if processes.first():
                    self._set_damaged_aside(stage)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, enable_async_checkpointing=True
            )
            self._managers[stage] = ocp.CheckpointManager(self.folder / stage.name, options=options)
        return self._managers[stage]

    def _note(self, stage: Stage) -> None:
        """Waits until the stage's checkpoints are written, and notes their digests."""
        manager, folder = self._manager(stage), self.folder / stage.name
        manager.wait_until_finished()
        if not processes.first():
            return
        steps = set(manager.all_steps())
        for path in folder.glob("*.sum"):
            if int(path.stem) not in steps:
                path.unlink()
        for step in steps:
            if not (folder / f"{step}.sum").exists():
                write_text(folder / f"{step}.sum", of_folder(folder / str(step), BLOCKS))

    def _set_damaged_aside(self, stage: Stage) -> None:
        """Sets newest checkpoints aside until one is as it was written."""
        folder = self.folder / stage.name
        for step in sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True):
            if self._same(stage, step) is not False and (folder / str(step) / "run").exists():
                return
            self._set_aside(stage, step)
            log.warning("%s/%d: damaged, so it is set aside and made again from the one before", folder, step)

    def _same(self, stage: Stage, step: int) -> bool | None:
        """Whether a checkpoint's files are as they were written; None where no digest was noted."""
        folder = self.folder / stage.name
        noted = folder / f"{step}.sum"
        return noted.read_text() == of_folder(folder / str(step), BLOCKS) if noted.exists() else None

    def _set_aside(self, stage: Stage, step: int) -> None:
        folder = self.folder / stage.name
        (folder / "done.json").unlink(missing_ok=True)
        (folder / f"{step}.sum").unlink(missing_ok=True)
        shutil.rmtree(folder / f"damaged_{step}", ignore_errors=True)
        (folder / str(step)).rename(folder / f"damaged_{step}")

    def _fits(self, path: pathlib.Path, wanted: dict[str, Any]) -> bool:
        """Whether a state has the names and shapes that are wanted, as far as that can be read."""
        try:
            found: Any = ocp.PyTreeCheckpointHandler().metadata(path)
            there = {name: tuple(leaf.shape) for name, leaf in getattr(found, "tree", found).items()}
            own = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
            names = {name for name in there if name.startswith("params.")}
            return names <= own.keys() and own.items() <= there.items()
        except Exception:  # not even that
            return True

    @contextlib.contextmanager
    def _read(self, stage: Stage, wanted: dict[str, Any]) -> Iterator[int]:
        """Gives the latest step to read, and explains what does not fit.

        Raises:
          ValueError: there is no checkpoint, or it does not fit the model.
          Damaged: it cannot be read, and no digest says that its files are whole.
        """
        step = self._manager(stage).latest_step()
        if step is None:
            raise ValueError(f"{self.folder / stage.name} holds no checkpoint")
        try:
            yield step
        except (MemoryError, jax.errors.JaxRuntimeError):  # no room, on the host or a device
            raise
        except Exception as error:  # Orbax raises what its storage raises
            path = self.folder / stage.name / str(step)
            if not self._fits(path / "state", wanted):
                raise ValueError(f"{path} does not fit this model: {error}") from error
            if self._same(stage, step):  # it could not be read, but not because it is damaged
                raise
            if processes.first():
                self._set_aside(stage, step)
            self._managers.pop(stage).close()
            raise Damaged(
                f"{path}: damaged, so it is set aside and made again from the one before"
            ) from error
