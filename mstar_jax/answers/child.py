"""A child process that answers a line with a line, within a time, and that can be killed with all it started.

It is a fresh interpreter: nothing is forked, so jax may be loaded here, and no signal is needed, so any
thread may ask. What it does to itself, its parent only learns as an exception.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence


class Child:
    """One process. It ends with this one: its input is closed then.

    Attributes:
      process: it; the leader of a session of its own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=environment, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        os.set_blocking(
            self.process.stdin.fileno(), False
        )  # one that does not read must not stop this thread

    def ask(self, request: str, seconds: float) -> bytes:
        """Its answer to a line.

        Raises:
          TimeoutError: it has not answered within so many seconds.
          EOFError: it is gone. Either way, as after any other exception, it is closed.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        end = time.monotonic() + seconds
        try:
            left = request.encode() + b"\n"
            while left:
                _wait(stdin.fileno(), select.POLLOUT, end)
                left = left[os.write(stdin.fileno(), left) :]
            said = b""
            while not said.endswith(b"\n"):
                _wait(stdout.fileno(), select.POLLIN, end)
                more = os.read(stdout.fileno(), 4096)
                if not more:
                    raise EOFError
                said += more
            return said
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError | ConnectionError | ValueError):
                raise EOFError from error
            raise

    def close(self) -> None:
        """Kills it and the processes of its session."""
        if self.process.returncode is None:  # until it is waited for, no other session can have its number
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _wait(number: int, event: int, end: float) -> None:
    """Waits until a file is ready. TimeoutError where it is not by `end`, of the monotonic clock."""
    poll = select.poll()
    poll.register(number, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError
