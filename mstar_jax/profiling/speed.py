"""How fast a run works: tokens a second, padding, FLOPs by part, MFU; and profiles of single steps.

A pass is one training, or one walk through batches that are sampled or scored. Its clock is read only where
the host waits for the device anyway: at a row of a training's curve, at the results of a batch. What was done
since the last time counts if nothing was compiled meanwhile:

    batch 1: compiled, done | batch 2: done | batch 3: done
    <----- left out ------> <----- 2 -----> <----- 3 ----->
"""

import collections
import contextlib
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from mstar_jax import sharding
from mstar_jax.profiling import flops
from mstar_jax.structs import Batch, Response, Row

log = logging.getLogger(__name__)
T = TypeVar("T")

# tokens and slots (places of the padded shapes) that went in, decoded and decode_slots that came out, and the
# model's FLOPs by part: those of padding are FLOPs
Work = collections.Counter[str]
Fed = Iterable[tuple[tuple[Row, ...], Batch]]  # what loader.row_batches gives


@functools.cache
def compiled() -> list[float]:
    """Seconds of every compilation of this process since this was first called; the list grows."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


class Pass:
    """The work of one pass, and its clock."""

    def __init__(self, chips: int, share: sharding.Share, shapes: dict[Any, dict[str, float]]):
        """Starts the clock; `shapes` are the FLOPs that are known already."""
        self.chips, self.share, self.shapes = chips, share, shapes
        self.all, self.timed = Work(), Work()
        self.seconds, self.left_out = 0.0, 0.0
        self.begun = collections.deque[Work]()
        self.start()

    def start(self) -> None:
        """What was before does not count."""
        self.since, self.compiled = time.perf_counter(), len(compiled())

    def skip(self) -> None:
        """What is under way does not count: nobody waits for its end."""
        for work in self.begun:
            self.all.update(work)
        self.begun.clear()
        self._read()

    def apart(self, call: Callable[..., T], *args: Any) -> T:
        """Calls what is no part of the pass, such as a checkpoint's writing."""
        self.skip()
        found = call(*args)
        self.start()
        return found

    def _read(self) -> float:
        """Seconds since the clock was started or last read; 0 where they do not count."""
        spent, counts = time.perf_counter() - self.since, len(compiled()) == self.compiled
        self.left_out += 0.0 if counts else spent
        self.start()
        return spent if counts else 0.0

    def begin(
        self, batch: Batch, count: Callable[[], dict[str, float]] | None = None, tokens: int | None = None
    ) -> None:
        """The device is given a batch.

        Args:
          batch: this process's share.
          count: FLOPs by part of the work on it; asked once for every shape.
          tokens: of all shares; by default as if the others were like this one.
        """
        whole, shapes = self.share.whole, tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self.shapes:
            self.shapes[shapes] = count() if count else {}
        tokens = whole(int((batch.branch >= 0).sum())) if tokens is None else tokens
        work = Work(tokens=tokens, slots=whole(batch.tokens.size))
        self.begun.append(work + Work({part: whole(int(n)) for part, n in self.shapes[shapes].items()}))

    def done(self, batches: int | None = None, **more: int) -> dict[str, float]:
        """The host has seen the end of the first (None: of all) batches that were begun.

        Returns:
          The rates since the clock was last read; nothing where they do not count.
        """
        work, spent = Work(more), self._read()
        for _ in range(len(self.begun) if batches is None else batches):
            work.update(self.begun.popleft())
        self.all.update(work)
        if not spent:
            return {}
        self.timed.update(work)
        self.seconds += spent
        return self._rates(work, spent)

    def fed(
        self, batches: Fed, count: Callable[[Batch], dict[str, float]] | None = None
    ) -> Iterator[tuple[tuple[Row, ...], Batch]]:
        """The batches on their way to the device; the clock starts when the first is asked for."""
        self.start()
        for rows, batch in batches:
            own = functools.partial(count, batch) if count else None
            self.begin(batch, own, sum(row.length for row in rows))
            yield rows, batch

    def read(self, results: Iterable[T]) -> Iterator[T]:
        """The results of the batches, one by one in their order."""
        for result in results:
            self.done(1)
            yield result

    def sampled(
        self,
        shards: Iterable[Sequence[Row]],
        results: Iterable[list[list[Response]]],
        places: Callable[[], int],
    ) -> Iterator[list[list[Response]]]:
        """The results of `rollouts.rollouts`, shard by shard.

        Args:
          shards: their rows.
          results: the responses of each row.
          places: asked after each result, for how many tokens there was room in the steps that it took.
        """
        for rows, groups in zip(shards, results):
            new = [
                len(r.tokens) - (row.starts[r.sample][1] if row.starts else 0)
                for row, group in zip(rows, groups)
                for r in group
            ]
            self.done(decoded=sum(new), decode_slots=places())
            yield groups

    def record(self) -> dict[str, float]:
        """What results.json says: counts of all the work, and the rates of what counts, in `seconds`."""
        out: dict[str, float] = {k: self.all[k] for k in ("tokens", "slots", "decoded", "decode_slots")}
        out = {k: v for k, v in out.items() if v}
        out |= {"seconds": round(self.seconds, 3), "left_out": round(self.left_out, 3)}
        return out | (self._rates(self.timed, self.seconds) if self.seconds else {})

    def _rates(self, work: Work, seconds: float) -> dict[str, float]:
        out = {"tokens_per_second": work["tokens"] / seconds}
        if work["decode_slots"]:
            out["decoded_per_second"] = work["decoded"] / seconds
        chip = flops.chip_of(jax.devices()[0].device_kind)
        for part in (part for part in (*flops.PARTS, "other") if work[part]):
            out[f"flops/{part}"] = work[part] / seconds
            if chip:
                out[f"mfu/{part}"] = work[part] / seconds / self.chips / chip.flops
        return out


class Speeds:
    """The passes of a run since its last lap."""

    def __init__(self, chips: int, share: sharding.Share = sharding.WHOLE):
        """Of so many devices, by a process with this share of every batch."""
        self.chips, self.share, self.passes = chips, share, dict[tuple[str, str], Pass]()
        self.shapes: dict[str, dict[Any, dict[str, float]]] = collections.defaultdict(dict)

    def of(self, kind: str, name: str) -> Pass:
        """A pass by its kind of work, whose programs are the same, and its name."""
        if (kind, name) not in self.passes:
            self.passes[kind, name] = Pass(self.chips, self.share, self.shapes[kind])
        return self.passes[kind, name]

    def lap(self) -> dict[str, dict[str, dict[str, float]]]:
        """The records of the passes since the last call, by kind and name."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (kind, name), each in self.passes.items():
            out.setdefault(kind, {})[name] = each.record()
        self.passes = {}
        return out


@contextlib.contextmanager
def profiler(folder: pathlib.Path, steps: Sequence[int]) -> Iterator[Callable[[int, Any], bool]]:
    """Traces some steps of a training into `folder`/<process>, for TensorBoard and xprof.

    Args:
      folder: where to.
      steps: (first, end), counted from 0; empty for none.

    Yields:
      `at(step, state)`, to be called before every step with the state then: whether the trace began or ended
      there, for which the device was waited for.
    """
    tracing = False

    def at(step: int, state: Any) -> bool:
        nonlocal tracing
        wanted = bool(steps) and steps[0] <= step < steps[1]
        if wanted == tracing:
            return False
        jax.block_until_ready(state)
        if wanted:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a trace with Python's frames crashed once, among other threads
            jax.profiler.start_trace(folder / str(jax.process_index()), profiler_options=options)
        else:
            jax.profiler.stop_trace()
            log.info("profile of steps %d to %d: %s", steps[0], steps[1] - 1, folder)
        tracing = wanted
        return True

    try:
        yield at
    finally:
        if tracing:
            jax.profiler.stop_trace()
