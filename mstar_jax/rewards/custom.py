"""The verdicts that a run trains and is measured by: the answer checker's, an exact format's, a user's.

    --config.reward=                               the answer checker (`selection.judge`)
    --config.reward=format                         the same within <think>...</think><answer>...</answer>
    --config.reward=/home/me/reward.py:grade       grade(query, text) -> bool, verdict or score in 0..1

A user's function runs in processes of its own (custom_worker.py), each response within a limit of time. One
that raises, hangs, forks, prints, exits, crashes or returns something else costs no more than that response,
which is `failed`, with a score of 0.
"""

import atexit
import collections
import functools
import hashlib
import json
import logging
import os
import pathlib
import queue
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

from mstar_jax.answers.child import Child
from mstar_jax.rewards import selection
from mstar_jax.rewards.selection import FAILED, Judge
from mstar_jax.structs import Query, Response

log = logging.getLogger(__name__)

WORKER = pathlib.Path(__file__).with_name("custom_worker.py")
WORKERS = 4  # processes, at most
START = 120.0  # seconds for one to load the user's file
MEMORY = 8 << 30  # address space of one, bytes
SAID = 5  # failures that are logged one by one; all are counted in the stage's record
NAMED = 20  # queries that a stage's record names
SUSPECT = 64  # responses: if all of the first ones fail, that is said aloud


class Failures(TypedDict):
    """Of so many `responses` those for which a user's reward `failed`, to how many `queries`, and how many to
    the first ones of these."""

    responses: int
    failed: int
    queries: int
    by_query: dict[str, int]


class Grading(NamedTuple):
    """How responses are judged.

    Attributes:
      judge: fills in answers, verdicts and, by a user's function, scores.
      identity: for the settings of the stores: what tells it from others; empty for the answer checker.
    """

    judge: Judge
    identity: Mapping[str, object]


def grading(reward: str, seconds: float) -> Grading:
    """The `Grading` of a config's `reward`; a user's function is loaded once, to see that it can be.

    Args:
      reward: see above.
      seconds: wall time for one response.

    Raises:
      ValueError: it cannot; names the file, the function and what is wrong with them.
    """
    if not reward:
        return Grading(selection.judge_all, {})
    if reward in RULES:
        return Grading(RULES[reward], {"reward": reward})
    function = Function(reward, seconds)
    function.load()
    return Grading(function, {"reward": {"file": function.digest, "function": function.name}})


def is_users(reward: str) -> bool:
    """Whether a config's `reward` names a function of the user's."""
    return bool(reward) and reward not in RULES


def check(reward: str) -> None:
    """Raises ValueError where a config's `reward` is none of these; nothing is loaded."""
    if is_users(reward):
        place(reward)


def place(reward: str) -> tuple[pathlib.Path, str]:
    """(file, function) of a config's `reward` that names them.

    Raises:
      ValueError: it does not, or there is no such file.
    """
    text, _, name = reward.rpartition(":")
    path = pathlib.Path(text).absolute()
    if path.suffix != ".py" or not name.isidentifier():
        known = ", ".join(map(repr, RULES))
        raise ValueError(
            f"reward = {reward!r}: choose {known}, leave it empty for the answer checker, or name a function "
            "of your own as path/to/file.py:function"
        )
    if not path.is_file():
        raise ValueError(f"reward = {reward!r}: there is no file {path} to load the function {name!r} from")
    return path, name


def failures(groups: Iterable[Sequence[Response]]) -> Failures:
    """Of judged responses."""
    total = 0
    found = collections.Counter[str]()
    for group in groups:
        total += len(group)
        found.update(r.query_id for r in group if r.verdict == FAILED)
    return count(total, found)


def count(responses: int, failed: collections.Counter[str]) -> Failures:
    """Of so many responses, those to each query for which the reward failed."""
    first = dict(list(failed.items())[:NAMED])
    return Failures(responses=responses, failed=failed.total(), queries=len(failed), by_query=first)


# ---- 1. rules of our own ------------------------------------------------------------------------------

_TAG = r"</?(?:think|answer)>"
_FORMAT = re.compile(
    rf"<think>(?:(?!{_TAG}).)*</think>\s*(<answer>(?:(?!{_TAG}).)*</answer>)", re.DOTALL
)  # each tag once, in this order; only white space between and around the blocks


def exact_format(query: Query, response: Response) -> Response:
    """As `selection.judge`, of what stands in <answer>; wrong, and without an answer, where the response is
    not exactly <think>...</think><answer>...</answer>."""
    found = _FORMAT.fullmatch(response.text.strip())
    judged = selection.judge(query, replace(response, text=found[1] if found else ""))
    verdict = judged.verdict if found or query.answer is None else "wrong"
    return replace(judged, text=response.text, verdict=verdict)


RULES: dict[str, Judge] = {  # values of `reward`
    "format": lambda query, responses: [exact_format(query, r) for r in responses],
}


# ---- 2. a user's function -----------------------------------------------------------------------------


class Function:
    """A user's function: a `Judge` that any thread may ask.

    Attributes:
      reward: the config's value.
      digest: of its file, when the run began; a file that has changed since is refused.
      name: of the function.
      seconds: wall time for one response.
    """

    def __init__(self, reward: str, seconds: float) -> None:
        self.reward, self.seconds = reward, seconds
        self.path, self.name = place(reward)
        self.digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        self.asked = self.failed = 0
        self.lock = threading.Lock()
        self.threads = futures.ThreadPoolExecutor(WORKERS)
        self.idle: queue.LifoQueue[Child | None] = queue.LifoQueue()
        for _ in range(WORKERS):
            self.idle.put(None)
        atexit.register(self.close)

    def __call__(self, query: Query, responses: Sequence[Response]) -> list[Response]:
        """The responses with verdicts and scores; without a gold or voted answer there are none.

        Raises:
          ValueError: the user's file can no longer be loaded.
        """
        return list(self.threads.map(functools.partial(self.judged, query), responses))

    def judged(self, query: Query, response: Response) -> Response:
        """One response of them; its `answer` is the answer checker's, for votes."""
        found = selection.judge(query, response)
        if query.answer is None:
            return found
        shown = {**vars(query), "images": list(query.images)}
        said = self.said(json.dumps([shown, response.text]))
        if "error" in said:
            self.note(response, said["error"])
            return replace(found, verdict=FAILED, score=0.0)
        self.note(response, "")
        return replace(found, verdict=said["verdict"], score=said["score"])

    def said(self, request: str) -> dict[str, Any]:
        """A worker's answer. One that is late or gone is replaced; what ended one that had answered before is
        tried once more, by a new one."""
        worker = self.idle.get()
        try:
            while True:
                fresh = worker is None
                worker = worker or self.started()
                try:
                    found = json.loads(worker.ask(request, self.seconds))
                except TimeoutError:
                    worker = None
                    return {"error": f"no answer within {self.seconds:g} s"}
                except (EOFError, OSError):
                    code, worker = worker.process.returncode, None
                    if fresh:
                        return {"error": f"it ended its process (exit code {code})"}
                    continue
                except ValueError:
                    found = {"error": "its process did not answer with JSON", "replace": True}
                if found.get("replace"):
                    worker.close()
                    worker = None
                return found
        finally:
            self.idle.put(worker)

    def started(self) -> Child:
        """A new worker that has loaded the file."""
        where = f"reward = {self.reward!r}: {self.name!r} of {self.path} cannot be loaded: "
        command = [sys.executable, "-P", WORKER, self.path, self.name, self.digest, self.seconds, MEMORY]
        found = os.pathsep.join(filter(None, sys.path))  # what this process finds, it may import too
        own = {**os.environ, "PYTHONPATH": found, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        worker = Child(list(map(str, command)), own)
        try:
            said = json.loads(worker.ask("", START))
        except TimeoutError as error:
            raise ValueError(f"{where}it took longer than {START:.0f} s") from error
        except (EOFError, OSError) as error:
            code = worker.process.returncode
            raise ValueError(f"{where}it ended its process (exit code {code}); see what it does") from error
        if "error" in said:
            worker.close()
            raise ValueError(f"{where}{said['error']}")
        return worker

    def load(self) -> None:
        """Starts the first worker. Raises ValueError where the function cannot be loaded."""
        worker = self.idle.get()
        try:
            worker = worker or self.started()
        finally:
            self.idle.put(worker)

    def note(self, response: Response, error: str) -> None:
        """Counts a response; logs the first failures, and if it seems that all fail."""
        with self.lock:
            self.asked += 1
            self.failed += bool(error)
            if error and self.failed <= SAID:
                where = f"query {response.query_id!r}, sample {response.sample}"
                more = "; further ones are only counted" if self.failed == SAID else ""
                log.warning("reward %s fails for %s: %s%s", self.reward, where, error, more)
            if self.asked == self.failed == SUSPECT:
                text = "reward %s FAILS FOR EACH of the first %d responses (%s): none of them counts as right"
                log.warning(text, self.reward, SUSPECT, error)

    def close(self) -> None:
        """Ends the workers that have nothing to do."""
        while not self.idle.empty():
            if (worker := self.idle.get()) is not None:
                worker.close()
