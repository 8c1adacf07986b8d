"""Processes that decode images. They start when they are first needed and live as long as this one."""

import atexit
import os
import pathlib
import queue
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection

import mstar_jax.data
from mstar_jax.data import pixels
from mstar_jax.data.pixels import Found, Job

SERVE = "import sys; from mstar_jax.data import pixels; pixels.serve(int(sys.argv[1]))"
ROOT = pathlib.Path(mstar_jax.data.__file__).resolve().parents[2]  # the folder that holds the package


class Worker:
    """A fresh interpreter, so jax may run here: nothing is forked, and this process's main module is not
    imported there. It ends when this end of its socket is closed, whatever ends this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            )
        self.stream = ours
        self.connection = Connection(os.dup(ours.fileno()))

    def find(self, job: Job) -> Found | Exception:
        """See `pixels.find`; what it raises there is returned.

        Raises:
          EOFError, OSError: the worker is gone.
        """
        self.connection.send(job)
        return pixels.receive(self.connection, self.stream)

    def close(self, patience: float = 0.0) -> int:
        """Ends the worker, which has so many seconds to end by itself.

        Returns:
          Its exit code; -N if signal N ended it.
        """
        self.connection.close()
        self.stream.close()
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Workers:
    """So many processes; further threads wait for one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self.idle.put(None)
        atexit.register(self.close)

    def find(self, job: Job) -> Found:
        """See `pixels.find`; any thread may ask.

        Raises:
          RuntimeError: two workers in turn have ended over this job; the message says how.
        """
        worker = self.idle.get()
        ended = 0
        try:
            for _ in range(2):
                if worker and worker.process.poll() is not None:  # ended while it was idle
                    worker.close()
                    worker = None
                worker = worker or Worker()
                try:
                    found = worker.find(job)
                except (EOFError, OSError):
                    ended, worker = worker.close(patience=5.0), None
                    continue
                except BaseException:  # part of a result may be unread
                    worker.close()
                    worker = None
                    raise
                if isinstance(found, Exception):
                    raise found
                return found
            paths = [path for row in job.images for path in row]
            raise RuntimeError(
                f"two of data.workers={self.count} processes in turn ended with exit code {ended} while they "
                f"decoded {len(paths)} images, {paths[:3]} and so on; -9 is often the kernel's, short "
                "of memory: lower data.workers, or set it to 0 to decode in threads"
            )
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        """Ends the workers that have nothing to do."""
        while not self.idle.empty():
            if (worker := self.idle.get()) is not None:
                worker.close()


_pools: dict[int, Workers] = {}
_lock = threading.Lock()  # the threads of a stream ask at once


def workers(count: int) -> Workers:
    """The same for every caller: they outlive a stream of batches, and a chunk of scores."""
    with _lock:
        if count not in _pools:
            _pools[count] = Workers(count)
        return _pools[count]
