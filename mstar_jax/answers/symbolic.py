r"""Equality of formulas by algebra: `x^2+2x+1` and `(x+1)^2`, `\frac{\sqrt{2}}{2}` and `1/√2`.

    equal("x^2 + 2x + 1", "(x+1)^2")   -> True
    equal("y = 2x + 1", "2x - y = -1") -> True
    equal("25π", "25")                 -> False

What a model wrote is never evaluated: `formulas.latex` reads it, algebra.py lets sympy compare it, in a
process of its own with a limit on time and memory. That is a fresh interpreter (no fork, so jax may be
loaded; no signals in this process, so any thread may ask). It starts when the first formula is met, ends
with this process, and is replaced when it is late or gone. Late is not equal, as is all that is in doubt.
"""

import atexit
import functools
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
import warnings

from mstar_jax.answers.formulas import latex

SECONDS = 0.8  # processor time of one comparison; then the worker gives it up
PATIENCE = 1.6  # the worker is killed when it has said nothing for so long, seconds
START = 60.0  # for a worker to come up, seconds
MEMORY = 1 << 30  # address space of a worker, bytes
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "algebra.py")
WORKERS = 2  # at most so many at a time; further threads wait

_ATOM = re.compile(r"\(*(?:\\?[A-Za-z]+|\d+)\)*")
_NAME = re.compile(r"\(\\?[a-zA-Z]+(?:_\{\w+\})?\)")


def equal(a: str, b: str) -> bool:
    """Whether two formulas are proved to be the same; symmetric, never raises, False in doubt."""
    first, second = latex(a), latex(b)
    if first is None or second is None:
        return False
    if len(first) + len(second) == 4 or _value(first) or _value(second):  # y = 2x + 1 and 2x + 1
        first, second = _right(first), _right(second)
        if first is None or second is None or len(first) != len(second):
            return False
        if first[:-1] != second[:-1] and first[0] and second[0]:  # x = 5 and y = 5
            return False
        first, second = first[-1:], second[-1:]
    if all(len(f) == 1 and _ATOM.fullmatch(f[0]) for f in (first, second)):  # no need for algebra
        return first[0].strip("()") == second[0].strip("()")
    return first == second or _ask(*sorted((first, second)))


def _value(formula: tuple[str, ...]) -> bool:
    """x = 5: what `2x = 10` is not, though it says the same."""
    right = _right(formula)
    return bool(right and right[0]) and not re.search("[A-Za-z]", re.sub(r"\\[a-z]+", "", formula[2]))


def _right(formula: tuple[str, ...]) -> tuple[str, str] | None:
    """(name or '', expression) of `name = expression` or of an expression; None of another relation."""
    if len(formula) == 1:
        return "", formula[0]
    return (formula[0], formula[2]) if formula[1] == "=" and _NAME.fullmatch(formula[0]) else None


@functools.lru_cache(65536)
def _ask(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    return _pool.ask([first, second]) is True


class Worker:
    """One interpreter that compares; requests and answers are lines of JSON, `null` where it gave up."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", WORKER, str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip

    def ask(self, request: object, seconds: float) -> object:
        """Its answer.

        Raises:
          TimeoutError: it said nothing for so long.
          EOFError: it is gone. Either way, as after any other exception, it is closed.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            poll, said, end = select.poll(), b"", time.monotonic() + seconds
            poll.register(stdout, select.POLLIN)
            while not said.endswith(b"\n"):
                if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                    raise TimeoutError
                said += (more := os.read(stdout.fileno(), 4096))
                if not more:
                    raise EOFError
            return json.loads(said)
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError | ConnectionError | ValueError):
                raise EOFError from error
            raise

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """Up to WORKERS workers, each started when it is first needed."""

    def __init__(self) -> None:
        self.slots: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self.workers: set[Worker] = set()
        self.broken = False  # no worker comes up: sympy or the parser is missing
        for _ in range(WORKERS):
            self.slots.put(None)

    def ask(self, request: object) -> object:
        """A worker's answer; None where it gave up, was late, or died of it twice."""
        worker = self.slots.get()
        try:
            for _ in range(2):
                if self.broken:
                    return None
                try:
                    worker = worker or self._started()
                    return worker.ask(request, PATIENCE)
                except TimeoutError:
                    return None
                except (EOFError, OSError):  # it had been killed, or this request kills: one more try
                    pass
                finally:
                    if worker is not None and worker.process.returncode is not None:
                        self.workers.discard(worker)
                        worker = None
            return None
        finally:
            self.slots.put(worker)

    def _started(self) -> Worker:
        worker = Worker()
        self.workers.add(worker)
        try:
            worker.ask([["1"], ["2"]], START)
        except (EOFError, TimeoutError) as error:
            self.workers.discard(worker)
            self.broken = True
            warnings.warn(f"formulas are compared as text only: no worker comes up ({error!r})", stacklevel=2)
            raise
        return worker

    def close(self) -> None:
        while self.workers:
            self.workers.pop().close()


_pool = Pool()


def _renew() -> None:
    """After a fork: the child shares no pipe with its parent, and leaves the parent's workers alone."""
    global _pool, _inherited
    _inherited, _pool = _pool, Pool()


_inherited: Pool | None = None
os.register_at_fork(after_in_child=_renew)
atexit.register(lambda: _pool.close())
