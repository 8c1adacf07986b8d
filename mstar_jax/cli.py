"""What commands share: their flags, how they start, how they are stopped, how they fail."""

import contextlib
import hashlib
import logging
import math
import os
import pathlib
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from mstar_jax import processes
from mstar_jax.inference.generate import Stopped
from mstar_jax.progress import ProgressHandler

CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's values.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run; default runs/<config>.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write to, for the commands that write one.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; on TPU pods, GKE and SLURM they find each other."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where it is not detected.")
COUNT = flags.DEFINE_integer("num_processes", None, "How many processes there are, where it is not detected.")
INDEX = flags.DEFINE_integer("process_id", None, "Which process this is, where it is not detected.")
GRACE = flags.DEFINE_float(
    "grace", 8.0, "Seconds from SIGTERM, Ctrl-C or SIGHUP until the process exits, saved or not."
)

log = logging.getLogger("mstar_jax")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Termination:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) into a flag that the stages read.

    A second thread ends the process when its time is over, or at a second Ctrl-C.

    A compiler or a long device batch cannot be interrupted, so after the grace period the process exits
    in the middle of it: everything on disk is whole, and a restart ends with the same result.
    """

    def __init__(self, grace: float):
        self.asked = threading.Event()
        self.grace = grace
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: self.asked.set())
        # Python runs a handler only between two bytecode instructions, which may be far apart;
        # the byte on the pipe is written at once
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        # A terminal sends these two to the child processes as well, which leave with this one. They inherit
        # what is blocked here; the other thread takes the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))

    def _watch(self, reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        came: list[int] = []
        end = math.inf
        while True:
            left = end - time.monotonic()
            ready, _, _ = select.select([reader], [], [], None if math.isinf(end) else max(left, 0))
            if not ready:
                os._exit(143)
            came += [number for number in os.read(reader, 64) if number in STOPS]
            if came.count(signal.SIGINT) > 1:
                os._exit(130)
            if came and math.isinf(end):
                self.asked.set()
                end = time.monotonic() + self.grace


def start(argv: Sequence[str]) -> Callable[[], bool]:
    """Sets up the log and the signals; returns a function that says whether the command was told to stop.

    Raises:
      UsageError: the command line has an argument that is not a flag.
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
    """Joins the other processes, if there are any. Only process 0 logs progress. Keeps compiled programs."""
    if DISTRIBUTED.value or COORDINATOR.value:
        processes.start(COORDINATOR.value, COUNT.value, INDEX.value)
    keep_programs()
    log.setLevel(logging.INFO if processes.first() else logging.WARNING)


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache, so that the next start loads them.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR or --jax_compilation_cache_dir name another
    folder, and --jax_enable_compilation_cache=false turns it off. A program for a CPU may use everything that
    this kind of CPU has, so each kind has its own folder.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # JAX makes it at run time
        return
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    try:
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        flags = [line for line in cpu if line.startswith(("model name", "flags", "Features"))]
    except OSError:  # not Linux
        flags = [platform.machine(), platform.processor()]
    kind = hashlib.sha256("\n".join(flags).encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder / "mstar_jax" / "compiled" / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main(command: Callable[[list[str]], None]) -> None:
    """Reads the flags, JAX's own among them, and runs a command."""
    jax.config.config_with_absl()
    app.run(command, flags_parser=_flags)


def _flags(argv: list[str]) -> list[str]:
    """The arguments that are no flags. Ends the process with one line where a key of the config is unknown:
    config_flags would end it with the traceback of an attribute."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        key = str(error).strip("\"'")
        given = [
            each for each in argv if each.startswith("--config.") and key in each.partition("=")[0].split(".")
        ]
        print(
            f"error: {', '.join(given) or argv}: the config has no key {key!r}; base.py lists all",
            file=sys.stderr,
        )
        sys.exit(1)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Ends the process with exit code 143 if the block was stopped, and with one line and 2 if a value is
    wrong, 1 if the system refused something (a workdir in use or read-only, a full disk).

    With MSTAR_TRACEBACK set in the environment, the traceback is shown.
    """
    try:
        yield
    except Stopped as stopped:
        log.warning("%s. Start the same command again to continue.", stopped)
        sys.exit(143)
    except (ValueError, OSError) as error:
        if os.environ.get("MSTAR_TRACEBACK"):
            raise
        log.error("error: %s", error)
        sys.exit(2 if isinstance(error, ValueError) else 1)
