"""Several processes that run one program: who writes, what they agree on, how values reach the host.

Every process runs the same code on the same values; device work is shared by the mesh, files are written by
process 0 into a workdir that all of them see. With one process each of these is free.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LATE = 120.0  # seconds until a file that another process wrote has to be visible here


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes; on TPU pods and SLURM nothing has to be given.

    Raises:
      ValueError: the cluster is not one that JAX recognises, and it was not described in full.
    """
    how: dict[str, Any] = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 30}
    if coordinator is not None or count is not None or index is not None:
        if coordinator is None or count is None or index is None:
            raise ValueError("--coordinator, --num_processes and --process_id go together")
        how |= {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    jax.distributed.initialize(**how)


def first() -> bool:
    """Whether this is process 0, which writes."""
    return jax.process_index() == 0


def here() -> tuple[int, int]:
    """(index of this process, how many there are)."""
    return jax.process_index(), jax.process_count()


def barrier(name: str) -> None:
    """Waits for all processes; `name` has to be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(asked: bool) -> bool:
    """Whether any process says so."""
    if jax.process_count() == 1:
        return asked
    return bool(multihost_utils.process_allgather(np.array([asked])).any())


def from_first(value: np.ndarray) -> np.ndarray:
    """Process 0's value."""
    return value if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(value))


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Process 0 goes through the block before the others do, which then find what it made."""
    if not first():
        barrier(name)
    try:
        yield
    finally:
        if first():
            barrier(name)


def fetch(tree: Any) -> Any:
    """Device arrays as whole host arrays, on every process."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def visible(there: Callable[[], bool], what: str | os.PathLike) -> None:
    """Waits until something that process 0 wrote can be seen here: network file systems take their time.

    Raises:
      ValueError: it cannot; most likely the processes have different folders of this name.
    """
    begun = time.monotonic()
    while not there():
        if time.monotonic() - begun > LATE:
            raise ValueError(f"{what}: written by process 0 and not visible here; is the workdir shared?")
        time.sleep(0.2)
