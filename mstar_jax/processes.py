"""Several processes that run one program: which one writes, how they agree, how values reach the host.

Every process runs the same code on the same values. The mesh divides device work among them, and process 0
writes files to a workdir that all of them can read. With a single process, each function here is free.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

LATE = 120.0  # seconds within which a file that another process wrote must become visible here
Tree = TypeVar("Tree")


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connects to the other processes. On TPU pods and SLURM, JAX finds them itself.

    Args:
      coordinator: host:port of process 0; None where JAX finds it.
      count: the number of processes.
      index: this process's index.

    Raises:
      ValueError: only some of the three are given, or JAX does not recognise the cluster.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num_processes and --process_id must be given together")
    jax.config.update("jax_enable_preemption_service", False)  # it would install its own SIGTERM handler
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=count,
        process_id=index,
        heartbeat_timeout_seconds=60,
        shutdown_timeout_seconds=30,
    )


def first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(asked: bool) -> bool:
    """Whether `asked` is true in any process."""
    if jax.process_count() == 1:
        return asked
    return bool(multihost_utils.process_allgather(np.array([asked])).any())


def mine(number: int) -> bool:
    """Whether an item of work that the processes share is this one's."""
    return number % jax.process_count() == jax.process_index()


def shared(make: Callable[[int], bytes], count: int) -> list[bytes]:
    """make(0), ..., make(count - 1) on every process: each is made by the process whose it is (`mine`), which
    tells the others. They must not wait for each other in `make`.

    Raises:
      Exception: what `make` raised here.
      ValueError: it raised something in another process, whose log says what.
    """
    if jax.process_count() == 1:
        return [make(number) for number in range(count)]
    failed: Exception | None = None
    found = [b""] * count
    try:
        found = [make(number) if mine(number) else b"" for number in range(count)]
    except Exception as error:  # the others are not to wait for this process
        failed = error
    if agree(failed is not None):
        raise failed or ValueError("another process could not do its share of the work; see its log")
    sizes = np.array([len(each) for each in found], np.int32)
    told = np.asarray(multihost_utils.process_allgather(sizes))  # [processes, count]
    room = 1 << int(told.sum(axis=1).max()).bit_length()  # few shapes: each is compiled
    data = np.zeros(room, np.uint8)
    data[: sizes.sum()] = np.frombuffer(b"".join(found), np.uint8)
    parts = [each.tobytes() for each in np.asarray(multihost_utils.process_allgather(data))]
    ends = np.cumsum(told, axis=1)
    owners = np.arange(count) % len(parts)
    return [
        parts[owner][end - size : end]
        for owner, end, size in zip(owners, ends[owners, range(count)], told[owners, range(count)])
    ]


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Runs the block in process 0 first, so that the other processes find its files."""
    if not first():
        barrier(name)
    try:
        yield
    finally:
        if first():
            barrier(name)


def fetch(tree: Tree) -> Tree:
    """Copies device arrays to the host as whole numpy arrays, on every process."""

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def visible(there: Callable[[], bool], what: str | os.PathLike) -> None:
    """Waits until a file that process 0 wrote is visible here; network file systems have a delay.

    Args:
      there: whether it is visible.
      what: its path, for the message.

    Raises:
      ValueError: it is still not visible after `LATE` seconds.
    """
    begun = time.monotonic()
    while not there():
        if time.monotonic() - begun > LATE:
            raise ValueError(
                f"{what}: written by process 0, but not visible to process {jax.process_index()} after "
                f"{LATE:.0f} s; the workdir must be on storage that all hosts share"
            )
        time.sleep(0.2)
