"""How fast a run is: tokens per second, padding, FLOPs by part, MFU; and profiles of single steps.

A pass is one training run, or one loop over batches that are sampled or scored. Its clock is read only where
the host waits for the device anyway: at a point of a training curve, at the results of a batch. The time
since the last reading counts only if nothing was compiled in it:

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
from typing import TypeVar

import jax

from mstar_jax import sharding
from mstar_jax.profiling import flops
from mstar_jax.structs import Batch, Row

log = logging.getLogger(__name__)
T = TypeVar("T")

# Counts. Input: `tokens`, and `slots` (tokens and padding). Output: `decoded` tokens, and `decode_slots`, the
# tokens that the decoding steps had room for. And the FLOPs of the model by part, including those on padding.
Work = collections.Counter[str]
Fed = Iterable[tuple[tuple[Row, ...], Batch]]  # what loader.row_batches yields
Shapes = tuple[tuple[int, ...], ...]  # of the arrays of a batch


@functools.cache
def compiled() -> list[float]:
    """Seconds of every compilation in this process since the first call; the list keeps growing."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


class Pass:
    """The work of one pass, and its clock."""

    def __init__(self, chips: int, share: sharding.Share, shapes: dict[Shapes, dict[str, float]]):
        """Starts the clock.

        Args:
          chips: number of devices.
          share: this process's part of every batch.
          shapes: FLOPs by part for the shapes of batches; filled as new shapes are seen.
        """
        self.chips = chips
        self.share = share
        self.shapes = shapes
        self.all = Work()
        self.timed = Work()
        self.seconds = 0.0
        self.left_out = 0.0
        self.begun = collections.deque[Work]()
        self.start()

    def start(self) -> None:
        """Restarts the clock: the time before does not count."""
        self.since = time.perf_counter()
        self.compiled = len(compiled())

    def skip(self) -> None:
        """Leaves out the time of the batches in flight, because the host does not wait for their results."""
        for work in self.begun:
            self.all.update(work)
        self.begun.clear()
        self._elapsed()

    def apart(self, call: Callable[..., T], *args: object) -> T:
        """Calls a function whose time is not part of the pass, such as saving a checkpoint."""
        self.skip()
        found = call(*args)
        self.start()
        return found

    def _elapsed(self) -> float:
        """Seconds since the clock was started or last read; 0 if something was compiled in between."""
        spent = time.perf_counter() - self.since
        counts = len(compiled()) == self.compiled
        self.left_out += 0.0 if counts else spent
        self.start()
        return spent if counts else 0.0

    def begin(
        self, batch: Batch, count: Callable[[], dict[str, float]] | None = None, tokens: int | None = None
    ) -> None:
        """Records that a batch is given to the device.

        Args:
          batch: this process's share.
          count: gives the FLOPs of the work on it, by part; called once for every shape.
          tokens: of all shares; by default the other shares are assumed to be like this one.
        """
        whole = self.share.whole
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self.shapes:
            self.shapes[shapes] = count() if count else {}
        tokens = whole(int((batch.branch >= 0).sum())) if tokens is None else tokens
        work = Work(tokens=tokens, slots=whole(batch.tokens.size))
        self.begun.append(work + Work({part: whole(int(n)) for part, n in self.shapes[shapes].items()}))

    def done(self, batches: int | None = None, **more: int) -> dict[str, float]:
        """Records that the host has seen the results of batches.

        Args:
          batches: how many of those in flight, the oldest first; None for all.
          **more: further work to count, see `Work`.

        Returns:
          The rates since the clock was last read; empty if that time does not count.
        """
        work = Work(more)
        spent = self._elapsed()
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
        """Passes the batches on to the device; the clock starts when the first is requested."""
        self.start()
        for rows, batch in batches:
            own = functools.partial(count, batch) if count else None
            self.begin(batch, own, sum(row.length for row in rows))
            yield rows, batch

    def read(self, results: Iterable[T]) -> Iterator[T]:
        """Passes on the results of the batches, in order."""
        for result in results:
            self.done(1)
            yield result

    def record(self) -> dict[str, float]:
        """The entry in results.json: counts of all the work, and rates over the `seconds` that count."""
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
        """Begins the first lap, on this number of devices, with this process's share of every batch."""
        self.chips = chips
        self.share = share
        self.passes: dict[tuple[str, str], Pass] = {}
        self.shapes: dict[str, dict[Shapes, dict[str, float]]] = collections.defaultdict(dict)

    def of(self, kind: str, name: str) -> Pass:
        """A pass by its kind of work and its name; passes of one kind run the same programs."""
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
def profiler(folder: pathlib.Path, steps: Sequence[int]) -> Iterator[Callable[[int, object], bool]]:
    """Traces some steps of training into `folder`/<process>, for TensorBoard and xprof.

    Args:
      folder: to write to.
      steps: (first, end), counted from 0; empty for none.

    Yields:
      `at(step, state)`, to be called before every step with the current state. It returns whether the trace
      began or ended there, in which case it has waited for the device.
    """
    tracing = False

    def at(step: int, state: object) -> bool:
        nonlocal tracing
        wanted = bool(steps) and steps[0] <= step < steps[1]
        if wanted == tracing:
            return False
        jax.block_until_ready(state)
        if wanted:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing Python frames has crashed with several threads
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
