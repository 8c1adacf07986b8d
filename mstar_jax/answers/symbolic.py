r"""Equality of formulas by algebra: `x^2+2x+1` and `(x+1)^2`, `\frac{\sqrt{2}}{2}` and `1/√2`.

    equal("x^2 + 2x + 1", "(x+1)^2")   -> True
    equal("y = 2x + 1", "2x - y = -1") -> True
    equal("25π", "25")                 -> False

What a model wrote is never evaluated: formulas.py parses it, worker.py builds sympy expressions from the
trees and compares them, in a process of its own (child.py) with limits on time and memory. It starts when
the first formula is met, ends with this process, and is replaced when it is late or gone. Late means not
equal, and so does anything in doubt.
"""

import atexit
import functools
import json
import os
import queue
import sys
import warnings

from mstar_jax.answers.child import Child
from mstar_jax.answers.formulas import Formula, Tree, nodes, parse

SECONDS = 0.8  # processor time of one comparison; then the worker gives it up
PATIENCE = 1.6  # the worker is killed when it has said nothing for so long, seconds
START = 60.0  # for a worker to start, seconds
MEMORY = 1 << 30  # address space of a worker, bytes
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
WORKERS = 2  # at most so many at a time; further threads wait
FIRST = '[[["number", 1, 1], "", null], [["number", 2, 1], "", null]]'  # asked of every worker when it starts

_ANSWERS = {b"true": True, b"false": False}
_ATOMS = ("number", "symbol", "e", "pi", "infinity")


def equal(a: str, b: str) -> bool:
    """Whether two formulas are proved to be the same; symmetric, never raises, False in doubt."""
    first, second = parse(a), parse(b)
    if first is None or second is None:
        return False
    if bool(first.sign) != bool(second.sign) or _value(first) or _value(second):  # y = 2x + 1 and 2x + 1
        one, other = _assigned(first), _assigned(second)
        if one is None or other is None:
            return False
        if one[0] != other[0] and one[0] and other[0]:  # x = 5 and y = 5
            return False
        first, second = Formula(one[1]), Formula(other[1])
    if not first.sign and first.left[0] in _ATOMS and second.left[0] in _ATOMS:  # no need for algebra
        return first == second
    return first == second or _ask(*sorted((json.dumps(first), json.dumps(second))))


def _value(formula: Formula) -> bool:
    """Whether it is like x = 5, which `2x = 10` is not, though it says the same."""
    name, expression = _assigned(formula) or ("", formula.left)
    return bool(name) and all(node[0] != "symbol" for node in nodes(expression))


def _assigned(formula: Formula) -> tuple[str, Tree] | None:
    """(name or '', expression) of `name = expression` or of an expression; None of another relation."""
    if formula.right is None:
        return "", formula.left
    if formula.sign == "=" and formula.left[0] == "symbol":
        return str(formula.left[1]), formula.right
    return None


@functools.lru_cache(65536)
def _ask(first: str, second: str) -> bool:
    return _pool.ask(f"[{first}, {second}]") is True


class Worker(Child):
    """One interpreter that compares; a request is a line of JSON, its answer `true`, `false` or `null`."""

    def __init__(self) -> None:
        super().__init__([sys.executable, "-P", WORKER, str(SECONDS), str(MEMORY)])


class Pool:
    """Up to WORKERS workers, each started when it is first needed."""

    def __init__(self) -> None:
        self.slots: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self.workers: set[Worker] = set()
        self.broken = False  # no worker starts: sympy is missing
        for _ in range(WORKERS):
            self.slots.put(None)

    def ask(self, request: str) -> bool | None:
        """A worker's answer; None where it gave up, was late, or died twice of the request."""
        worker = self.slots.get()
        try:
            for _ in range(2):
                if self.broken:
                    return None
                try:
                    worker = worker or self._started()
                    return _ANSWERS.get(worker.ask(request, PATIENCE).strip())
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
            worker.ask(FIRST, START)
        except (EOFError, TimeoutError) as error:
            self.workers.discard(worker)
            self.broken = True
            warnings.warn(f"formulas are compared as text only: no worker starts ({error!r})", stacklevel=2)
            raise
        return worker

    def close(self) -> None:
        while self.workers:
            self.workers.pop().close()


_pool = Pool()


def _renew() -> None:
    """After a fork: the child shares no pipe with its parent, and leaves the parent's workers alone."""
    global _pool, _inherited
    _inherited = _pool
    _pool = Pool()


_inherited: Pool | None = None
os.register_at_fork(after_in_child=_renew)
atexit.register(lambda: _pool.close())
