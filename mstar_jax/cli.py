"""What commands share: their flags, how they start, how they are stopped, how they fail."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from mstar_jax import processes
from mstar_jax.inference.generate import Stopped
from mstar_jax.progress import ProgressHandler

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's values.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; default runs/<config>.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to, for the commands that write one.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; on TPU pods, GKE and SLURM they find each other."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where nothing tells.")
COUNT = flags.DEFINE_integer("num_processes", None, "How many there are, where nothing tells.")
INDEX = flags.DEFINE_integer("process_id", None, "Which one this is, where nothing tells.")
GRACE = flags.DEFINE_float("grace", 8.0, "Seconds from SIGTERM until the process is gone, saved or not.")

log = logging.getLogger("mstar_jax")


class Termination:
    """Turns SIGTERM into a question that the stages ask; a second thread keeps the promised time.

    A compiler or a long device batch cannot be interrupted, so after the grace period the process leaves
    as it is: everything on disk is whole, and a restart ends the same.
    """

    def __init__(self, grace: float):
        self.asked = threading.Event()
        self.grace = grace
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: self.asked.set())
        # Python runs a handler between two of its own instructions, which can be long in coming; the
        # byte on the pipe is written at once
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader: int) -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        self.asked.set()
        time.sleep(self.grace)
        os._exit(143)


def start(argv: Sequence[str]) -> Callable[[], bool]:
    """Sets up the log and SIGTERM; returns the question whether the command was told to stop.

    Raises:
      UsageError: something stands on the command line that is no flag.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    show_log()
    return Termination(GRACE.value).asked.is_set


def show_log() -> None:
    """Shows the log of the package on the terminal, and of other packages only their warnings."""
    absl.logging.set_verbosity(absl.logging.WARNING)  # JAX and Orbax report through absl
    log.addHandler(ProgressHandler())
    log.propagate = False


def begin() -> None:
    """Joins the other processes, if there are any; only process 0 says how things go."""
    if DISTRIBUTED.value or COORDINATOR.value:
        processes.start(COORDINATOR.value, COUNT.value, INDEX.value)
    log.setLevel(logging.INFO if processes.first() else logging.WARNING)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Ends the process with 143 where what is done inside was stopped, with 2 and a line where a value is
    wrong."""
    try:
        yield
    except Stopped as stopped:
        log.warning("%s. Start the same command again to go on.", stopped)
        sys.exit(143)
    except ValueError as error:
        if os.environ.get("MSTAR_TRACEBACK"):
            raise
        log.error("error: %s", error)
        sys.exit(2)
