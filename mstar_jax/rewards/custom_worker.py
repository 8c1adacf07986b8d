"""The worker of custom.py: calls the function of a user's file, a line of JSON for each response.

    python -P mstar_jax/rewards/custom_worker.py reward.py grade 0123456789abcdef 10 8589934592
        the file, the function, the file's digest, wall seconds a response, bytes of memory
    ""                                                     -> {}, or {"error": ...}: could it be loaded
    [{"id": "q1", "question": "1 + 1?", ...}, "It is 2"]   -> {"score": 1.0, "verdict": "correct"}
    [{"id": "q1", "question": "1 + 1?", ...}, "It is two"] -> {"error": "reward.py, line 3: KeyError: 'two'"}

It is a script that imports nothing of the project, so that it starts fast and can be killed. Whatever the
function prints or reads goes to and comes from /dev/null: the lines have descriptors of their own.
"""

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable

LOADING = 150.0  # seconds after which loading the file ends this process
ORPHAN = 20.0  # seconds beyond the limit after which a call ends this process, even if its parent is gone
SHOWN = 200  # characters of an error
VERDICTS = {"correct": 1.0, "wrong": 0.0, "unparsed": 0.0}
RIGHT = 0.5  # the least score of a correct response
ROUNDING = 1e-6  # a score beyond 0..1 by no more is one of its ends: a float32 sum of parts may miss it
Judged = Callable[[types.SimpleNamespace, str], object]


def load(path: pathlib.Path, name: str, digest: str) -> Judged:
    """The function of a file.

    Raises:
      ValueError: it has no such function of two arguments, or is not the file that it was.
      Exception: what the file itself raises.
    """
    if hashlib.sha256(path.read_bytes()).hexdigest()[: len(digest)] != digest:
        raise ValueError("the file has changed since the run began")
    sys.path.append(str(path.parent))  # what stands beside it
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)  # no name of a library
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Judged | None = getattr(module, name, None)
    if function is None or not callable(function):
        there = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"it has no function {name!r}; its functions are {', '.join(there) or 'none'}")
    try:
        inspect.signature(function).bind("query", "text")
    except TypeError as error:
        raise ValueError(f"{name} does not take (query, text): {error}") from error
    except ValueError:  # written in C: nothing is known of its arguments
        pass
    return function


def outcome(value: object) -> dict[str, object]:
    """Score and verdict, from what the function returned: a bool, a verdict, or a number in 0..1.

    Raises:
      ValueError: it is none of them.
    """
    if not isinstance(value, bool | int | float | str) and hasattr(value, "item"):
        value = value.item()  # a number of numpy's
    if isinstance(value, str) and value in VERDICTS:
        return {"score": VERDICTS[value], "verdict": value}
    if isinstance(value, bool | int | float) and -ROUNDING <= value <= 1 + ROUNDING:
        score = min(max(float(value), 0.0), 1.0)
        return {"score": score, "verdict": "correct" if score >= RIGHT else "wrong"}
    raise ValueError(f"returned {value!r}, neither a bool, nor {', '.join(VERDICTS)}, nor a number in 0..1")


def told(error: BaseException, path: pathlib.Path) -> dict[str, object]:
    """An exception in a line, with the last line of the user's file that it went through."""
    try:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        where = f"{path.name}, line {lines[-1]}: " if lines else ""
        kind = "" if type(error) is ValueError and not lines else f"{type(error).__name__}: "
        return {"error": f"{where}{kind}{error}"[:SHOWN]}
    except BaseException:  # it cannot even be shown
        return {"error": type(error).__name__}


def main(path: pathlib.Path, name: str, digest: str, seconds: float, memory: int) -> None:
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own, forks = os.getpid(), list[bool]()
    os.register_at_fork(after_in_parent=lambda: forks.append(True))

    def answer(call: Callable[[], dict[str, object]]) -> None:
        try:
            said = call()
        except BaseException as error:
            said = told(error, path)
            if isinstance(error, MemoryError):  # it may be full of what earlier calls have kept
                said["replace"] = True
        if os.getpid() != own:  # a fork of the function's comes back here
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if forks:
            said = {
                "error": "it forks: start programs with subprocess, without preexec_fn, and fork nothing",
                "replace": True,
            }
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    def called(line: str) -> dict[str, object]:
        query, text = json.loads(line)
        images, options = tuple(query.pop("images")), query.pop("options")
        options = None if options is None else tuple(options)
        shown = types.SimpleNamespace(**query, images=images, options=options)
        forks.clear()
        signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN)  # a handler of the function's own stays
        return outcome(grade(shown, text))

    def loaded() -> dict[str, object]:
        found.append(load(path, name, digest))
        return {}

    found: list[Judged] = []
    signal.setitimer(signal.ITIMER_REAL, LOADING)
    asked.readline()
    answer(loaded)
    [grade] = found
    for line in asked:
        answer(functools.partial(called, line))
    os._exit(0)  # the parent is gone; a thread of the function's would keep this process


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
